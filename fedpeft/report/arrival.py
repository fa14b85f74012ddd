"""When runs reach an accuracy: in simulated time, and in rounds."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.report.history import History

_MOST_LEVELS = 5


def path(h: History, central: bool) -> list[tuple[int, float, float]]:
    """(round, simulated seconds, accuracy) of each round where both were recorded."""
    found = []
    for x in h.rounds:
        score = x.central if central else x.validation
        if x.simulated is not None and score is not None and score.accuracy is not None:
            found.append((x.round, x.simulated, score.accuracy))
    return found


def levels(runs: Sequence[History], central: bool) -> list[float]:
    """Accuracies that are worth asking for: whole multiples of 5 %, at most five, up to the best that any run has."""
    paths = [path(h, central) for h in runs]
    best = max((y for p in paths for _, _, y in p), default=0.0)
    start = max((p[0][2] for p in paths if p), default=0.0)
    steps = [k / 20 for k in range(1, 21) if start < k / 20 <= best]
    if len(steps) <= _MOST_LEVELS:
        return steps
    return [steps[i] for i in np.linspace(0, len(steps) - 1, _MOST_LEVELS).round().astype(int)]


def reached(h: History, level: float, central: bool) -> tuple[int, float] | None:
    """The first round with at least this accuracy, and the simulated seconds at its end; None if there is none."""
    return next(((round, t) for round, t, y in path(h, central) if y >= level), None)


def mean_arrival(runs: Sequence[History], level: float, central: bool) -> tuple[float, float] | None:
    """The means of ``reached`` over runs of one kind; None unless all of them get there."""
    found = [reached(h, level, central) for h in runs]
    there = [x for x in found if x is not None]
    if not there or len(there) < len(found):
        return None
    return float(np.mean([r for r, _ in there])), float(np.mean([t for _, t in there]))


def mean_clock(runs: Sequence[History], central: bool) -> NDArray[np.float64]:
    """Mean simulated seconds at the end of each round that all these runs have an accuracy of; empty if none."""
    paths = [{round: t for round, t, _ in path(h, central)} for h in runs]
    rounds = sorted(set.intersection(*(set(x) for x in paths))) if paths else []
    return np.array([[x[r] for r in rounds] for x in paths]).mean(axis=0) if rounds else np.zeros(0)
