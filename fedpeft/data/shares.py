"""Shares of rows as whole numbers."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.table import Rows


def whole(amounts: NDArray[np.float64], offset: float = 0.5) -> NDArray[np.int64]:
    """Whole numbers, each within one of its amount, whose sum is that of the amounts to the nearest.

    Any other ``offset`` in [0, 1) is for amounts with a whole sum; if it's drawn uniformly, each one's expectation
    is its amount (systematic sampling).
    """
    total = int(np.floor(amounts.sum() + 0.5))
    ends = np.zeros(len(amounts) + 1, np.int64)
    ends[1:] = np.clip(np.floor(np.cumsum(amounts) + offset), 0, total)
    ends[-1] = total
    return ends[1:] - ends[:-1]


def dirichlet(alpha: float | NDArray[np.float64], size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Shares drawn from Dirichlet(alpha), shape (size,), which sum to 1; where alpha underflows, all to one."""
    shares: NDArray[np.float64] = rng.dirichlet(np.full(size, alpha))
    if shares.sum() > 0.5:  # which NaN is not
        return shares
    only = np.zeros(size)
    only[rng.integers(size)] = 1
    return only


def fill(parts: Sequence[Rows], labels: NDArray[np.int64], least: int) -> list[Rows]:
    """The parts, none with less than ``least`` rows: what lacks comes from the largest, of its commonest label.

    There must be ``least`` rows for each part in all.
    """
    out = list(parts)
    for i in range(len(out)):
        while (lack := least - len(out[i])) > 0:
            donor = int(np.argmax([len(part) for part in out]))
            rows = out[donor]
            common = np.flatnonzero(labels[rows] == np.bincount(labels[rows]).argmax())
            moved = common[: min(lack, len(rows) - least)]
            out[i] = np.concatenate([out[i], rows[moved]])
            out[donor] = np.delete(rows, moved)
    return out
