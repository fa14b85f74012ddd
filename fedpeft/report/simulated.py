"""What a run in virtual time looks like: which device worked when, and what was learnt by then."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedpeft.report.drawing import FEDERATED, SERIES, SOFT, end_labels, percent, sheet
from fedpeft.report.history import History
from fedpeft.rounds import FATES, Visit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HOUR = 3600.0
_LOST = "#b3261e"
_MOST_ROWS = 60
_MOST_LINES = 60
_SHADES = (("done", 1.0), ("late", 0.35), ("lost", 0.9))


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of device. clients: how many are on it; done, late, lost, away: visits by fate, of those that are
    over; busy: the share of the time, from 0 to 1, that its clients were at work.
    """

    name: str
    clients: int
    done: int
    late: int
    lost: int
    away: int
    busy: float


def simulated_seconds(h: History) -> float | None:
    """How long the run took in virtual time; None for one in real time."""
    return max((x.simulated for x in h.rounds if x.simulated is not None), default=None)


def unit_of(seconds: float) -> tuple[float, str]:
    """The unit (seconds in it, its name) in which this long a time reads well."""
    for size, name in ((HOUR, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return size, name
    return 1.0, "seconds"


def learning(h: History) -> str:
    """Accuracy against simulated time, on the central test set and the clients' validation rows; SVG, or ""."""
    end = simulated_seconds(h)
    if not end:
        return ""
    size, unit = unit_of(end)
    base = h.baselines["base"].central if "base" in h.baselines else None
    start = [] if base is None or not any(x.central for x in h.rounds) else [(0.0, base.accuracy)]
    lines = [
        ("central test", FEDERATED, start + [(x.simulated, x.central.accuracy) for x in h.rounds if x.central]),
        ("clients' validation", "#2b7db0", [(x.simulated, x.validation.accuracy) for x in h.rounds if x.validation]),
    ]
    named: list[tuple[float, str, str]] = []
    with sheet(2.8) as page:
        axes = page.figure.subplots()
        for label, colour, points in lines:
            seen = [(t / size, y) for t, y in points if t is not None and y is not None]
            if seen:
                axes.plot(*zip(*seen, strict=True), color=colour, marker="o", ms=3.5 if len(seen) <= 30 else 0)
                named.append((seen[-1][1], label, colour))
        axes.set_xlim(0, 1.012 * end / size)
        axes.set_xlabel(f"simulated {unit}")
        axes.set_title("Accuracy by simulated time")
        percent(axes)
        end_labels(axes, named)
    return page.svg if named else ""


def schedule(h: History) -> str:
    """Devices at work, and who worked when, coloured by the kind of device; SVG, or "" in real time.

    Above 60 clients, 60 of them, some of each kind.
    """
    visits = [v for x in h.rounds for v in x.visits if v.ended > v.began]
    end = simulated_seconds(h)
    if not visits or not end:
        return ""
    size, unit = unit_of(end)
    kinds = _kinds(h, visits)
    names = sorted(set(kinds.values()))
    colours = {name: SERIES[i % len(SERIES)] for i, name in enumerate(names)}
    rows = _rows(kinds)
    height = 0.6 + (0.16 if len(rows) <= 25 else 0.075) * max(len(rows), 4)
    with sheet(2.3 + height) as page:
        above, below = page.figure.subplots(2, 1, sharex=True, height_ratios=(1.3, height))
        _stacked(above, visits, kinds, names, colours, end, size)
        place = {client: i for i, client in enumerate(rows)}
        for name in names:
            for fate, alpha in _SHADES:
                mine = [v for v in visits if v.fate == fate and v.client in place and kinds[v.client] == name]
                below.barh(
                    [place[v.client] for v in mine],
                    [(min(v.ended, end) - min(v.began, end)) / size for v in mine],
                    left=[v.began / size for v in mine],
                    height=0.8,
                    color=_LOST if fate == "lost" else colours[name],
                    alpha=alpha,
                    linewidth=0,
                )
        if len(h.rounds) <= _MOST_LINES:
            for x in h.rounds:
                if x.simulated is not None:
                    below.axvline(x.simulated / size, color="#c9ced6", lw=0.6, zorder=0)
        below.set_xlim(0, end / size)
        below.set_ylim(len(rows) - 0.4, -0.6)
        below.set_yticks([])
        below.grid(visible=False)
        for name in names:
            at = [i for i, client in enumerate(rows) if kinds[client] == name]
            below.text(
                1.012,
                (at[0] + at[-1]) / 2,
                f"{name or 'clients'} ({sum(k == name for k in kinds.values())})",
                transform=below.get_yaxis_transform(),
                va="center",
                color=colours[name],
                fontsize=8.5,
            )
        shown = "each a row" if len(rows) == len(kinds) else f"{len(rows)} of {len(kinds)}, each a row"
        below.set_title(f"Clients, {shown}: pale, too late; red, lost when the device went away")
        below.set_xlabel(f"simulated {unit}" + ("; lines: rounds" if len(h.rounds) <= _MOST_LINES else ""))
        below.xaxis.label.set_color(SOFT)
    return page.svg


def kinds_of(h: History) -> list[Kind]:
    """What each kind of device did, over all the run's clients; empty in real time."""
    visits = [v for x in h.rounds for v in x.visits]
    end = simulated_seconds(h)
    if not visits or not end:
        return []
    kinds = _kinds(h, visits)
    found = []
    for name in sorted(set(kinds.values())):
        members = sum(kind == name for kind in kinds.values())
        mine = [v for v in visits if kinds[v.client] == name]
        done, late, lost, away = (sum(v.fate == fate and v.ended <= end for v in mine) for fate in FATES)
        busy = sum(min(v.ended, end) - min(v.began, end) for v in mine)
        found.append(Kind(name, members, done, late, lost, away, busy / (members * end)))
    return found


def _kinds(h: History, visits: Sequence[Visit]) -> dict[int, str]:
    """The kind of device of each client of the run."""
    found = {v.client for v in visits} | set(h.run.clients)
    return {c: h.run.clients[c].device if c in h.run.clients else "" for c in sorted(found)}


def _rows(kinds: Mapping[int, str]) -> list[int]:
    """The clients to show, kind by kind; of many, as large a share of each kind, spread evenly."""
    clients = sorted(kinds, key=lambda c: (kinds[c], c))
    if len(clients) <= _MOST_ROWS:
        return clients
    return [clients[i] for i in np.linspace(0, len(clients) - 1, _MOST_ROWS).round().astype(int)]


def _stacked(
    axes: "Axes",
    visits: Sequence[Visit],
    kinds: Mapping[int, str],
    names: Sequence[str],
    colours: Mapping[str, str],
    end: float,
    size: float,
) -> None:
    """The number of devices at work over time, one kind on another."""
    times = np.linspace(0, end, 300)
    counts = []
    for name in names:
        mine = [v for v in visits if kinds[v.client] == name]
        began = np.searchsorted(np.sort([v.began for v in mine]), times, side="right")
        ended = np.searchsorted(np.sort([v.ended for v in mine]), times, side="right")
        counts.append(began - ended)
    axes.stackplot(times / size, counts, colors=[colours[name] for name in names], alpha=0.8, lw=0)
    axes.set_ylim(0)
    axes.tick_params(axis="x", length=0)
    axes.set_title("Devices at work")
