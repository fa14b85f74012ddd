"""Who adds: a running sum in constant memory, and a tree of running sums."""

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class Running:
    """A sum of vectors in fp64 and constant memory. ``merge`` makes a tree of servers."""

    size: int
    count: int = 0
    total: NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.total = np.zeros(self.size)

    def add(self, x: NDArray[Any]) -> Self:
        """Add one term of shape (size,); nothing of it is kept but the sum."""
        self._include(x)
        self.count += 1
        return self

    def merge(self, other: Self) -> Self:
        """Add another sum, which is not changed."""
        self._include(other.total)
        self.count += other.count
        return self

    def _include(self, x: NDArray[Any]) -> None:
        if x.shape != (self.size,):
            raise ValueError(f"a sum of vectors of shape ({self.size},) can't take one of {x.shape}")
        self.total += x
