"""Figures of what was learnt: curves, clients' spread by round, each client against training alone."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedpeft.report.drawing import BASE, CENTRAL, DOWN, FEDERATED, LOCAL, SOFT, end_labels, percent, sheet, whole_ticks
from fedpeft.report.history import History
from fedpeft.report.records import Score, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = NDArray[np.float64]

BASELINES = (("base", "base model", BASE), ("local", "local only", LOCAL), ("central-training", "centralised", CENTRAL))


def curves(h: History) -> str:
    """Accuracy, and loss (for a language model perplexity), by round, with the baselines as level lines; SVG."""
    lm = h.run.task == "lm"
    with sheet(3.15) as page:
        left, right = page.figure.subplots(1, 2)
        _curve(left, h, "accuracy")
        left.set_title("Next-token accuracy" if lm else "Accuracy")
        percent(left)
        _curve(right, h, "perplexity" if lm else "loss")
        right.set_title("Perplexity (e to the loss per token)" if lm else "Loss")
    return page.svg


def spread(h: History) -> str:
    """The clients' validation accuracy by round: median, middle half, extremes; SVG, or "" below two clients."""
    rounds = [x for x in h.rounds if x.validation is not None and _values(x.validation.clients).size]
    if max((len(x.validation.clients) for x in rounds if x.validation), default=0) < 2:
        return ""
    t = np.array([x.round for x in rounds])
    low, first, middle, third, high = np.array(
        [np.percentile(_values(x.validation.clients if x.validation else {}), (0, 25, 50, 75, 100)) for x in rounds]
    ).T
    with sheet(3.0) as page:
        axes = page.figure.subplots()
        axes.fill_between(t, low, high, color=FEDERATED, alpha=0.10, lw=0)
        axes.fill_between(t, first, third, color=FEDERATED, alpha=0.28, lw=0)
        axes.plot(t, middle, color=FEDERATED, marker="o", ms=_mark(t))
        if len(t) == 1:  # a band needs two rounds to be seen
            axes.vlines(t, low, high, color=FEDERATED, alpha=0.25, lw=2)
            axes.vlines(t, first, third, color=FEDERATED, alpha=0.5, lw=7)
        percent(axes)
        _by_round(axes, t, 0)
        named: list[tuple[float, str, str]] = [(float(middle[-1]), "median client", FEDERATED)]
        if high[-1] > low[-1]:
            named += [(float(high[-1]), "best", SOFT), (float(third[-1]), "upper quartile", SOFT)]
            named += [(float(first[-1]), "lower quartile", SOFT), (float(low[-1]), "worst", SOFT)]
        end_labels(axes, named)
    return page.svg


def clients(h: History) -> str:
    """Each client's accuracy on its own test set, federated against local only; SVG, or "" if none was recorded."""
    mine = last_clients(h)
    alone = h.baselines["local"].clients if "local" in h.baselines else {}
    names = [n for n in mine if mine[n].accuracy is not None]
    both = [n for n in names if n in alone and alone[n].accuracy is not None]
    if not names:
        return ""
    if both and len(both) <= 40:
        return _pairs(both, mine, alone)
    return _scatter(both, mine, alone) if both else _ranked(names, mine)


def last_clients(h: History) -> Mapping[int, Score]:
    """Each client's score at the end: on its test set, or, while the run is not over, its last validation."""
    if h.final is not None and h.final.test is not None:
        return h.final.test.clients
    return next((x.validation.clients for x in reversed(h.rounds) if x.validation is not None), {})


def _curve(axes: "Axes", h: History, what: str) -> None:
    central = [x.central for x in h.rounds]
    lines = (
        ("central test", FEDERATED, FEDERATED, 2.0, "-", "o", central),
        ("clients' validation", DOWN, "#2b7db0", 1.4, "-", "o", [_pool(x.validation) for x in h.rounds]),
        ("in training", "#9aa3af", SOFT, 1.4, ":", ".", [x.train for x in h.rounds]),
    )
    named: list[tuple[float, str, str]] = []
    t = np.array([0, *(x.round for x in h.rounds)])
    start = h.baselines["base"].central if "base" in h.baselines and any(central) else None  # before any round
    for label, colour, ink, width, style, marker, scores in lines:
        y = np.array([_value(start if scores is central else None, what), *(_value(x, what) for x in scores)])
        seen = np.isfinite(y)
        if seen.any():
            axes.plot(t[seen], y[seen], style, color=colour, lw=width, marker=marker, ms=_mark(t))
            named.append((float(y[seen][-1]), label, ink))
    for name, label, colour in BASELINES:
        level = _value(h.baselines[name].central, what) if name in h.baselines else np.nan
        if np.isfinite(level):
            axes.axhline(level, color=colour, lw=1.2, ls=(0, (5, 3)))
            named.append((level, label, colour))
    if what == "perplexity" and named and max(y for y, _, _ in named) > 20 * min(y for y, _, _ in named):
        axes.set_yscale("log")
    _by_round(axes, t, 0)
    end_labels(axes, named)


def _pairs(names: Sequence[int], mine: Mapping[int, Score], alone: Mapping[int, Score]) -> str:
    order = sorted(names, key=lambda n: (mine[n].accuracy or 0.0, n))
    x = np.arange(len(order))
    federated, local = _values({n: mine[n] for n in order}), _values({n: alone[n] for n in order})
    colours = np.where(federated >= local, FEDERATED, LOCAL).tolist()
    with sheet(3.1) as page:
        axes = page.figure.subplots()
        axes.vlines(x, local, federated, color=colours, alpha=0.35, lw=2.4)
        axes.plot(x, local, "o", color="white", mec=LOCAL, mew=1.6, ms=6)
        axes.plot(x, federated, "o", color=FEDERATED, ms=6.5)
        axes.set_xticks(x, [str(n) for n in order], fontsize=8.5 if len(order) <= 25 else 7)
        axes.set_xlim(-0.7, len(order) - 0.3)
        axes.set_xlabel("client, by federated accuracy")
        axes.set_title("Accuracy on each client's own test set")
        percent(axes)
        end_labels(axes, [(float(federated[-1]), "federated", FEDERATED), (float(local[-1]), "local only", LOCAL)])
    return page.svg


def _scatter(names: Sequence[int], mine: Mapping[int, Score], alone: Mapping[int, Score]) -> str:
    federated, local = _values({n: mine[n] for n in names}), _values({n: alone[n] for n in names})
    gain = federated - local
    with sheet(3.9) as page:
        left, right = page.figure.subplots(1, 2, width_ratios=(1, 1))
        low, high = min(federated.min(), local.min()), max(federated.max(), local.max())
        pad = 0.04 * (high - low) + 0.005
        left.plot([low - pad, high + pad], [low - pad, high + pad], color=SOFT, lw=1, ls=(0, (5, 3)))
        left.plot(local, federated, "o", color=FEDERATED, alpha=max(0.25, 0.8 - len(names) / 1500), ms=3.6, mew=0)
        left.set(xlim=(low - pad, high + pad), ylim=(low - pad, high + pad), aspect="equal")
        left.grid(axis="x")
        left.set_xlabel("accuracy, local only")
        left.set_title("Federated accuracy, one dot a client")
        left.locator_params(nbins=5)
        paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
        named = {"transform": left.transAxes, "fontsize": 8.5, "bbox": paper}
        left.text(0.03, 0.97, "better federated", va="top", color=FEDERATED, **named)
        left.text(0.97, 0.03, "better alone", ha="right", color=LOCAL, **named)
        percent(left)
        percent(left, "x")
        edges = np.histogram_bin_edges(gain, bins=min(30, max(8, len(names) // 8)))
        counts, _ = np.histogram(gain, edges)
        centres = (edges[1:] + edges[:-1]) / 2
        right.bar(
            100 * centres,
            counts,
            width=100 * np.diff(edges) * 0.92,
            color=np.where(centres >= 0, FEDERATED, LOCAL).tolist(),
            alpha=0.8,
        )
        right.axvline(0, color=SOFT, lw=1, ls=(0, (5, 3)))
        right.set_xlabel("gain over local only, points")
        right.set_title("Number of clients by gain")
    return page.svg


def _ranked(names: Sequence[int], mine: Mapping[int, Score]) -> str:
    values = np.sort(_values({n: mine[n] for n in names}))
    with sheet(2.8) as page:
        axes = page.figure.subplots()
        size = 6 if len(values) <= 60 else 2.5
        axes.plot(np.arange(1, len(values) + 1), values, "o", color=FEDERATED, ms=size, mew=0)
        axes.axhline(float(values.mean()), color=SOFT, lw=1.2, ls=(0, (5, 3)))
        axes.set_xlabel("client, by accuracy")
        axes.set_title("Accuracy of each client")
        whole_ticks(axes)
        percent(axes)
        end_labels(axes, [(float(values.mean()), "mean client", SOFT)])
    return page.svg


def _by_round(axes: "Axes", rounds: Line | NDArray[np.int64], start: int) -> None:
    last = max(int(rounds.max()) if len(rounds) else 1, start + 1)
    axes.set_xlim(start, last + 0.012 * (last - start))
    axes.margins(y=0.08)
    axes.set_xlabel("round")
    whole_ticks(axes)


def _mark(rounds: Sequence[int] | NDArray[np.generic]) -> float:
    """Size of a point: none where points would run into one another."""
    return 4.0 if len(rounds) <= 30 else 0.0


def _pool(x: Scores | None) -> Score | None:
    return None if x is None else Score(x.loss, x.accuracy)


def _value(score: Score | None, what: str) -> float:
    """The number to draw; NaN where there is none."""
    if score is None:
        return np.nan
    x = score.accuracy if what == "accuracy" else score.loss
    if x is None:
        return np.nan
    return float(np.exp(min(x, 50.0))) if what == "perplexity" else x


def _values(scores: Mapping[int, Score]) -> Line:
    return np.array([x.accuracy for x in scores.values() if x.accuracy is not None], dtype=np.float64)
