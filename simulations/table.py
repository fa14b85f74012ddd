"""The results of sweeps as Markdown: one table of means, one row a run with its command.

Run: python simulations/table.py COMMIT RUNS_FOLDER BASE.toml [RUNS_FOLDER BASE.toml ...]
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedpeft.config import experiment, load
from fedpeft.report import History, history, inexact

LEFT_OUT = {"run", "name", "versions"}
HEADS = (
    *("case", "base", "clients alone, mean", "federated", "all rows in one place"),
    *("worst client's own", "MB up", "inexact"),
)


def flat(settings: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """("section.key", value) pairs."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{key}.")
        elif above or key not in LEFT_OUT:
            yield f"{above}{key}", value


def command(run: History, base: Path) -> str:
    """What makes this run: the base file, and each setting that differs from it; a section of another name whole."""
    there, here = experiment(load(base)).settings, dict(run.run.settings)
    changes: list[str] = []
    for key, value in here.items():
        if isinstance(value, dict) and value.get("name") != there.get(key, {}).get("name"):
            inside = ", ".join(f"{k}={v!r}" for k, v in value.items())
            changes.append(f'"{key}={{{inside}}}"')
        else:
            known = dict(flat({key: there.get(key, {})}))
            changes += [f"{k}={v}" for k, v in flat({key: value}) if known.get(k) != v]
    words = [f"-c {x.replace('=True', '=true').replace('=False', '=false')}" for x in changes]
    return " ".join(["fedpeft run", f"simulations/{base.name}", *words])


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return "-"
    shown = f"{mean(values):.{digits}f}"
    return f"{shown} ± {stdev(values):.{digits}f}" if len(values) > 1 else shown


def central(run: History, name: str, key: str) -> float | None:
    """A figure on the central test set: of a baseline, or of the federation."""
    record = run.final if name == "federated" else run.baselines.get(name)
    return None if record is None or record.central is None else getattr(record.central, key)


def main(commit: str, *places: str) -> None:
    for folder, base in zip(places[::2], places[1::2], strict=True):
        runs = [history(x.parent) for x in sorted(Path(folder).glob("*/config.lock.toml"))]
        done = [x for x in runs if x.final is not None and x.baselines]
        cases: dict[str, list[History]] = defaultdict(list)
        for run in sorted(done, key=lambda x: (x.run.name, x.run.settings["seed"])):
            cases[run.run.name].append(run)
        key, digits = ("loss", 3) if done[0].run.task == "lm" else ("accuracy", 3)
        names = ("base", "local", "federated", "central-training")
        print(f"\n### {Path(base).stem}: {key} on the central test set\n")
        print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
        for case, members in cases.items():
            cells = [spread([v for x in members if (v := central(x, n, key)) is not None], digits) for n in names]
            worst = [
                (max if key == "loss" else min)(getattr(s, key) for s in x.final.test.clients.values())
                for x in members
                if x.final is not None and x.final.test is not None
            ]
            up = spread([x.bytes_up / 1e6 for x in members], 1)
            error = spread([v for x in members if (v := inexact(x)) is not None], 3)
            print(f"| {case} | {' | '.join(cells)} | {spread(worst, digits)} | {up} | {error} |")
        print("\n| case | seed | federated | seconds | commit | command |")
        print("|---|---|---|---|---|---|")
        for case, members in cases.items():
            for x in members:
                value = central(x, "federated", key)
                made = command(x, Path(base))
                print(f"| {case} | {x.run.settings['seed']} | {value:.4f} | {x.seconds:.0f} | {commit} | `{made}` |")


if __name__ == "__main__":
    main(*sys.argv[1:])
