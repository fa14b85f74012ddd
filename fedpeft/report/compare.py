"""Runs side by side: what differs between them, what came of it, seeds taken together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedpeft.report.arrival import levels, mean_arrival
from fedpeft.report.history import History, history
from fedpeft.report.inexact import inexact
from fedpeft.report.plots import last_clients
from fedpeft.report.recipe import shown
from fedpeft.report.records import Score
from fedpeft.report.simulated import simulated_seconds
from fedpeft.report.strict import Json
from fedpeft.report.summary import last_central, setting, standing, tuned

MEASURES = (
    *("accuracy", "loss", "mean", "worst", "tuned", "tuned_worst", "base", "local", "central-training"),
    *("inexact", "bytes_up", "bytes_down", "seconds", "simulated"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One run. differs: its values of the settings that are not the same in all runs; accuracy, loss: on the central
    test set; mean, worst: over the clients on their own test sets (see ``Standing``); baselines: accuracy of
    "base", "local", "central-training" on the central test set; bytes: of all clients and rounds;
    simulated: seconds of virtual time; inexact: the relative error of the server's change, mean over the rounds;
    tuned, tuned_worst: as mean and worst, once each client has trained for itself after the run.
    """

    path: Path
    name: str
    rule: str
    seed: str
    differs: Mapping[str, str]
    rounds: int
    is_complete: bool
    accuracy: float | None
    loss: float | None
    mean: float | None
    worst: float | None
    baselines: Mapping[str, float]
    bytes_up: int
    bytes_down: int
    seconds: float
    simulated: float | None = None
    inexact: float | None = None
    tuned: float | None = None
    tuned_worst: float | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample standard deviation (n − 1; None for one run) over the n runs that have the measure."""

    mean: float
    deviation: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Group:
    """Runs whose settings are the same but for the seed. label: the runs' name if no other group has it, or else
    what differs; measures: by the names in MEASURES, where any run has it.
    """

    label: str
    differs: Mapping[str, str]
    rows: tuple[Row, ...]
    measures: Mapping[str, Spread]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs and groups in the order given. keys: the settings that differ, dotted; shared: the rest."""

    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    keys: tuple[str, ...]
    shared: Mapping[str, str]
    histories: tuple[History, ...]

    def members(self, group: Group) -> list[History]:
        """The histories of a group's runs."""
        return [h for h, row in zip(self.histories, self.rows, strict=True) if row in group.rows]


def compare(folders: Sequence[Path]) -> Comparison:
    """The runs in these folders, side by side. Raises ValueError for none or for one twice, DataError for no run."""
    if not folders:
        raise ValueError("folders: got none; want at least one run")
    if len({x.resolve() for x in folders}) < len(folders):
        raise ValueError("folders: one is named twice; name each run once")
    found = tuple(history(x) for x in folders)
    flat = [_flat(h.run.settings) for h in found]
    every = list(dict.fromkeys(key for x in flat for key in x))
    differing = tuple(k for k in every if len({x.get(k, "–") for x in flat}) > 1 and not _is_aside(k))
    differing = tuple(k for k in differing if not _follows(k, differing, flat))
    rows = tuple(_row(h, {k: x.get(k, "–") for k in differing}) for h, x in zip(found, flat, strict=True))
    together: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        together.setdefault(tuple(row.differs.values()), []).append(row)
    names = short(differing)
    called = [{row.name for row in members} for members in together.values()]
    own = [x for x in called if len(x) == 1 and called.count(x) == 1]  # names that stand for one group each
    groups = tuple(_group(members, names, len(own) == len(called) > 1) for members in together.values())
    first = flat[0]
    shared = {k: first[k] for k in every if all(x.get(k) == first.get(k) for x in flat) and not _is_aside(k)}
    return Comparison(rows, groups, differing, shared, found)


def short(keys: Sequence[str]) -> dict[str, str]:
    """What to call settings: "rule" for rule.name, "lr" for training.lr, the whole key where that is not plain."""
    names = {k: k.removesuffix(".name") if k.endswith(".name") else k.rsplit(".", 1)[-1] for k in keys}
    taken = list(names.values())
    return {k: name if taken.count(name) == 1 else k for k, name in names.items()}


def record(c: Comparison) -> Json:
    """The comparison as JSON: keys, shared settings, groups with mean, deviation and n, and the single runs."""
    return {
        "schema": 1,
        "differs": c.keys,
        "shared": c.shared,
        "groups": [
            {
                "label": g.label,
                "settings": g.differs,
                "runs": [x.path.name for x in g.rows],
                "reached": [
                    {"accuracy": level, "rounds": r, "simulated": t} for level, (r, t) in arrivals(c, g).items()
                ],
                "measures": {k: {"mean": s.mean, "deviation": s.deviation, "n": s.n} for k, s in g.measures.items()},
            }
            for g in c.groups
        ],
        "runs": [_told(x) for x in c.rows],
    }


def arrivals(c: Comparison, group: Group) -> dict[float, tuple[float, float]]:
    """When a group reaches each accuracy that is worth asking for: mean rounds and simulated seconds, where all do."""
    central = is_central(c)
    found = {x: mean_arrival(c.members(group), x, central) for x in levels(c.histories, central)}
    return {level: x for level, x in found.items() if x is not None}


def is_central(c: Comparison) -> bool:
    """Whether all runs have accuracies on the central test set; they are compared on the clients' rows if not."""
    return all(any(x.central is not None and x.central.accuracy is not None for x in h.rounds) for h in c.histories)


def measure(row: Row, name: str) -> float | int | None:
    """One of MEASURES of a run."""
    values: dict[str, float | int | None] = {
        "accuracy": row.accuracy,
        "loss": row.loss,
        "mean": row.mean,
        "worst": row.worst,
        "bytes_up": row.bytes_up,
        "bytes_down": row.bytes_down,
        "seconds": row.seconds,
        "simulated": row.simulated,
        "inexact": row.inexact,
        "tuned": row.tuned,
        "tuned_worst": row.tuned_worst,
    }
    return values[name] if name in values else row.baselines.get(name)


def _told(x: Row) -> dict[str, Json]:
    facts: dict[str, Json] = {"run": x.path.name, "name": x.name, "rule": x.rule, "seed": x.seed}
    facts |= {"settings": x.differs, "rounds": x.rounds, "complete": x.is_complete}
    return facts | {name: measure(x, name) for name in MEASURES}


def _row(h: History, differs: Mapping[str, str]) -> Row:
    central = last_central(h) or Score()
    mine = standing("federated", "", central, last_clients(h))
    own = next(iter(tuned(h)), standing("tuned", "", None, {}))
    return Row(
        path=h.path.resolve(),
        name=h.run.name,
        rule=setting(h, "rule.name"),
        seed=setting(h, "seed"),
        differs=differs,
        rounds=len(h.rounds),
        is_complete=h.final is not None,
        accuracy=central.accuracy,
        loss=central.loss,
        mean=mine.mean,
        worst=mine.worst,
        baselines={
            n: x.central.accuracy
            for n, x in h.baselines.items()
            if x.central is not None and x.central.accuracy is not None
        },
        bytes_up=h.bytes_up,
        bytes_down=h.bytes_down,
        seconds=h.seconds,
        simulated=simulated_seconds(h),
        inexact=inexact(h),
        tuned=own.mean,
        tuned_worst=own.worst,
    )


def _group(rows: Sequence[Row], names: Mapping[str, str], is_named: bool) -> Group:
    differs = rows[0].differs
    kinds = [v for k, v in differs.items() if k.endswith(".name")]
    label = ", ".join([*kinds, *(f"{names[k]} {v}" for k, v in differs.items() if not k.endswith(".name"))])
    found = {name: [x for row in rows if (x := measure(row, name)) is not None] for name in MEASURES}
    measures = {name: _spread(values) for name, values in found.items() if values}
    return Group(rows[0].name if is_named or not label else label, differs, tuple(rows), measures)


def _spread(values: Sequence[float]) -> Spread:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), deviation, len(values))


def _is_aside(key: str) -> bool:
    """Whether a setting leaves what is run the same: names, seeds, and what else is measured."""
    aside = key in ("name", "run", "evaluation.exactness") or key.startswith("baselines.")
    return aside or key.rsplit(".", 1)[-1] == "seed"


def _follows(key: str, differing: Sequence[str], flat: Sequence[Mapping[str, str]]) -> bool:
    """Whether a setting is the same wherever its section has the same name: the name then says it all."""
    name = f"{key.rpartition('.')[0]}.name"
    if name == key or name not in differing:
        return False
    return len({(x.get(name), x.get(key)) for x in flat}) == len({x.get(name) for x in flat})


def _flat(settings: Mapping[str, Json], prefix: str = "") -> dict[str, str]:
    """Dotted keys and values as text."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": shown(value)}
    return flat
