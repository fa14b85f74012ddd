"""What an experiment or a model takes on a device, and what to change where that is too much."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedpeft.config import Experiment
from fedpeft.data import Table
from fedpeft.errors import ConfigError
from fedpeft.rounds import Memory, bytes_in
from fedpeft.run.needs import CARRIER
from fedpeft.run.tables import table
from fedpeft.training.packaged import SHORT_NAMES, folder
from fedpeft.training.plan import ENGINES, Choice, Fit, Link, Plan, Planner, changes, told
from fedpeft.training.predict import Engine, Sizes, kept_below
from fedpeft.training.settings import Method, Model, Training

_CLASSES = 2  # of a classifier whose data is not known


@dataclass(frozen=True, slots=True)
class Wish:
    """What a device is wanted to train. choice: its settings; planner: of the model."""

    planner: Planner
    choice: Choice

    @property
    def fit(self) -> Fit:
        """What it takes as it is."""
        return self.planner.taken(self.choice, self.choice)

    def plan(self, budget: float, link: Link | None = None) -> Plan:
        """As ``Planner.plan``."""
        return self.planner.plan(self.choice, budget, link)

    def check(self, budget: float, link: Link | None = None) -> Plan:
        """The plan, where nothing has to change. Raises ConfigError with the cheapest change that fits."""
        plan, now = self.plan(budget, link), self.fit
        if plan.best.choice == self.choice:
            return plan
        parts = now.parts.total / 1e6
        over = f"training takes about {parts:.0f} MB at its peak, and the budget is {budget / 1e6:.0f} MB"
        if self.planner.fits(now, budget):
            over = f"{(now.up + now.down) / 1e3:.0f} kB travel in a round, and the link takes half a round for fewer"
        raise ConfigError(
            f"plan: {over}; the cheapest change that fits: {told(plan.best.choice, self.choice)} "
            f"(about {plan.best.parts.total / 1e6:.0f} MB)"
        )


def wish(
    model: Model,
    method: Method,
    training: Training,
    is_dialogue: bool,
    classes: int = _CLASSES,
    both: bool = True,
    engines: Sequence[Engine] = ENGINES,
    codecs: tuple[str, str] = ("none", "none"),
    texts: int | None = None,
) -> Wish:
    """What these settings ask of a device. texts: how many it has, if that is known.

    ConfigError for a model whose sizes are not to be had here.
    """
    sizes = Sizes.of(configuration(model.name), is_dialogue)
    layers = sizes.layers if method.layers is None else min(method.layers, sizes.layers)
    choice = Choice(
        engine=engines[0],
        quantise=model.quantise,
        targets=method.targets or sizes.usual,
        rank=method.rank,
        layers=layers,
        batch=training.batch,
        micro=training.rows,
        length=training.length,
        checkpointing=training.checkpointing,
        both=both,
        moments=2 if training.optimiser == "adamw" else int(training.momentum > 0),
        up=codecs[0],
        down=codecs[1],
        kept=kept_below(sizes, training, texts),
    )
    return Wish(Planner(sizes, sizes.parameters, 0 if is_dialogue else classes, tuple(engines)), choice)


def wish_of(
    found: Experiment, engines: Sequence[Engine] = ENGINES, rows: Table | None = None, texts: int | None = None
) -> Wish:
    """What an experiment asks of each client's device. rows: its data, or a node's own; texts: as for ``wish``."""
    task, classes = found.data.task, len(found.data.classes)
    if rows is None and not found.fleet.own_data:
        rows = table(found.data)
    if rows is not None:
        task, classes = rows.task, len(rows.classes)
    both = found.settings["rule"]["name"] != "ffa"
    codecs = found.compression.up, found.compression.down
    return wish(found.model, found.adapter, found.training, task == "lm", classes, both, engines, codecs, texts)


def keep_within(
    found: Experiment,
    rows: Table,
    node_config: Mapping[str, bool | int | float | str],
    engine: str,
    texts: int | None = None,
) -> None:
    """Raise ConfigError where training takes more memory than a node's config says that there is.

    It says the cheapest change to the experiment that fits. A process with so much is taken to be ``sparing``. Of ranks
    that are chosen by memory the smallest is meant. texts: as for ``wish``.
    """
    if "memory" not in node_config:
        return
    try:
        budget = bytes_in(node_config["memory"], "memory")
    except ValueError as error:
        raise ConfigError(f"node-config: {error}") from None
    if rows.task == "image":
        return
    if isinstance(found.ranks, Memory):
        found = replace(found, adapter=replace(found.adapter, rank=min(found.ranks.levels)))
    here: Engine = "onnx" if engine == "onnx" else "torch"
    wished = wish_of(found, (here, *(x for x in ENGINES if x != here)), rows, texts)
    try:
        wished.check(max(budget - CARRIER[here], 0.0))
    except ConfigError as error:
        raise ConfigError(
            f"{error}; that budget is node-config's memory, {budget / 1e6:.0f} MB, less {CARRIER[here] / 1e6:.0f} MB "
            f"for Flower's client"
        ) from None


def link_of(rate: str | None, seconds: str | None) -> Link | None:
    """A link from such as "1Mbit/s" and "10min"; None where neither is given. ConfigError for one alone."""
    if rate is None and seconds is None:
        return None
    if rate is None or seconds is None:
        raise ConfigError("plan: got --link or --round alone; want both, such as --link 1Mbit/s --round 10min")
    return Link(_amount("--link", rate, _BITS, "1Mbit/s"), _amount("--round", seconds, _SECONDS, "10min"))


def budget_of(text: str) -> float:
    """Bytes, from such as "512MB". Raises ConfigError."""
    try:
        return bytes_in(text, "--budget")
    except ValueError as error:
        raise ConfigError(f"plan: {error}") from None


def lines(choice: Choice, wanted: Choice) -> str:
    """What to put into an experiment for a choice, as TOML."""
    sections: dict[str, list[str]] = {}
    for key, value in changes(choice, wanted):
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name} = {value}")
    return "\n\n".join("\n".join([f"[{name}]", *each]) for name, each in sections.items())


def configuration(name: str) -> Mapping[str, object]:
    """A model's configuration, as plain values, by its short name, its folder, or a hub id that has been downloaded."""
    here = Path(str(folder(name))) if name in SHORT_NAMES else Path(name).expanduser()
    file = here / "config.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json") if name.count("/") <= 1 and not here.is_absolute() else None
        if not isinstance(found, str):
            raise ConfigError(
                f"model.name: got {name!r}; want {', '.join(SHORT_NAMES)}, a Hugging Face folder, or a hub id that is "
                f"downloaded"
            )
        file = Path(found)
    try:
        config = json.loads(file.read_text(encoding="utf8"))
    except ValueError as error:
        raise ConfigError(f"model.name: {file} is no JSON: {error}") from error
    return dict(config)


def is_dialogue(name: str) -> bool:
    """Whether a model is for prompts and replies, by its configuration."""
    kinds = configuration(name).get("architectures")
    return isinstance(kinds, list) and any(str(x).endswith(("LMHeadModel", "ForCausalLM")) for x in kinds)


_BITS = {"bit/s": 1.0, "kbit/s": 1e3, "Mbit/s": 1e6, "Gbit/s": 1e9}
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def _amount(key: str, text: str, units: Mapping[str, float], example: str) -> float:
    for unit, size in sorted(units.items(), key=lambda x: -len(x[0])):
        number = text.strip().removesuffix(unit)
        if number != text.strip():
            try:
                found = float(number) * size
            except ValueError:
                break
            if 0 < found < float("inf"):
                return found
    raise ConfigError(f"plan: got {key} {text}; want a number and {', '.join(units)}, such as {example}")
