"""A comparison shown: as a table in the terminal, as a figure, as files."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from fedpeft.report.arrival import mean_clock
from fedpeft.report.compare import MEASURES, Comparison, Group, Spread, arrivals, is_central, measure, record, short
from fedpeft.report.costs import amount, scale_of
from fedpeft.report.drawing import SERIES, SOFT, end_labels, percent, sheet, whole_ticks
from fedpeft.report.files import write_whole
from fedpeft.report.history import History
from fedpeft.report.page import document, duration, number
from fedpeft.report.simulated import unit_of

_HEADS = {
    "accuracy": "accuracy %",
    "loss": "loss",
    "mean": "mean client %",
    "worst": "worst tenth %",
    "tuned": "tuned client %",
    "tuned_worst": "tuned, worst tenth %",
    "base": "base %",
    "local": "local only %",
    "central-training": "centralised %",
    "inexact": "inexact %",
    "bytes_up": "up",
    "bytes_down": "down",
    "seconds": "time",
    "simulated": "simulated",
}
_LEGEND = (
    "Accuracy, loss, base, local only and centralised are on the central test set; mean client and worst tenth "
    "are over the clients' own test sets, and tuned the same once each has trained for itself; inexact is how far "
    "the server's change was from the mean of the clients' changes, relative to that, mean over the rounds; ± is the "
    "sample standard deviation over seeds."
)


def table(c: Comparison) -> Table:
    """One line a group, for ``rich.print``: the settings that differ, then mean ± deviation of each measure."""
    shown = Table(caption=_LEGEND, caption_justify="left", header_style="bold")
    for head in _columns(c):
        shown.add_column(head, overflow="fold")
    shown.add_column("n", justify="right")
    measures = _measured(c)
    for name in measures:
        shown.add_column(_HEADS[name], justify="right")
    best = _best(c)
    for group in c.groups:
        cells = [*_cells(c, group), str(len(group.rows))]
        shown.add_row(
            *(escape_markup(x) for x in cells),
            *(told(name, group.measures.get(name)) for name in measures),
            style="bold" if group is best else None,
        )
    return shown


def figure(c: Comparison) -> str:
    """Accuracy by round, by bytes, and by simulated time if all have it: each group's mean and ± one deviation over
    seeds; SVG, or "" for no rounds.
    """
    central = is_central(c)
    drawn = [(g, *_paths(c.members(g), central)) for g in c.groups]
    drawn = [x for x in drawn if len(x[1])]
    if not drawn:
        return ""
    what = "central test set" if central else "clients’ validation rows"
    size, unit = scale_of(max(float(sent[-1]) for _, _, sent, _ in drawn))
    clocks = [mean_clock(c.members(g), central) for g, *_ in drawn]
    timed = all(len(t) == len(rounds) for t, (_, rounds, _, _) in zip(clocks, drawn, strict=True))
    with sheet(9.3 if timed else 6.2) as page:
        panels = page.figure.subplots(3 if timed else 2, 1)
        above, below = panels[:2]
        page.space(0.09)
        each, name = unit_of(max(float(t[-1]) for t in clocks)) if timed else (1.0, "")
        labels: list[tuple[float, str, str]] = []
        for i, (group, rounds, sent, values) in enumerate(drawn):
            named = i < len(SERIES)
            colour = SERIES[i] if named else "#c3c8d0"
            middle = values.mean(axis=0)
            for axes, x in zip(panels, (rounds, sent / size, clocks[i] / each), strict=False):
                if len(values) > 1:
                    wide = values.std(axis=0, ddof=1)
                    axes.fill_between(x, middle - wide, middle + wide, color=colour, alpha=0.15, lw=0)
                axes.plot(x, middle, color=colour, lw=1.8 if named else 1.0, marker="o", ms=3.5 if len(x) <= 30 else 0)
            if named:
                labels.append((float(middle[-1]), _cut(group.label), colour))
        above.set_title(f"Accuracy on the {what}, by round")
        above.set_xlabel("round")
        whole_ticks(above)
        below.set_title(f"The same, by {unit} sent up and down by all clients")
        below.set_xlabel(unit)
        if timed:
            panels[2].set_title(f"The same, by simulated {name}")
            panels[2].set_xlabel(f"simulated {name}")
        for axes in panels:
            axes.set_xlim(0, 1.012 * max(float(line.get_xdata()[-1]) for line in axes.lines))
            percent(axes)
            end_labels(axes, labels)
        if len(drawn) > len(SERIES):
            below.text(
                0.99, 0.03, "grey: the other runs", transform=below.transAxes, ha="right", color=SOFT, fontsize=8
            )
    return page.svg


def write_comparison(c: Comparison, folder: Path) -> Path:
    """Write comparison.json, .csv and .html into a folder, which is made if need be; the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record(c), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(folder / "comparison.json", text.encode())
    write_whole(folder / "comparison.csv", as_csv(c).encode())
    path = folder / "comparison.html"
    write_whole(path, _page(c).encode())
    return path


def as_csv(c: Comparison) -> str:
    """One line a run: its folder, name, seed, the settings that differ, and the measures; empty where not measured."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "name", "seed", *c.keys, "rounds", "complete", *MEASURES])
    for row in c.rows:
        facts = [row.path.name, row.name, row.seed, *row.differs.values(), row.rounds, str(row.is_complete).lower()]
        writer.writerow([*facts, *("" if (x := measure(row, m)) is None else repr(x) for m in MEASURES)])
    return out.getvalue()


def told(name: str, spread: Spread | None) -> str:
    """A measure as text, shares in per cent, with its deviation where there is one."""
    if spread is None:
        return "–"
    tell: Callable[[float], str] = {
        "loss": number,
        "bytes_up": amount,
        "bytes_down": amount,
        "seconds": duration,
        "simulated": duration,
    }.get(name, lambda x: f"{100 * x:.1f}")
    if spread.deviation is None or name in ("bytes_up", "bytes_down", "seconds", "simulated"):
        return tell(spread.mean)
    return f"{tell(spread.mean)} ± {tell(spread.deviation)}"


def escape_markup(text: str) -> str:
    """Text that rich shows as it is."""
    return text.replace("[", r"\[")


def _page(c: Comparison) -> str:
    names = short(c.keys)
    measures = _measured(c)
    best = _best(c)
    head = "".join(f"<th>{escape(k)}</th>" for k in _columns(c)) + '<th class="n">runs</th>'
    head += "".join(f'<th class="n">{_HEADS[m]}</th>' for m in measures)
    body = "".join(
        f"<tr class={'federated' if g is best else 'other'}>"
        + "".join(f"<td>{escape(x)}</td>" for x in _cells(c, g))
        + f'<td class="n">{len(g.rows)}</td>'
        + "".join(f'<td class="n">{escape(told(m, g.measures.get(m)))}</td>' for m in measures)
        + "</tr>"
        for g in c.groups
    )
    runs = "".join(
        f"<tr><td><code>{escape(x.path.name)}</code></td><td>{escape(x.seed)}</td>"
        f"<td>{escape(', '.join(f'{names[k]} {v}' for k, v in x.differs.items()))}</td>"
        + "".join(f'<td class="n">{escape(told(m, _single(measure(x, m))))}</td>' for m in ("accuracy", "loss", "mean"))
        + f"<td>{'' if x.is_complete else 'not complete'}</td></tr>"
        for x in c.rows
    )
    shared = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in c.shared.items())
    svg = figure(c).replace("<svg ", '<svg aria-label="Accuracy by round and by bytes sent" ', 1)
    differ = ", ".join(f"<code>{escape(k)}</code>" for k in c.keys) or "only the seed"
    return document(
        "Comparison",
        f'<p class="kicker">Federated fine-tuning</p><h1>{len(c.rows)} runs compared</h1>'
        f'<p class="lead">What differs: {differ}.</p>{_verdict(c)}'
        f'<div class="wide"><table class="dense"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="note">{escape(_LEGEND)}</p>'
        + (f'<h2>Learning curves</h2><figure><div class="wide">{svg}</div></figure>' if svg else "")
        + _arrivals(c)
        + '<h2>Single runs</h2><div class="wide"><table class="dense"><thead><tr><th>run</th><th>seed</th>'
        '<th>settings</th><th class="n">accuracy %</th><th class="n">loss</th><th class="n">mean client %</th>'
        "<th></th></tr></thead>"
        f"<tbody>{runs}</tbody></table></div>"
        '<h2>What is the same</h2><div class="settings"><section><table><tbody>'
        f"{shared}</tbody></table></section></div>",
        "Written by fedpeft",
        column="tables",
    )


def arrival_table(c: Comparison) -> Table | None:
    """When each group reaches an accuracy, in simulated time and rounds, for ``rich.print``; None in real time."""
    levels, rows = _arrival_cells(c)
    if not levels:
        return None
    shown = Table(title="Simulated time (rounds) to an accuracy", title_justify="left", header_style="bold")
    for head in ("", *levels):
        shown.add_column(head, justify="right" if head else "left")
    for label, cells in rows:
        shown.add_row(escape_markup(label), *cells)
    return shown


def _arrivals(c: Comparison) -> str:
    levels, rows = _arrival_cells(c)
    if not levels:
        return ""
    head = "<th></th>" + "".join(f'<th class="n">{x}</th>' for x in levels)
    body = "".join(
        f"<tr><td>{escape(label)}</td>" + "".join(f'<td class="n">{escape(x)}</td>' for x in cells) + "</tr>"
        for label, cells in rows
    )
    return (
        '<h2>Simulated time (rounds) to an accuracy</h2><div class="wide"><table class="dense">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _arrival_cells(c: Comparison) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The accuracies, and each group's label and times to them."""
    found = [(g.label, arrivals(c, g)) for g in c.groups]
    levels = sorted({level for _, x in found for level in x})
    rows = [(label, [f"{duration(x[y][1])} ({x[y][0]:.3g})" if y in x else "–" for y in levels]) for label, x in found]
    return [f"{100 * y:.0f} %" for y in levels], rows


def _verdict(c: Comparison) -> str:
    best = _best(c)
    if best is None or len(c.groups) < 2:
        return ""
    won = f"{told('accuracy', best.measures['accuracy'])} %"
    return f'<p class="verdict">Highest accuracy: <b>{escape(best.label)}</b>, {won}.</p>'


def _is_named(c: Comparison) -> bool:
    return not c.keys or all(g.label == row.name for g in c.groups for row in g.rows)


def _columns(c: Comparison) -> list[str]:
    names = short(c.keys)
    return [*(["run"] if _is_named(c) else []), *(names[k] for k in c.keys)]


def _cells(c: Comparison, group: Group) -> list[str]:
    return [*([group.label] if _is_named(c) else []), *group.differs.values()]


def _measured(c: Comparison) -> list[str]:
    return [m for m in MEASURES if any(m in g.measures for g in c.groups)]


def _best(c: Comparison) -> Group | None:
    scored = [g for g in c.groups if "accuracy" in g.measures]
    return max(scored, key=lambda g: g.measures["accuracy"].mean, default=None)


def _single(x: float | None) -> Spread | None:
    return None if x is None else Spread(x, None, 1)


def _paths(
    members: Sequence[History], central: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Rounds that all members have (n,), mean bytes sent by then (n,), accuracies (members, n)."""
    found: list[dict[int, float]] = []
    sent: list[dict[int, float]] = []
    for h in members:
        scores = {x.round: x.central if central else x.validation for x in h.rounds}
        found.append({t: x.accuracy for t, x in scores.items() if x is not None and x.accuracy is not None})
        total = np.cumsum([x.bytes_up + x.bytes_down for x in h.rounds]).tolist()
        sent.append(dict(zip((x.round for x in h.rounds), total, strict=True)))
    rounds = sorted(set.intersection(*(set(x) for x in found)))
    bytes_ = np.array([[x[t] for t in rounds] for x in sent]).mean(axis=0) if rounds else np.zeros(0)
    return np.array(rounds, dtype=np.int64), bytes_, np.array([[x[t] for t in rounds] for x in found])


def _cut(label: str) -> str:
    return label if len(label) <= 30 else f"{label[:29]}…"
