"""What a client says of its training or evaluation: sums, so that they add up over clients."""

from dataclasses import astuple, dataclass
from typing import Self

import numpy as np

from fedpeft.adapters import Array


@dataclass(frozen=True, slots=True)
class Metrics:
    """loss: summed over units; units: predictions made (labels or target tokens); correct: of these; examples: rows."""

    loss: float = 0.0
    units: float = 0.0
    correct: float = 0.0
    examples: float = 0.0

    def __add__(self, other: Self) -> "Metrics":
        return Metrics(*(x + y for x, y in zip(astuple(self), astuple(other), strict=True)))

    def vector(self) -> Array:
        """Shape (4,), in the order of the fields."""
        return np.array(astuple(self))

    @classmethod
    def of(cls, vector: Array) -> Self:
        """The inverse of ``vector``."""
        return cls(*(float(x) for x in vector))

    @property
    def mean_loss(self) -> float:
        """Loss per unit; NaN where nothing was predicted."""
        return self.loss / self.units if self.units else float("nan")

    @property
    def accuracy(self) -> float:
        """Share of predictions that were right; NaN where nothing was predicted."""
        return self.correct / self.units if self.units else float("nan")
