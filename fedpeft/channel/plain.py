"""The channel in the clear: what a client sends when nothing is hidden."""

from dataclasses import dataclass

import numpy as np

from fedpeft.adapters import Array
from fedpeft.errors import ProtocolError

ROUNDING = 1 + 1e-6
"""What fp32 may add to a weight or a norm: a few times its unit of 6e-8, relative."""


@dataclass(frozen=True, slots=True)
class PlainChannel:
    """A client sends its vector, its weight and its statistics in fp32; its term is the same, weighted, in fp64.

    The server weighs, since a product rounded to fp32 on the client would lose the last bit of what it trained.
    clip: the l2 norm that a client scales its vector down to (none if not set), and above which the
    server refuses an answer; largest_norm: the norm above which the server refuses any, so that
    one broken client can't move the mean far; exact: send fp64, so that one client's change arrives to the
    last bit, at twice the bytes.
    """

    clip: float | None = None
    largest_norm: float = 1e4
    exact: bool = False

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: got {self.clip}; want more than 0, or leave it out")
        if not self.largest_norm > 0:
            raise ValueError(f"largest_norm: got {self.largest_norm}; want more than 0")
        if self.clip is not None and self.clip > self.largest_norm:
            raise ValueError(f"clip: got {self.clip}; want at most largest_norm, {self.largest_norm}")

    @property
    def number_bytes(self) -> int:
        """What a number of an answer takes on the wire."""
        return 8 if self.exact else 4

    def up(self, x: Array, weight: float, statistics: Array) -> Array:
        """The answer of a client whose encoding is ``x`` (n,), with ``statistics`` (m,): shape (n + 1 + m,)."""
        x = x.astype(np.float64)  # half precision overflows at 65504, which a weight or a square soon reaches
        length = np.linalg.norm(x)
        if self.clip is not None and length > self.clip:
            x = x * (self.clip / length)
        return np.concatenate([x, [weight], statistics]).astype(np.float64 if self.exact else np.float32)

    def check(self, answer: Array, size: int, largest_weight: float) -> None:
        """Raise ProtocolError for an answer that may not be added: not finite, too heavy or too long."""
        if not np.isfinite(answer).all():
            raise ProtocolError("the update holds NaN or infinity")
        weight = answer[size]
        if not 0 < weight <= largest_weight * ROUNDING:
            raise ProtocolError(f"the update has weight {weight:g}; want more than 0 and at most {largest_weight:g}")
        length = np.linalg.norm(answer[:size].astype(np.float64))
        key, limit = ("largest_norm", self.largest_norm) if self.clip is None else ("clip", self.clip)
        if length > limit * ROUNDING:
            raise ProtocolError(f"the update has norm {length:.7g}; want at most {limit:g} (channel.{key})")

    def weigh(self, answer: Array, size: int) -> Array:
        """What is added up for an answer: its vector (size,) times its weight, and the rest as it is, in fp64."""
        term = answer.astype(np.float64)
        term[:size] *= term[size]
        return term

    def down(self, total: Array, size: int) -> tuple[Array, float, Array]:
        """The weighted mean (size,), the weight and the statistics' sums, from a sum of terms."""
        weight = float(total[size])
        return total[:size] / weight, weight, total[size + 1 :]
