"""An experiment file as objects, with errors that name the key.

The dataclasses of the rooms are the schema: a section's keys are the fields of its class, and what
a class refuses when it is made is reported under the section's name.
"""

import copy
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fedpeft.channel import PlainChannel, RingChannel
from fedpeft.config.compression import Compression, check_compression, told, without
from fedpeft.config.forward_only import check_forward_only
from fedpeft.config.personal import Personal, check_personal
from fedpeft.config.ranks import RANKS, check_ranks
from fedpeft.config.rules import RULES, check_rule, is_dora, seeded
from fedpeft.config.runtimes import FORMATS, check_format, check_onnx, check_runtimes
from fedpeft.config.schema import Choice, Settings, build, check, choose, nearest, plain, section
from fedpeft.config.sections import Baselines, Evaluation, Fleet, Simulation
from fedpeft.config.secure import CHANNELS, SECAGGS, InTheClear, check_secure, with_defaults
from fedpeft.config.timing import SCHEDULES, timing
from fedpeft.data import Dirichlet, Iid, Natural, Partitioner, Quantity, Sampled, Shards, Source, Split
from fedpeft.errors import ConfigError
from fedpeft.rounds import Buffered, Ranks, Selection, Synchronous
from fedpeft.rules import (
    Adagrad,
    Adam,
    Averaging,
    Examples,
    ListRule,
    MeanRule,
    Momentum,
    ServerOptimiser,
    SquareRoot,
    Uniform,
    Weighting,
    Yogi,
    personal,
)
from fedpeft.secagg import Protocol
from fedpeft.training.methods import Method
from fedpeft.training.settings import Model, Training

SERVERS: Mapping[str, Choice] = {
    "adagrad": Choice(Adagrad),
    "adam": Choice(Adam),
    "averaging": Choice(Averaging),
    "momentum": Choice(Momentum),
    "yogi": Choice(Yogi),
}
WEIGHTINGS: Mapping[str, Choice] = {
    "examples": Choice(Examples),
    "root": Choice(SquareRoot),
    "uniform": Choice(Uniform),
}
PARTITIONS: Mapping[str, Choice] = {
    "dirichlet": Choice(Dirichlet),
    "iid": Choice(Iid),
    "natural": Choice(Natural),
    "quantity": Choice(Quantity),
    "sampled": Choice(Sampled),
    "shards": Choice(Shards),
}


@dataclass(frozen=True, slots=True)
class Experiment:
    """A run, as the objects that do it; ``settings`` is the same as plain values, every default filled in.

    run: which run of the experiment this is, set when it starts: deployed clients keep their state under it.
    """

    name: str
    run: str
    seed: int
    rounds: int
    model: Model
    data: Source
    partition: Partitioner
    split: Split
    adapter: Method
    ranks: Ranks
    training: Training
    rule: MeanRule | ListRule
    server: ServerOptimiser
    weighting: Weighting
    channel: PlainChannel | RingChannel
    secagg: Protocol | InTheClear
    compression: Compression
    schedule: Synchronous | Buffered
    selection: Selection
    evaluation: Evaluation
    baselines: Baselines
    personal: Personal
    fleet: Fleet
    simulation: Simulation
    settings: Settings = field(repr=False, compare=False)

    @property
    def plain(self) -> PlainChannel:
        """The channel of answers in the clear, which a run with secure aggregation has none of."""
        return self.channel if isinstance(self.channel, PlainChannel) else PlainChannel()

    @property
    def settings_json(self) -> str:
        """The settings in one line, the same text for the same settings."""
        return json.dumps(self.settings, sort_keys=True, separators=(",", ":"))


_PLAIN: Mapping[str, type[Any]] = {
    "model": Model,
    "data": Source,
    "split": Split,
    "adapter": Method,
    "compression": Compression,
    "training": Training,
    "selection": Selection,
    "evaluation": Evaluation,
    "baselines": Baselines,
    "personal": Personal,
    "fleet": Fleet,
    "simulation": Simulation,
}
_CHOSEN: Mapping[str, tuple[Mapping[str, Choice], str]] = {
    "partition": (PARTITIONS, "iid"),
    "ranks": (RANKS, "whole"),
    "rule": (RULES, "fedit"),
    "server": (SERVERS, "averaging"),
    "weighting": (WEIGHTINGS, "examples"),
    "channel": (CHANNELS, "plain"),
    "secagg": (SECAGGS, "none"),
    "schedule": (SCHEDULES, "synchronous"),
}


def read(path: Path, changes: Sequence[str] = ()) -> Experiment:
    """The experiment in a TOML file, with ``changes`` such as "training.lr=0.01" put over it."""
    return experiment(override_all(load(path), changes))


def load(path: Path) -> Settings:
    """The plain values of a TOML file. Raises ConfigError naming the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; want an experiment in TOML") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: can't be read as TOML: {error}") from error


def override_all(settings: Mapping[str, Any], changes: Sequence[str]) -> Settings:
    """A copy of ``settings`` with each "section.key=value" in place; values are TOML, or else text."""
    out: Settings = copy.deepcopy(dict(settings))
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"got -c {change!r}; want key=value, such as training.lr=0.01")
        put(out, path.strip(), _value(text.strip()))
    return out


def put(settings: Settings, path: str, value: Any) -> None:
    """Set "section.key" in nested settings, in place."""
    *above, key = path.split(".")
    for name in above:
        settings = settings.setdefault(name, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"{path}: {name} is a value, not a section")
    settings[key] = value


def experiment(settings: Mapping[str, Any]) -> Experiment:
    """The experiment that these plain values describe. Raises ConfigError naming the key."""
    known = {"name", "run", "seed", "rounds", *_PLAIN, *_CHOSEN}
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"{key}: no such key or section;{nearest(key, known)} it is one of {', '.join(sorted(known))}"
            )
    settings = without(with_defaults(settings))
    top = {
        "name": check("name", settings.get("name", "run"), str),
        "run": check("run", settings.get("run", ""), str),
        "seed": check("seed", settings.get("seed", 0), int),
        "rounds": check("rounds", settings.get("rounds", 10), int),
    }
    for key, least, want in (("rounds", 1, "at least 1"), ("seed", 0, "0 or more")):
        if top[key] < least:
            raise ConfigError(f"{key}: got {top[key]}; want {want}")
    made = {key: build(cls, section(settings, key), key) for key, cls in _PLAIN.items()}
    full: Settings = dict(top) | {key: plain(x) for key, x in made.items()}
    for key, (choices, default) in _CHOSEN.items():
        known_here, given = _all(key, choices), section(settings, key)
        if key == "rule":
            given = seeded(given, known_here, default, top["seed"])
        made[key], full[key] = choose(key, known_here, given, default)
    found = Experiment(**top, **made, settings=told(full))
    _combinations(found)
    return replace(found, rule=personal(found.rule, found.personal.tensors))


def _combinations(found: Experiment) -> None:
    name = found.settings["rule"]["name"]
    check_rule(found.rule, name, found.adapter, found.server, found.schedule)
    check_forward_only(found, name)
    if found.rounds < found.rule.fewest_rounds:
        raise ConfigError(
            f"rounds: got {found.rounds}; {name} finds its directions in the first {found.rule.fewest_rounds - 1}; "
            f"want at least {found.rule.fewest_rounds}, or rule.name = 'ffa'"
        )
    if found.rule.needs_sgd and found.training.optimiser != "sgd":
        raise ConfigError(
            f"training.optimiser: got {found.training.optimiser!r}; {name} corrects gradients, and this optimiser "
            f'rescales them; want "sgd" (with a training.lr of its own, such as 0.1), or a rule such as fedit'
        )
    check_ranks(found.ranks, found.settings["ranks"]["name"], found.adapter, found.rule)
    check_personal(found.personal, found.adapter, is_dora(found.adapter), found.evaluation.clients)
    check_secure(found)
    check_compression(found)
    timing(found.rule, name, found.schedule, found.simulation.devices, found.selection)
    check_runtimes(found, name)
    if found.fleet.kit:
        check_onnx(found, name, f"fleet.kit: got {found.fleet.kit!r}")
        if found.fleet.kit in FORMATS:
            check_format(found.model, found.fleet.kit, f"fleet.kit: got {found.fleet.kit!r}")
    if found.selection.rest and isinstance(found.schedule, Buffered):
        raise ConfigError(
            f"selection.rest: got {found.selection.rest}; want 0 with schedule.name = 'buffered', which has no rounds "
            f"to sit out"
        )
    if found.fleet.own_data and not found.data.classes and found.data.task != "lm":
        raise ConfigError(
            "data.classes: is missing; want the labels in the order of their numbers where fleet.own_data is set, "
            'since one node\'s file need not hold them all (for prompts and replies want data.task = "lm")'
        )
    if found.fleet.own_data and found.fleet.nodes is None:
        raise ConfigError("fleet.nodes: is missing; want the number of nodes where each has data of its own")
    if found.fleet.own_data and found.evaluation.central:
        raise ConfigError("evaluation.central: there is no central test set where fleet.own_data is set; want false")


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def known_rules() -> Mapping[str, Choice]:
    """What ``rule.name`` may be, with what other packages add."""
    return _all("rule", RULES)


_GROUPS = {"secagg": "fedpeft.secagg"}


@cache
def _plugins(section: str) -> tuple[tuple[str, Choice], ...]:
    return tuple((e.name, Choice(e.load())) for e in entry_points(group=_GROUPS.get(section, f"fedpeft.{section}s")))


def _all(section: str, choices: Mapping[str, Choice]) -> Mapping[str, Choice]:
    """The table of a section, with what other packages add under the entry points ``fedpeft.<section>s``, of protocols
    ``fedpeft.secagg``."""
    return dict(_plugins(section)) | dict(choices)
