"""How far the steps of a run were from the mean of what its clients did: the figure, the sentence, the mean."""

from collections.abc import Mapping

import numpy as np

from fedpeft.report.drawing import FEDERATED, SOFT, end_labels, sheet, whole_ticks
from fedpeft.report.history import History
from fedpeft.report.summary import setting

FLOOR = 1e-9
"""Where the figure's scale ends: less than what fp32 can tell from zero."""

ROUNDING, COARSE = 1e-5, 1e-3
"""An error below this is rounding: of fp32, and, with a rule that is known to be exact, of half precision too."""

_LABELLED = 28
_PRODUCT = "the product of the mean factors is not the mean of the products"
_ONE_FACTOR = "clients train one factor and all have the same other one"
_ROBUST = "it is not meant to be the mean, but what outliers can't move"
_EXACT: Mapping[str, str] = {
    "fedex": "what the mean factors miss is kept beside them",
    "fedsb": _ONE_FACTOR,
    "fedsvd": _ONE_FACTOR,
    "ffa": _ONE_FACTOR,
    "flora": "the clients' factors are stacked, and not averaged",
    "ravan": "clients train cores between factors that all share",
    "rolora": _ONE_FACTOR,
}
"""Why a rule is exact, where it is."""

_INEXACT: Mapping[str, str] = {
    "fedit": _PRODUCT,
    "fedrot": f"{_PRODUCT}, though clients turn theirs towards the server's",
    "flexlora": "what is beyond the server's rank is left out",
    "hetlora": f"clients count by the size of what they learnt, and {_PRODUCT}",
    "krum": _ROBUST,
    "lora_a2": "each client sends the directions that matter most to it, and no others",
    "lora_fair": f"{_PRODUCT}, and b makes up for no more of that than the mean a can reach",
    "median": _ROBUST,
    "multi_krum": _ROBUST,
    "ravan": "each core is averaged over those who train it",
    "rbla": f"each direction is averaged over those who hold it, and {_PRODUCT}",
    "subspace": "what is beyond the server's rank, or what the sketched directions miss, is left out",
    "trimmed_mean": _ROBUST,
    "zeropad": f"a direction that a client lacks counts as zero, and {_PRODUCT}",
}
"""Why a rule is not exact, where it isn't."""


def inexact(h: History) -> float | None:
    """The error over all layers, the mean of the rounds that have it; None where none has."""
    found = [x.exactness.overall for x in h.rounds if x.exactness is not None]
    return float(np.mean(found)) if found else None


def errors(h: History) -> str:
    """The error by round on a log scale, over all layers and of each; SVG, or "" if none was measured."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    found = [(x.round, x.exactness) for x in h.rounds if x.exactness is not None]
    if not found:
        return ""
    t = np.array([round for round, _ in found])
    overall = np.maximum([x.overall for _, x in found], FLOOR)
    names = list(dict.fromkeys(name for _, x in found for name in x.layers))
    each = {n: np.maximum([x.layers.get(n, np.nan) for _, x in found], FLOOR) for n in names}
    size = 4.0 if len(t) <= 30 else 0.0
    with sheet(2.7) as page:
        axes = page.figure.subplots()
        for y in each.values():
            axes.plot(t, y, color=SOFT, lw=0.8, alpha=max(0.15, 0.6 - len(each) / 100), marker="o", ms=size / 2)
        axes.plot(t, overall, color=FEDERATED, lw=2.0, marker="o", ms=size)
        axes.set_yscale("log")
        seen = np.concatenate([overall, *each.values()])
        low, high = np.log10(np.nanmin(seen)), np.log10(np.nanmax(seen))
        axes.set_ylim(10.0 ** np.floor(low), 10.0 ** max(np.ceil(high), np.floor(low) + 1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        last = max(int(t.max()), 2)
        axes.set_xlim(1, last + 0.012 * (last - 1))
        axes.set_xlabel("round")
        axes.set_title("Relative error of the server's change of ΔW")
        whole_ticks(axes)
        labels = [(float(overall[-1]), "all layers", FEDERATED)]
        ends = sorted((float(y[-1]), n) for n, y in each.items() if np.isfinite(y[-1]))
        if len(ends) > 1:
            labels += [(y, _short(n), SOFT) for y, n in (ends[0], ends[-1])]
        end_labels(axes, labels)
    return page.svg


def meaning(h: History) -> str:
    """What the errors mean for this run's rule, as plain text; "" if none was measured."""
    mean, rule = inexact(h), setting(h, "rule.name")
    if mean is None:
        return ""
    worst = max(x.exactness.overall for x in h.rounds if x.exactness is not None)
    is_exact = mean < (COARSE if rule in _EXACT else ROUNDING)
    why = (_EXACT if is_exact else _INEXACT).get(rule)
    reason = "" if why is None else f", since {why}" if is_exact else f": {why}"
    if is_exact:
        text = (
            f"Exact, but for rounding ({mean:.0e} on average): each step was the mean of the clients’ changes{reason}."
        )
    else:
        text = (
            f"The server’s steps missed the mean of the clients’ changes by {_share(mean)} of its length "
            f"(mean of the rounds; {_share(worst)} at most){reason}."
        )
    others = []
    if setting(h, "server.name") not in ("", "averaging") or setting(h, "server.lr") not in ("", "1.0"):
        others.append("the server’s optimiser")
    if setting(h, "channel.clip"):
        others.append("the clip")
    if others and not is_exact:
        text += f" What {' and '.join(others)} changed is part of it."
    return f"{text} From sketches, so errors above rounding are estimates; an exact rule need not be the more accurate."


def _share(x: float) -> str:
    return f"{100 * x:.3g} %"


def _short(name: str) -> str:
    """The last parts of a layer's name, as far as there is room."""
    parts = name.split(".")
    while len(".".join(parts)) > _LABELLED and len(parts) > 1:
        del parts[0]
    text = ".".join(parts)
    return text if len(text) <= _LABELLED else f"…{text[1 - _LABELLED :]}"
