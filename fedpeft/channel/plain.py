"""The channel in the clear: what a client sends when nothing is hidden."""

from dataclasses import dataclass

import numpy as np

from fedpeft.adapters import Array
from fedpeft.errors import ProtocolError

ROUNDING = 1 + 1e-6
"""What fp32 may add to a weight or a norm: a few times its unit of 6e-8, relative."""


@dataclass(frozen=True, slots=True)
class PlainChannel:
    """A client's term is its vector times its weight, then the weight, then its statistics, in fp32.

    clip: the l2 norm that a client scales its vector down to (none if not set), and above which the
    server refuses a term; largest_norm: the norm above which the server refuses any term, so that
    one broken client can't move the mean far.
    """

    clip: float | None = None
    largest_norm: float = 1e4

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: got {self.clip}; want more than 0, or leave it out")
        if not self.largest_norm > 0:
            raise ValueError(f"largest_norm: got {self.largest_norm}; want more than 0")
        if self.clip is not None and self.clip > self.largest_norm:
            raise ValueError(f"clip: got {self.clip}; want at most largest_norm, {self.largest_norm}")

    def up(self, x: Array, weight: float, statistics: Array) -> Array:
        """The term of a client whose encoding is ``x`` (n,), with ``statistics`` (m,): shape (n + 1 + m,), fp32."""
        x = x.astype(np.float64)  # half precision overflows at 65504, which a weight or a square soon reaches
        length = np.linalg.norm(x)
        if self.clip is not None and length > self.clip:
            x = x * (self.clip / length)
        return np.concatenate([weight * x, [weight], statistics]).astype(np.float32)

    def check(self, term: Array, size: int, largest_weight: float) -> None:
        """Raise ProtocolError for a term that may not be added: not finite, too heavy or too long."""
        if not np.isfinite(term).all():
            raise ProtocolError("the update holds NaN or infinity")
        weight = term[size]
        if not 0 < weight <= largest_weight * ROUNDING:
            raise ProtocolError(f"the update has weight {weight:g}; want more than 0 and at most {largest_weight:g}")
        length = np.linalg.norm(term[:size].astype(np.float64)) / weight
        key, limit = ("largest_norm", self.largest_norm) if self.clip is None else ("clip", self.clip)
        if length > limit * ROUNDING:
            raise ProtocolError(f"the update has norm {length:.7g}; want at most {limit:g} (channel.{key})")

    def down(self, total: Array, size: int) -> tuple[Array, float, Array]:
        """The weighted mean (size,), the weight and the statistics' sums, from a sum of terms."""
        weight = float(total[size])
        return total[:size] / weight, weight, total[size + 1 :]
