"""Many runs from one file: cases x grid x seeds, each kept by the hash of its settings."""

import copy
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft.config import Settings, experiment, load, put
from fedpeft.config.schema import build
from fedpeft.errors import ConfigError, ProtocolError
from fedpeft.report import history
from fedpeft.run import View, simulate


@dataclass(frozen=True, slots=True)
class Search:
    """A key chosen on validation: each of ``values`` is run with ``seed``, the best goes on to all seeds.

    best: "accuracy" (highest) or "loss" (lowest), of the clients' validation rows after the last round. A
    value with which the run can't be finished, such as a learning rate that makes it diverge, is not chosen.
    """

    key: str
    values: tuple[float, ...]
    seed: int
    best: str = "accuracy"

    def __post_init__(self) -> None:
        if self.best not in ("accuracy", "loss"):
            raise ValueError(f"best: got {self.best!r}; want accuracy or loss")
        if not self.values:
            raise ValueError("values: got none; want at least one")


@dataclass(frozen=True, slots=True)
class Sweep:
    """base: the experiment file that all runs start from; cases: named changes to it; grid: keys and their
    values, every combination of which is run; large: changes for those who have the time.
    """

    name: str
    base: str
    seeds: tuple[int, ...] = (1, 2, 3)
    cases: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Any] = field(default_factory=dict)
    large: Mapping[str, Any] = field(default_factory=dict)
    choose: Search | None = None

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds: got none; want at least one")
        for key, values in self.grid.items():
            if isinstance(values, Mapping):
                raise ValueError(f'grid.{key}: got a section; want a list of values, such as "{key}.name" = [...]')
            if values == []:
                raise ValueError(f"grid.{key}: got an empty list; want at least one value")


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of a sweep: its name, and its changes as (key, value) pairs."""

    name: str
    changes: tuple[tuple[str, Any], ...]


def read(path: Path) -> Sweep:
    """The sweep in a TOML file. Raises ConfigError naming the key."""
    given = load(path)
    chosen = given.pop("choose", None)
    search = None if chosen is None else build(Search, chosen, "choose")
    sweep: Sweep = build(Sweep, given, path.name, {"choose": search})
    if not (path.parent / sweep.base).is_file():
        raise ConfigError(
            f"{path.name}.base: no such file: {path.parent / sweep.base}; want an experiment beside the sweep"
        )
    return sweep


def points(sweep: Sweep) -> list[Point]:
    """Every combination of case and grid values, seeds left out."""
    cases = [(name, tuple(_flat(changes))) for name, changes in sweep.cases.items()] or [("", ())]
    keys, values = list(sweep.grid), [x if isinstance(x, list) else [x] for x in sweep.grid.values()]
    found = []
    for name, changes in cases:
        for combination in itertools.product(*values):
            pairs = tuple(zip(keys, combination, strict=True))
            words = [name, *(f"{key.rpartition('.')[2]} {value}" for key, value in pairs)]
            found.append(Point(", ".join(w for w in words if w) or sweep.name, changes + pairs))
    return found


def run_all(sweep: Sweep, start: Settings, folder: Path, view: View, large: bool = False) -> dict[str, list[Path]]:
    """Run what is not there yet, in order; the run folders of each point, a seed each.

    A run that was cut off goes on from its checkpoint; one that is done is not run again.
    """
    if large:
        start = _changed(start, tuple(_flat(sweep.large)))
    done: dict[str, list[Path]] = {}
    for point in points(sweep):
        settings = _changed(start, point.changes)
        if sweep.choose:
            best = _search(sweep.choose, settings, folder, view, point.name)
            settings = _changed(settings, ((sweep.choose.key, best),))
        for seed in sweep.seeds:
            view.note(f"{point.name}, seed {seed}")
            done.setdefault(point.name, []).append(
                _one(_changed(settings, (("seed", seed), ("name", point.name))), folder, view)
            )
    return done


def key_of(settings: Settings) -> str:
    """Twelve hex digits of the hash of all settings but the run's names."""
    full = experiment(settings).settings
    kept = {k: v for k, v in full.items() if k not in ("name", "run")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _search(search: Search, settings: Settings, folder: Path, view: View, name: str) -> float:
    scores: dict[float, float] = {}
    for value in search.values:
        view.note(f"{name}: {search.key} = {value:g}, seed {search.seed}")
        changes = ((search.key, value), ("seed", search.seed), ("name", name))
        changed = _changed(settings, changes)
        if not experiment(changed).evaluation.clients:
            raise ConfigError("evaluation.clients: got false; a sweep that chooses needs the clients' validation rows")
        try:
            path = _one(changed, folder, view, baselines=False)
        except ProtocolError as error:
            view.note(f"{name}: {search.key} = {value:g} is left out: {error}")
            continue
        validation = history(path).rounds[-1].validation
        if validation is None or validation.accuracy is None or validation.loss is None:
            view.note(f"{name}: {search.key} = {value:g} is left out: it has no finite validation {search.best}")
            continue
        scores[value] = validation.accuracy if search.best == "accuracy" else -validation.loss
    if not scores:
        raise ConfigError(
            f"choose.values: {name}: no run with {search.key} = {', '.join(f'{v:g}' for v in search.values)} could be "
            f"judged on the clients' validation rows; want other values, or a larger split.validation"
        )
    best = max(scores, key=lambda v: scores[v])
    view.note(f"{name}: {search.key} = {best:g} has the best validation {search.best}")
    return best


def _one(settings: Settings, folder: Path, view: View, baselines: bool = True) -> Path:
    """The folder of one run, which is run, or gone on with, as far as it is not done."""
    path = folder / key_of(settings)
    simulate(experiment(settings), path, view, baselines=baselines)
    return path


def _changed(settings: Settings, changes: Sequence[tuple[str, Any]]) -> Settings:
    out = copy.deepcopy(settings)
    for key, value in changes:
        put(out, key, copy.deepcopy(value))
    return out


def _flat(changes: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """("section.key", value) pairs; a section that has a ``name`` replaces the base file's whole section."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and "name" not in value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
