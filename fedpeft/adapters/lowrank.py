"""One layer's low-rank update, as an immutable value."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from fedpeft.adapters.layout import Array


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """One layer's update, ``ΔW = scale · b @ a``.

    Shapes: ``a`` is (r, k), ``b`` is (d, r), so ΔW is (d, k): (out, in), as in ``torch.nn.Linear``.
    """

    a: Array
    b: Array
    scale: float

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(f"factors do not match: a is {self.a.shape}, b is {self.b.shape}; want (r, k) and (d, r)")

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def product(self) -> Array:
        """ΔW, dense, of shape (d, k): for small layers and tests, never for a server's sums."""
        return self.scale * self.b @ self.a

    @property
    def norm(self) -> float:
        """‖ΔW‖ in Frobenius norm, in fp64, from products of shape (r, r)."""
        a, b = self.a.astype(np.float64), self.b.astype(np.float64)
        return abs(self.scale) * float(np.sqrt(max(0.0, np.sum((b.T @ b) * (a @ a.T)))))

    def cut(self, rank: int) -> Self:
        """Keep at most the first ``rank`` rows of a and columns of b."""
        return replace(self, a=self.a[:rank], b=self.b[:, :rank])

    def rest(self, rank: int) -> Self:
        """What ``cut`` leaves out: the directions behind the first ``rank``."""
        return replace(self, a=self.a[rank:], b=self.b[:, rank:])

    def join(self, other: Self) -> Self:
        """The sum of two ΔW as one pair, the other's directions behind these, at this one's scale."""
        return replace(self, a=np.vstack([self.a, other.a]), b=np.hstack([self.b, other.at(self.scale).b]))

    def at(self, scale: float) -> Self:
        """The same ΔW with another scale, the difference taken into b."""
        return self if scale == self.scale else replace(self, b=self.b * (self.scale / scale), scale=scale)

    def pad(self, rank: int) -> Self:
        """Add zero rows to a and zero columns to b up to ``rank``; ΔW stays the same."""
        more = rank - self.rank
        if more < 0:
            raise ValueError(f"can't pad rank {self.rank} to {rank}: want at least {self.rank}")
        if not more:
            return self
        return replace(self, a=np.pad(self.a, ((0, more), (0, 0))), b=np.pad(self.b, ((0, 0), (0, more))))
