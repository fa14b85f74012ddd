"""A sweep over rules, codecs or runtimes as a Markdown table, and accuracy against bytes as a figure.

Run: python simulations/rules_table.py SWEEP.toml RUNS_FOLDER [FIGURE.svg]

A case counts with the value of the searched key for which all seeds are there, and each figure is its mean and sample
standard deviation over them; beside fedit, or the first case where there is none: the difference between runs of one
seed. Bytes are of the whole run:
training's messages, both ways. The worst tenth is the mean accuracy of the tenth of the clients, rounded up, that are
worst off, on their own test rows.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt

from fedpeft.report import History, history, inexact
from fedpeft.sweep import Sweep, points, read

HEADS = ("case", "lr", "accuracy", "beside {}", "clients' own rows", "worst tenth", "MB up", "MB down", "inexact %")


def value(run: History, key: str) -> Any:
    """A setting, by its path."""
    found: Any = run.run.settings
    for name in key.split("."):
        found = found[name]
    return found


def chosen(sweep: Sweep, folder: Path) -> dict[str, list[History]]:
    """The runs of each case of the sweep that is done, a seed each."""
    cases: dict[str, dict[Any, list[History]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*/config.lock.toml")):
        run = history(path.parent)
        if run.final is not None:
            cases[run.run.name][value(run, sweep.choose.key) if sweep.choose else None].append(run)
    out: dict[str, list[History]] = {}
    for point in points(sweep):
        tried = cases[point.name]
        runs = tried[best(sweep, tried)] if tried else []
        if len(runs) == len(sweep.seeds):
            out[point.name] = sorted(runs, key=lambda x: value(x, "seed"))
    return out


def best(sweep: Sweep, tried: Mapping[Any, Sequence[History]]) -> Any:
    """The value with the best validation accuracy in the run of the seed that chooses; the only one, where none was
    searched for."""
    search = sweep.choose
    if search is None:
        return next(iter(tried))

    def score(at: Any) -> float:
        each = [x.rounds[-1].validation for x in tried[at] if value(x, "seed") == search.seed]
        return max((x.accuracy or 0.0 for x in each if x is not None), default=-1.0)

    return max(sorted(tried), key=score)


def worst(run: History) -> float | None:
    """The mean accuracy of the worst tenth of the clients; None where clients were not evaluated."""
    assert run.final is not None
    if run.final.test is None:
        return None
    each = sorted(x.accuracy for x in run.final.test.clients.values() if x.accuracy is not None)
    return mean(each[: ceil(len(each) / 10)])


def figures(run: History) -> tuple[float | None, ...]:
    """What the table shows of one run."""
    final = run.final
    assert final is not None
    central = None if final.central is None else final.central.accuracy
    error = inexact(run)
    return (
        central,
        None if final.test is None else final.test.accuracy,
        worst(run),
        run.bytes_up / 1e6,
        run.bytes_down / 1e6,
        None if error is None else 100 * error,
    )


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and sample standard deviation; a dash where there is nothing."""
    here = [x for x in values if x is not None]
    if not here:
        return "-"
    if max(here) < 0.5 * 10**-digits and max(here) > 0:
        return f"{mean(here):.0e}"
    shown = f"{mean(here):.{digits}f}"
    return f"{shown} ± {stdev(here):.{digits}f}" if len(here) > 1 and digits > 1 else shown


def beside(mine: Sequence[float | None], other: Sequence[float | None]) -> str:
    """The mean and standard deviation of the differences, pair by pair."""
    pairs = [x - y for x, y in zip(mine, other, strict=False) if x is not None and y is not None]
    return f"{mean(pairs):+.3f} ± {stdev(pairs):.3f}" if len(pairs) > 1 else "-"


def main(file: str, folder: str, figure: str = "") -> None:
    sweep = read(Path(file))
    found = chosen(sweep, Path(folder))
    first = "fedit" if "fedit" in found else next(iter(found))
    heads = [x.format(first) for x in HEADS if sweep.choose or x != "lr"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for case, runs in found.items():
        columns = list(zip(*(figures(x) for x in runs), strict=True))
        cells = [spread(x, digits) for x, digits in zip(columns, (3, 3, 3, 1, 1, 1), strict=True)]
        cells.insert(1, beside(columns[0], [figures(x)[0] for x in found[first]]))
        rate = [f"{value(runs[0], sweep.choose.key):g}"] if sweep.choose else []
        print(f"| {' | '.join([case, *rate, *cells])} |")
    if figure:
        draw(found, Path(figure), sweep.name)


def draw(found: dict[str, list[History]], file: Path, title: str) -> None:
    """Accuracy on the central test set against all bytes of a run, a point a case."""
    figure, ax = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for i, (case, runs) in enumerate(found.items()):
        scores = [s for x in runs if (s := figures(x)[0]) is not None]
        if len(scores) < 2:
            continue
        size = mean((x.bytes_up + x.bytes_down) / 1e6 for x in runs)
        style = {"color": f"C{i % 10}", "marker": "o^sDv"[i // 10]}
        ax.errorbar([size], [mean(scores)], [stdev(scores)], capsize=2, linestyle="", label=case, **style)
        ax.annotate(case, (size, mean(scores)), xytext=(4, 3), textcoords="offset points", fontsize=6)
    ax.set(
        xscale="log", xlabel="MB up and down, all clients and rounds", ylabel="accuracy, central test set", title=title
    )
    ax.legend(fontsize=6, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
