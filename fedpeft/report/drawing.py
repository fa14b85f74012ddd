"""How our figures look: colours, type, labels at the ends of lines, and SVG text out of matplotlib."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, darkened where they carry text: told apart with any of the common colour-vision deficiencies.
FEDERATED = "#0b5fa5"
LOCAL = "#c2570c"
CENTRAL = "#00795a"
BASE = "#6b7280"
DOWN = "#3f9fd8"
INK = "#1c2430"
SOFT = "#5b6472"
GRID = "#e6e9ee"
SERIES = (FEDERATED, LOCAL, CENTRAL, "#a8488a", "#3f9fd8", "#9a7b00", "#6b7280", "#1c2430")

WIDTH = 8.6  # inches at 72 to the inch: a figure is 619 units wide, and the page scales it

_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that layout is the same everywhere
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.labelsize": 8.5,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": "#aeb6c2",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "fedpeft",
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a dollar in a name is a dollar
}


@dataclass(slots=True)
class Sheet:
    """A figure being drawn; ``svg`` is set once it is done."""

    figure: "Figure"
    svg: str = field(default="", init=False)

    def space(self, height: float) -> None:
        """Leave this share of a panel's height free between panels that stand on one another."""
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        engine = self.figure.get_layout_engine()
        assert isinstance(engine, ConstrainedLayoutEngine), "sheet() sets one"
        engine.set(hspace=height)


@contextmanager
def sheet(height: float, width: float = WIDTH) -> Iterator[Sheet]:
    """A figure of this size in inches, in our style, whatever matplotlib is set to elsewhere; no window is opened."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_RC):
        page = Sheet(Figure(figsize=(width, height), layout="constrained"))
        FigureCanvasSVG(page.figure)
        yield page
        _lay_out(page.figure)
        page.figure.set_layout_engine("none")  # it is laid out: matplotlib would do it twice more
        out = io.StringIO()
        page.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        page.svg = _inline(out.getvalue())


def end_labels(axes: "Axes", labels: Sequence[tuple[float, str, str]], gap: float = 11.5) -> None:
    """Write (y, text, colour) to the right of the plot, each at its height, moved apart to ``gap`` points.

    Call it once the limits are final. A label that had to move has a thin line to where it belongs.
    """
    shown = sorted((y, text, colour) for y, text, colour in labels if np.isfinite(y))
    if not shown:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes are on a figure"
    axes.get_ylim()  # settles limits that follow the data
    _lay_out(figure)
    box = axes.get_window_extent()
    scale = 72.0 / figure.get_dpi()
    low, high = 0.0, box.height * scale
    at = [float(axes.transData.transform((0, y))[1] - box.y0) * scale for y, _, _ in shown]
    places = spread_out(at, gap, low - 4, high + 4)
    for (_, text, colour), truth, place in zip(shown, at, places, strict=True):
        axes.annotate(
            text,
            xy=(1, truth / high),
            xycoords="axes fraction",
            xytext=(9, place - truth),
            textcoords="offset points",
            va="center",
            ha="left",
            color=colour,
            fontsize=8.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)},
        )


def spread_out(at: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places at least ``gap`` apart, near ``at`` (ascending); within low and high where there is room."""
    groups: list[tuple[float, int]] = []  # the sum of where each member wants the first to be, and their number
    for x in at:
        total, count = x, 1
        while groups and total / count < groups[-1][0] / groups[-1][1] + groups[-1][1] * gap:
            before, members = groups.pop()
            total, count = before + total - count * members * gap, members + count
        groups.append((total, count))
    places = [total / count + k * gap for total, count in groups for k in range(count)]
    last = len(places) - 1
    raised = [max(x, low + i * gap) for i, x in enumerate(places)]
    return [min(x, high - (last - i) * gap) for i, x in enumerate(raised)]


def percent(axes: "Axes", axis: str = "y") -> None:
    """Tick labels in per cent for an axis of shares."""
    from matplotlib.ticker import PercentFormatter

    (axes.yaxis if axis == "y" else axes.xaxis).set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))


def whole_ticks(axes: "Axes") -> None:
    """At most eight ticks on x, at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _lay_out(figure: "Figure") -> None:
    engine = figure.get_layout_engine()
    assert engine is not None, "sheet() sets one"
    engine.execute(figure)


def _inline(text: str) -> str:
    """The svg element alone, that scales to the width it is given, without identifiers that nothing refers to."""
    text = text[text.index("<svg") :].strip()
    used = set(re.findall(r"#([A-Za-z0-9_-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m.group(0) if m.group(1) in used else "", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} width="100%" role="img">{rest}'
