"""An experiment file as objects, with errors that name the key.

The dataclasses of the rooms are the schema: a section's keys are the fields of its class, and what
a class refuses when it is made is reported under the section's name.
"""

import copy
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from fedpeft.channel import PlainChannel
from fedpeft.config.rules import RULES, check_rule, seeded
from fedpeft.config.schema import Choice, Settings, build, check, choose, nearest, plain, section
from fedpeft.config.timing import SCHEDULES, kinds, timing
from fedpeft.data import Dirichlet, Iid, Natural, Partitioner, Quantity, Sampled, Shards, Source, Split
from fedpeft.errors import ConfigError
from fedpeft.rounds import Buffered, Device, Selection, Synchronous
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
)
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
CHANNELS: Mapping[str, Choice] = {"plain": Choice(PlainChannel)}
PARTITIONS: Mapping[str, Choice] = {
    "dirichlet": Choice(Dirichlet),
    "iid": Choice(Iid),
    "natural": Choice(Natural),
    "quantity": Choice(Quantity),
    "sampled": Choice(Sampled),
    "shards": Choice(Shards),
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """When the adapter is evaluated: every ``every`` rounds and after the last.

    clients: evaluate on each client's own validation rows too; central: on the central test set; sample: of more
    clients than this, so many are drawn for each evaluation, and for the end and the baselines the same ones.
    """

    every: int = 1
    clients: bool = True
    central: bool = True
    sample: int = 300

    def __post_init__(self) -> None:
        for key in ("every", "sample"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: got {getattr(self, key)}; want at least 1")


@dataclass(frozen=True, slots=True)
class Baselines:
    """What the run is compared with, all trained for as many steps as the federation gives each row.

    base: the adapter before training; local: each client alone; central: all clients' rows in one place.
    """

    base: bool = True
    local: bool = False
    central: bool = False


@dataclass(frozen=True, slots=True)
class Fleet:
    """What the coordinator waits for before it starts.

    nodes: how many (in a simulation, all of them); wait: seconds; failures: rounds in a row that may
    fail before the run stops; own_data: each node brings a data set of its own (its node config's
    ``data``), so there is nothing to partition.
    """

    nodes: int | None = None
    wait: float = 120.0
    failures: int = 3
    own_data: bool = False

    def __post_init__(self) -> None:
        for key, good, want in (
            ("nodes", self.nodes is None or self.nodes >= 1, "at least 1"),
            ("wait", self.wait > 0, "more than 0 seconds"),
            ("failures", self.failures >= 1, "at least 1"),
        ):
            if not good:
                raise ValueError(f"{key}: got {getattr(self, key)}; want {want}")


@dataclass(frozen=True, slots=True)
class Simulation:
    """How simulated clients run.

    engine: "cohort" trains many at once on one base, "loop" one after another; group: the most that are in one step
    (unset: as many as memory and the processor have use for); workers: processes that share the base (unset: one for
    every four cores); devices: the kinds of device that clients are on. Where there are any, time is simulated:
    answers come when these would give them, and ``selection.deadline`` is in simulated seconds.
    """

    engine: Literal["cohort", "loop"] = "cohort"
    group: int | None = None
    workers: int | None = None
    devices: Mapping[str, Device] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", kinds(self.devices, "simulation.devices"))
        for key in ("group", "workers"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key}: got {value}; want at least 1, or leave it out")


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
    training: Training
    rule: MeanRule | ListRule
    server: ServerOptimiser
    weighting: Weighting
    channel: PlainChannel
    schedule: Synchronous | Buffered
    selection: Selection
    evaluation: Evaluation
    baselines: Baselines
    fleet: Fleet
    simulation: Simulation
    settings: Settings = field(repr=False, compare=False)

    @property
    def settings_json(self) -> str:
        """The settings in one line, the same text for the same settings."""
        return json.dumps(self.settings, sort_keys=True, separators=(",", ":"))


_PLAIN: Mapping[str, type[Any]] = {
    "model": Model,
    "data": Source,
    "split": Split,
    "adapter": Method,
    "training": Training,
    "selection": Selection,
    "evaluation": Evaluation,
    "baselines": Baselines,
    "fleet": Fleet,
    "simulation": Simulation,
}
_CHOSEN: Mapping[str, tuple[Mapping[str, Choice], str]] = {
    "partition": (PARTITIONS, "iid"),
    "rule": (RULES, "fedit"),
    "server": (SERVERS, "averaging"),
    "weighting": (WEIGHTINGS, "examples"),
    "channel": (CHANNELS, "plain"),
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
    found = Experiment(**top, **made, settings=full)
    _combinations(found)
    return found


def _combinations(found: Experiment) -> None:
    name = found.settings["rule"]["name"]
    check_rule(found.rule, name, found.adapter, found.server, found.schedule)
    timing(found.rule, name, found.schedule, found.simulation.devices, found.selection)
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


@cache
def _plugins(section: str) -> tuple[tuple[str, Choice], ...]:
    return tuple((e.name, Choice(e.load())) for e in entry_points(group=f"fedpeft.{section}s"))


def _all(section: str, choices: Mapping[str, Choice]) -> Mapping[str, Choice]:
    """The table of a section, with what other packages add under the entry points ``fedpeft.<section>s``."""
    return dict(_plugins(section)) | dict(choices)
