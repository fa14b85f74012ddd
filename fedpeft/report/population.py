"""The figure of who holds what: rows of each client, and how their labels are spread."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedpeft.report.drawing import SOFT, percent, sheet, whole_ticks
from fedpeft.report.history import History
from fedpeft.report.people import ClientData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

_MOST_LABELS = 30
_MOST_NAMES = 40
_LONGEST = 24


def population(h: History) -> str:
    """Each client's number of training rows, above its labels as a heat map; SVG, or "" if not recorded.

    Of very many clients, those that were recorded for all: a distribution of their rows, and their labels.
    """
    people = h.run.clients
    if not people:
        return ""
    names, counts = table(people)
    order = _order(counts, np.array([x.examples for x in people.values()]))
    sizes = np.array([x.examples for x in people.values()])[order]
    clients = [list(people)[i] for i in order]
    with sheet(2.6 if not names else 2.0 + 0.2 * max(len(names), 3)) as page:
        if names:
            rows = (1.0, 0.2 * max(len(names), 3))
            grid = page.figure.add_gridspec(2, 2, height_ratios=rows, width_ratios=(1, 0.018))
            top = page.figure.add_subplot(grid[0, 0])
            bottom = page.figure.add_subplot(grid[1, 0], sharex=None if h.run.population > len(people) else top)
            shares = counts[order] / np.maximum(counts[order].sum(axis=1, keepdims=True), 1)
            image = bottom.imshow(
                shares.T, cmap=_blues(), vmin=0, vmax=1, aspect="auto", interpolation="nearest", origin="upper"
            )
            bottom.set_yticks(range(len(names)), names)
            bottom.grid(visible=False)
            for side in ("left", "bottom"):
                bottom.spines[side].set_visible(False)
            if len(clients) <= 60:
                bottom.hlines(np.arange(len(names) - 1) + 0.5, -0.5, len(clients) - 0.5, color="white", lw=1)
                bottom.vlines(np.arange(len(clients) - 1) + 0.5, -0.5, len(names) - 0.5, color="white", lw=1)
            bottom.set_title("Share of each label among a client's rows")
            bar = page.figure.colorbar(image, cax=page.figure.add_subplot(grid[1, 1]), ticks=[0, 0.5, 1])
            bar.outline.set_visible(False)
            percent(bar.ax)
            if h.run.population <= len(people):
                top.tick_params(axis="x", length=0, labelbottom=False)
        else:
            top = bottom = page.figure.subplots()
        if h.run.population > len(people):
            _distribution(
                top, sizes, f"Training rows of a client, of {len(clients)} of the {h.run.population:,} clients"
            )
        else:
            top.bar(range(len(clients)), sizes, width=0.72 if len(clients) <= 100 else 1.0, color="#2f78b7")
            top.set_title("Training rows of each client")
            top.set_xlim(-0.5, len(clients) - 0.5)
        if bottom is top and h.run.population > len(people):
            bottom.set_xlabel("rows")
        elif len(clients) <= _MOST_NAMES:
            bottom.set_xticks(range(len(clients)), [str(n) for n in clients], fontsize=8.5 if len(clients) <= 25 else 7)
            bottom.set_xlabel("client")
        else:
            whole_ticks(bottom)
            bottom.set_xlabel(f"{len(clients)} clients, " + ("by their commonest label" if names else "largest first"))
        bottom.xaxis.label.set_color(SOFT)
    return page.svg


def _distribution(axes: "Axes", sizes: NDArray[np.int64], title: str) -> None:
    """How many clients have how many rows: a bar for each number, or for each of 40 ranges of them."""
    edges = np.arange(sizes.min(), sizes.max() + 2) - 0.5
    counts, edges = np.histogram(sizes, edges if len(edges) <= 41 else 40)
    axes.bar((edges[1:] + edges[:-1]) / 2, counts, width=0.92 * np.diff(edges), color="#2f78b7")
    axes.set_title(title)
    axes.set_xlim(edges[0] - 2, edges[-1] + 2)
    whole_ticks(axes)


def table(people: Mapping[int, ClientData]) -> tuple[list[str], NDArray[np.int64]]:
    """The labels, commonest first, and how many rows of each every client has: (clients, labels).

    Above 30 labels the rarest are counted together, last.
    """
    total: dict[str, int] = {}
    for person in people.values():
        for label, count in person.labels.items():
            total[label] = total.get(label, 0) + count
    labels = sorted(total, key=lambda x: (-total[x], x))
    counts = np.array([[p.labels.get(x, 0) for x in labels] for p in people.values()], dtype=np.int64)
    counts = counts.reshape(len(people), len(labels))
    names = [x if len(x) <= _LONGEST else f"{x[: _LONGEST - 1]}…" for x in labels]
    if len(labels) > _MOST_LABELS:
        kept = _MOST_LABELS - 1
        counts = np.hstack([counts[:, :kept], counts[:, kept:].sum(axis=1, keepdims=True)])
        names = [*names[:kept], f"{len(labels) - kept} rarer labels"]
    return names, counts


def _order(counts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Clients as they are numbered while they can be named; a crowd by commonest label and its share, or by size."""
    if len(sizes) <= _MOST_NAMES:
        return np.arange(len(sizes))
    if not counts.shape[1]:
        return np.argsort(-sizes, kind="stable")
    share = counts.max(axis=1) / np.maximum(counts.sum(axis=1), 1)
    return np.lexsort((-share, counts.argmax(axis=1)))


def _blues() -> "Colormap":
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("share", ["#f3f6fa", "#a9cbe8", "#3f86c6", "#0b4a86"])
