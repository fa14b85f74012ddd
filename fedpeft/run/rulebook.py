"""The rules as a table: what each does, found out by trying it, and what it would send for a model."""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from fedpeft.config import Experiment, known_rules
from fedpeft.config.rules import seeded
from fedpeft.config.schema import Choice, choose, plain
from fedpeft.errors import ConfigError
from fedpeft.rules import ListRule, MeanRule, ServerState, Task
from fedpeft.run.workshop import without_data, workshop
from fedpeft.testing.facts import Facts, facts, numbers_down, numbers_up

ABOUT = "what it does"
HEADS = ("rule", ABOUT, "server sees", "exact", "low ranks", "sent", "up", "down")
LEGEND = (
    "up, down: numbers of one layer (d × k, rank R) and client in a round; what later passes send down is in them.",
    "exact: whether the server's change of ΔW is the weighted mean of the clients', with any ranks or with equal ones.",
    "low ranks: what a client of a low rank does with the directions that it can't train.",
    "server sees: the sum alone, or each client's answer; only with sums can the server be kept from seeing each.",
)
BYTES = (
    "up, down: numbers of one layer of the experiment's model at the server's rank, the mean of its layers; and "
    "bytes of one client in a round, dense leaves with them."
)
"""In place of the legend's first line where the table is of an experiment."""
_BEGINS = re.compile(r"\d+\. |- |Sources?: |Sent\b|[a-z_0-9]+: ")
_SOURCE = re.compile(r"arXiv:\d{4}\.\d{4,5}")


@dataclass(frozen=True, slots=True)
class Row:
    """One rule. up, down: formulas, or numbers and bytes for the model at hand; problem: why it can't be tried."""

    name: str
    about: str
    sources: tuple[str, ...]
    facts: Facts | None
    up: str
    down: str
    problem: str = ""

    def cells(self) -> tuple[str, ...]:
        """Its line of the table, in the order of ``HEADS``."""
        x = self.facts
        if x is None:
            return (self.name, self.about, self.problem, *[""] * (len(HEADS) - 3))
        passes = f", {x.passes} passes" if x.passes > 1 else ""
        sees = ("sum" if x.sum_only else "each") + passes
        return (self.name, self.about, sees, x.exact, x.rest, x.sent, self.up, self.down)


def rulebook(found: Experiment | None = None) -> list[Row]:
    """Every rule that an experiment can name, with other packages' too, each with its default settings.

    found: an experiment for whose model, adapter and channel to count bytes; its base model is loaded.
    Numbers of rounds that differ are those of the last of the first few, or the mean of two that take turns.
    """
    start = None if found is None else _start(found)
    rows = []
    for name, choice in sorted(known_rules().items()):
        about, sources = describe(choice)
        try:
            rule = make(name)
        except ConfigError as error:
            rows.append(Row(name, about, sources, None, "", "", str(error)))
            continue
        known = facts(rule)
        up, down = known.up, known.down
        if start is not None and found is not None:
            up, down = _sized(rule, start, found.channel.number_bytes)
            down += " + tail" if known.down.endswith("tail") else ""
        rows.append(Row(name, about, sources, known, up, down))
    return rows


def make(name: str) -> MeanRule | ListRule:
    """The rule of this name with its default settings. ConfigError for one that there isn't, or that needs settings."""
    choices = known_rules()
    rule, _ = choose("rule", choices, seeded({"name": name}, choices, name, 0), name)
    if not isinstance(rule, MeanRule | ListRule):
        raise ConfigError(f"rule.name: {name} is a {type(rule).__name__}; want a MeanRule or a ListRule")
    return rule


def describe(choice: Choice) -> tuple[str, tuple[str, ...]]:
    """One line on a rule, and the papers that it names."""
    own = inspect.getdoc(choice.cls) or ""
    about = choice.about or own.splitlines()[0] if own or choice.about else "Says nothing of itself."
    module = sys.modules[choice.cls.__module__].__doc__ or ""
    sources = next((x for x in map(_SOURCE.findall, (choice.about, own, module)) if x), [])
    return _SOURCE.sub("", about).replace(" ()", ""), tuple(dict.fromkeys(sources))


def page(name: str) -> str:
    """All on one rule: what its file and its class say, its facts, and its settings with their defaults."""
    choices = known_rules()
    if name not in choices:
        raise ConfigError(f"rule.name: got {name!r}; want one of {', '.join(sorted(choices))}")
    choice = choices[name]
    about, _ = describe(choice)
    module, own = sys.modules[choice.cls.__module__].__doc__ or "", inspect.getdoc(choice.cls) or ""
    told = own if choice.about else "\n".join(own.splitlines()[1:])  # its first line is what it is about
    lines = [f"{name}: {about}"]
    for text in (inspect.cleandoc(module), told.strip()):
        lines += ["", *_paragraphs(text)] if text else []
    lines += ["", "[rule]", f'name = "{name}"', *_settings(choice)]
    try:
        known = facts(make(name))
    except ConfigError as error:
        return "\n".join([*lines, "", str(error)])
    for head, value in zip(HEADS[2:], Row(name, about, (), known, known.up, known.down).cells()[2:], strict=True):
        lines.append(f"# {head}: {value}")
    return "\n".join(lines)


def _paragraphs(text: str) -> list[str]:
    """A docstring with a line for each paragraph, step or source, which a terminal breaks where it ends."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip() and lines and lines[-1] and not _BEGINS.match(line):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line.strip())
    return lines


def markdown(rows: Sequence[Row]) -> str:
    """The table for a page, with the papers."""
    head = (*HEADS, "source")
    body = [(f"`{x.name}`", *x.cells()[1:], ", ".join(_link(s) for s in x.sources)) for x in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines) + "\n"


def _link(source: str) -> str:
    return f"[{source}](https://arxiv.org/abs/{source.removeprefix('arXiv:')})"


def _settings(choice: Choice) -> list[str]:
    out = []
    for f in fields(choice.cls):
        if not f.init or f.name in choice.settled:
            continue
        if f.default is MISSING and f.default_factory is MISSING:
            out.append(
                f"# {f.name} = …  # the experiment's seed" if f.name == "seed" else f"{f.name} = …  # no default"
            )
        else:
            value: Any = f.default if f.default_factory is MISSING else f.default_factory()
            out.append(f"# {f.name} is not set" if value is None else f"{f.name} = {_toml(plain(value))}")
    return out


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _start(found: Experiment) -> ServerState:
    here = without_data(found) if found.fleet.own_data else workshop(found.settings_json)
    start = here.trainer.start()
    return ServerState(Task(start.spec), start)


def _sized(rule: MeanRule | ListRule, start: ServerState, width: int) -> tuple[str, str]:
    """Up and down: numbers a layer, and bytes of all. width: bytes of a number on the way up."""
    bare = replace(start.adapter, dense={})
    layers = ServerState(Task(bare.spec), bare)
    count = max(1, len(bare.layers))
    told = []
    for part, size in ((_up, width), (_down, 4)):
        told.append(f"{part(rule, layers) // count:,}, {_bytes(size * part(rule, start))}")
    return told[0], told[1]


def _up(rule: MeanRule | ListRule, state: ServerState) -> int:
    each = numbers_up(rule, state.task)
    return (each[-1] + each[-2]) // 2


def _down(rule: MeanRule | ListRule, state: ServerState) -> int:
    return numbers_down(rule, state)


def _bytes(count: int) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
