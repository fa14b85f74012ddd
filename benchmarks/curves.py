"""Loss curves of the demo by the loop and by the cohort engine, in one picture.  Run: python benchmarks/curves.py"""

import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import HERE, save
from typing_extensions import override

from fedpeft.config import experiment
from fedpeft.report import RoundRecord, history
from fedpeft.run import Lines, simulate

DEMO = tomllib.loads((HERE.parent / "fedpeft" / "demo.toml").read_text(encoding="utf8"))
RUNS = {
    "loop": ({"engine": "loop"}, "fp32"),
    "cohort, fp32": ({"engine": "cohort"}, "fp32"),
    "cohort, bf16": ({"engine": "cohort"}, "bf16"),
}


class Silent(Lines):
    """A view that says nothing of rounds."""

    @override
    def round(self, record: RoundRecord, rounds: int) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Curve:
    """By round: the mean loss of the cohort's training, and loss and accuracy on the central test set after it."""

    name: str
    training: Sequence[float]
    loss: Sequence[float]
    accuracy: Sequence[float]


def curve(name: str) -> Curve:
    """The demo as it is, run by one engine; evaluated on the central rows after every round, and on no others."""
    simulation, precision = RUNS[name]
    settings = {
        **DEMO,
        "simulation": simulation,
        "training": {**DEMO["training"], "precision": precision},
        "evaluation": {"every": 1, "clients": False},
        "baselines": {},
    }
    with tempfile.TemporaryDirectory() as place:
        path = simulate(experiment(settings), Path(place) / "run", Silent())
        rounds = history(path).rounds
    scores = [x.central for x in rounds]
    found = [(x.train.loss, y.loss, y.accuracy) for x, y in zip(rounds, scores, strict=True) if x.train and y]
    assert len(found) == DEMO["rounds"]
    return Curve(name, *zip(*found, strict=True))


def draw(curves: Sequence[Curve], path: Path) -> None:
    """All curves, one over the other, and beneath them how far each is from the first."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "curves", "font.size": 10, "axes.spines.top": False}
    matplotlib.rcParams |= {"axes.spines.right": False, "svg.fonttype": "none", "font.family": "sans-serif"}
    from matplotlib import pyplot

    looks = [("#9db7cf", "-", 7.0), ("#0b5fa5", "-", 2.0), ("#c2570c", "--", 1.6)]
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 5), sharex=True, height_ratios=(3, 2), layout="constrained")
    first = curves[0]
    number = range(1, len(first.training) + 1)
    for one, (colour, dash, width) in zip(curves, looks, strict=True):
        for column, what in enumerate(("training", "loss")):
            values, base = getattr(one, what), getattr(first, what)
            axes[0, column].plot(number, values, dash, color=colour, lw=width, label=one.name)
            if one is not first:
                apart = [max(abs(x - y), 1e-9) for x, y in zip(values, base, strict=True)]
                axes[1, column].plot(number, apart, dash, color=colour, lw=width, marker="o", ms=3)
    for column, title in enumerate(("Mean training loss", "Loss on the central test set")):
        axes[0, column].set_title(title, loc="left")
        axes[0, column].set_ylim(bottom=0)
        axes[1, column].set_yscale("log")
        axes[1, column].set_xlabel("round")
        axes[1, column].xaxis.get_major_locator().set_params(integer=True)
    axes[1, 0].set_ylabel("distance from the loop")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Three runs of the demo, the picture, and each engine's largest distance from the loop."""
    curves = [curve(name) for name in RUNS]
    (HERE / "results").mkdir(exist_ok=True)
    draw(curves, HERE / "results" / "curves.svg")
    first = curves[0]
    rows = []
    for one in curves:
        row: dict[str, object] = {
            "engine": one.name,
            "last training loss": one.training[-1],
            "last central loss": one.loss[-1],
            "last central accuracy": one.accuracy[-1],
        }
        if one is not first:
            row["training loss differs by at most"] = _apart(one.training, first.training)
            row["central loss differs by at most"] = _apart(one.loss, first.loss)
        rows.append(row)
    each = [
        {"round": i + 1} | {f"{what}, {c.name}": getattr(c, what)[i] for c in curves for what in ("training", "loss")}
        for i in range(len(first.training))
    ]
    save("curves", rows, {"each round": each})


def _apart(x: Sequence[float], y: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(x, y, strict=True))


if __name__ == "__main__":
    main()
