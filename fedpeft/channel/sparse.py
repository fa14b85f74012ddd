"""Vectors most of whose numbers are zero, as what a client of a low rank puts into its server's layout."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import ProtocolError

BLOCK = 1 << 15
"""Numbers between two counts of what came before, so that a part is found without reading the whole mask."""

ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)
"""How many ones a byte has."""


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """A vector of shape (size,): a bit for each number, whether it is zero, and those that are not.

    mask: uint8 (⌈size / 8⌉,), the first number in the highest bit; values: those that are not zero, in order, of
    the vector's dtype. A zero that was negative comes back as zero.
    """

    size: int
    mask: NDArray[np.uint8]
    values: NDArray[Any]
    before: NDArray[np.int64]

    @classmethod
    def of(cls, x: NDArray[Any]) -> Self:
        """What ``dense`` gives back."""
        return cls.restored(len(x), np.packbits(x != 0), x[x != 0])

    @classmethod
    def restored(cls, size: int, mask: NDArray[np.uint8], values: NDArray[Any]) -> Self:
        """From its parts. Raises ProtocolError where they are not one vector's."""
        counts = np.add.reduceat(ONES[mask], np.arange(0, len(mask), BLOCK // 8), dtype=np.int64)
        before = np.concatenate([[0], np.cumsum(counts)])
        want, behind = before[-1], np.unpackbits(mask[size // 8 :])[size % 8 :]
        if len(mask) != -(-size // 8) or len(values) != want or behind.any():
            raise ProtocolError(
                f"a vector of {size} numbers with {len(values)} that are not zero has a mask of {len(mask)} bytes and "
                f"{want} ones: they do not fit"
            )
        return cls(size, mask, values, before)

    def dense(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """The numbers from ``start`` to ``stop``, in an array of their own."""
        stop = self.size if stop is None else stop
        first = start // BLOCK * BLOCK
        bits = np.unpackbits(self.mask[first // 8 :], count=stop - first).view(bool)
        skipped = self.before[start // BLOCK] + np.count_nonzero(bits[: start - first])
        is_there = bits[start - first :]
        out = np.zeros(stop - start, self.values.dtype)
        out[is_there] = self.values[skipped : skipped + np.count_nonzero(is_there)]
        return out

    @property
    def nbytes(self) -> int:
        return self.mask.nbytes + self.values.nbytes + self.before.nbytes
