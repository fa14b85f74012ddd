"""Figures of what it cost: bytes by round, and who worked when."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.report.drawing import DOWN, FEDERATED, SOFT, end_labels, sheet, whole_ticks
from fedpeft.report.history import History

_MOST_ROWS = 40


def traffic(h: History) -> str:
    """Bytes sent up and down by all clients together, summed over the rounds; SVG, or "" before the first round."""
    if not h.rounds:
        return ""
    t = np.array([0, *(x.round for x in h.rounds)])
    up = np.cumsum([0, *(x.bytes_up for x in h.rounds)])
    down = np.cumsum([0, *(x.bytes_down for x in h.rounds)])
    size, unit = scale_of(float(max(up[-1], down[-1])))
    with sheet(2.7) as page:
        axes = page.figure.subplots()
        axes.plot(t, down / size, color=DOWN, lw=3.4)  # the wider of two lines that may lie on one another
        axes.plot(t, up / size, color=FEDERATED, lw=1.5)
        axes.set_xlim(0, t[-1])
        axes.set_ylim(0)
        axes.set_xlabel("round")
        axes.set_title(f"{unit} so far, all clients together")
        whole_ticks(axes)
        end_labels(
            axes,
            [
                (float(down[-1]) / size, f"down {amount(float(down[-1]))}", "#2b7db0"),
                (float(up[-1]) / size, f"up {amount(float(up[-1]))}", FEDERATED),
            ],
        )
    return page.svg


def timeline(h: History) -> str:
    """Who worked when, round by round; above 40 clients the number at work instead; SVG, or "" if not recorded."""
    if not any(x.timeline for x in h.rounds):
        return ""
    from matplotlib.ticker import MaxNLocator

    starts = np.cumsum([0.0, *(x.seconds for x in h.rounds)])
    bars = [
        (client, float(start + s), float(start + e), bool(i % 2))
        for i, (start, x) in enumerate(zip(starts[:-1], h.rounds, strict=True))
        for client, s, e in x.timeline
    ]
    seen = sorted({client for client, _, _, _ in bars})
    many = len(seen) > _MOST_ROWS
    end = max(float(starts[-1]), max(e for _, _, e, _ in bars))
    size, unit = (60.0, "minutes") if end > 300 else (1.0, "seconds")
    with sheet(2.8 if many else 1.15 + 0.17 * max(len(seen), 3)) as page:
        axes = page.figure.subplots()
        if many:
            times, working = at_work([(s, e) for _, s, e, _ in bars])
            axes.fill_between(times / size, working, step="post", color=FEDERATED, alpha=0.75, lw=0)
            axes.set_ylim(0)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes.set_title(f"Clients at work ({len(seen)} took part)", pad=18)
        else:
            for is_odd, colour in ((False, FEDERATED), (True, DOWN)):
                mine = [x for x in bars if x[3] == is_odd]
                axes.barh(
                    [seen.index(client) for client, *_ in mine],
                    [max(e - s, end / 1200) / size for _, s, e, _ in mine],
                    left=[s / size for _, s, _, _ in mine],
                    height=0.68,
                    color=colour,
                )
            axes.set_yticks(range(len(seen)), [str(n) for n in seen], fontsize=8 if len(seen) <= 25 else 7)
            axes.set_ylim(len(seen) - 0.4, -0.6)
            axes.set_ylabel("client")
            axes.grid(visible=False)
            axes.set_title("Clients at work, from being asked to their answer", pad=18)
        axes.set_xlim(0, end / size)
        axes.set_xlabel(f"{unit} (rounds end to end)")
        step = -(-len(h.rounds) // 16)
        for i, x in enumerate(h.rounds):
            if i:
                axes.axvline(float(starts[i]) / size, color="#c9ced6", lw=0.7, zorder=0)
            if i % step == 0:
                middle = float(starts[i] + starts[i + 1]) / 2 / size
                label = f"round {x.round}" if i == 0 and len(h.rounds) <= 8 else str(x.round)
                axes.text(
                    middle, 1.015, label, transform=axes.get_xaxis_transform(), ha="center", color=SOFT, fontsize=7.5
                )
        if len(h.rounds) > 8:
            axes.text(1.008, 1.015, "round", transform=axes.transAxes, ha="left", color=SOFT, fontsize=7.5)
    return page.svg


def at_work(spans: Sequence[tuple[float, float]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The times at which the number of open spans changes, and that number from then on."""
    edges = np.array([s for s, _ in spans] + [e for _, e in spans])
    steps = np.array([1] * len(spans) + [-1] * len(spans))
    times, where = np.unique(edges, return_inverse=True)
    change = np.zeros(len(times), dtype=np.int64)
    np.add.at(change, where, steps)
    return times, np.cumsum(change)


def scale_of(size: float) -> tuple[float, str]:
    """The unit (bytes in it, its name) in which this many bytes read well: 1 MB is 10⁶ bytes."""
    for bytes_, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= bytes_:
            return bytes_, name
    return 1.0, "bytes"


def amount(size: float) -> str:
    """A number of bytes to read: three digits and a unit."""
    bytes_, name = scale_of(size)
    value = size / bytes_
    return f"{value:,.0f} {name}" if value >= 100 or bytes_ == 1 else f"{value:.3g} {name}"
