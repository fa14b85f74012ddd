"""How fine each tensor's grid is in the next round, from what the server knows of this one: sums, and how much was cut.

The numbers of single clients are larger than those of their mean, and nobody knows by how much: so there is room for
them, more of it after each time that numbers were cut. A grid that is too coarse costs bits; one that is too fine cuts
some clients' changes short, which is counted.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import floor, log2, sqrt

import numpy as np

from fedpeft.adapters import Array
from fedpeft.channel.ring import MOST_HALVINGS, Grid

MARGIN = 4.0
"""Times √cohort: how far beyond the largest number of their mean single clients may be. Where they have nothing in
common, the largest of theirs is some √cohort times it."""
FINEST = 14
"""Bits to which the largest number of a tensor's mean is known at most: finer steps would buy nothing."""
FASTER = 4
"""Halvings in one round, at most."""
FEW = 16
"""Numbers: the mean of a tensor with fewer may be near zero by chance, so that it takes one halving in a round."""
CUT = 1e-4
"""The share of a round's numbers that may be cut."""
RELAX = 2
"""Halvings that are taken back, of each tensor, where more were cut."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the sum of a pass says of how large clients' numbers are on its grid.

    peaks: the largest number of each tensor of the mean, as it is on the grid, thus times the mean share of the largest
    weight; clients: how many are in the sum; cut: how many of their numbers were.
    """

    grid: Grid
    peaks: tuple[float, ...]
    clients: int
    cut: int

    @classmethod
    def of(cls, grid: Grid, mean: Array, weight: float, clients: int, cut: int) -> "Seen":
        """Of a mean of so many clients, shape (grid.size,), whose weights come to ``weight``."""
        share = weight / (clients * grid.largest_weight)
        parts = [mean[a:b] for a, b in pairwise(accumulate(grid.leaves, initial=0))]
        return cls(grid, tuple(share * np.abs(x).max(initial=0) for x in parts), clients, cut)


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of one pass: halvings of the range for each tensor, and so many more that are left free.

    room: grows where numbers were cut, and is not given back, for clients that had large numbers once have them again.
    """

    halvings: tuple[int, ...]
    room: int = 0

    def after(self, seen: Seen) -> "Scales":
        """The scales for the next round. A tensor whose mean is all zero, as of a resting factor, keeps its own."""
        grid = seen.grid
        if seen.cut > CUT * seen.clients * (grid.size + grid.sketches):
            more = RELAX if any(self.halvings) else 0  # of what is cut at the whole range no scale is the cause
            return Scales(tuple(max(0, k - RELAX) for k in self.halvings), self.room + more)
        each = zip(self.halvings, grid.leaves, seen.peaks, strict=True)
        return Scales(tuple(self._next(grid, *leaf) for leaf in each), self.room)

    def _next(self, grid: Grid, halvings: int, size: int, peak: float) -> int:
        if peak == 0:
            return halvings
        for_clients = log2(grid.range / (MARGIN * sqrt(grid.cohort) * peak)) - self.room
        for_precision = log2(grid.rounding / peak) + FINEST
        faster = FASTER if size >= FEW else 1
        return max(0, min(floor(for_clients), floor(for_precision), halvings + faster, MOST_HALVINGS))
