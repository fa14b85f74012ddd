"""Vectors of Z_2^m as bytes: m bits for each number, little-endian."""

from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import ProtocolError
from fedpeft.secagg.protocol import Ring

Buffer: TypeAlias = bytes | bytearray | memoryview
Bits: TypeAlias = Literal[16, 24, 32]

MODULI: Final = (16, 24, 32)
"""The m that a ring can have."""

_PIECE: Final = 2**15  # numbers at a time: 128 KiB, which stays in the processor's cache


def pack(vector: Ring, m: int) -> bytes:
    """The low m bits of each number: m / 8 bytes for each of (n,)."""
    _check(m)
    words = np.ascontiguousarray(vector, "<u4")
    if m == 32:
        return words.tobytes()
    if m == 16:
        return words.view("<u2")[::2].tobytes()
    return words.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()


def unpack(data: Buffer, size: int, m: int) -> Ring:
    """The numbers that ``pack`` wrote: shape (size,), uint32, each below 2^m. ProtocolError for a wrong length."""
    found = np.zeros(size, np.uint32)
    add_packed(found, data, m)
    return found


def add_packed(total: Ring, data: Buffer, m: int) -> None:
    """Add packed numbers to the total, in place and modulo 2^m, piece by piece: no second vector is made.

    total: shape (n,), uint32. ProtocolError for a wrong length; the total is then as before.
    """
    _check(m)
    if memoryview(data).nbytes * 8 != total.size * m:
        got = memoryview(data).nbytes
        raise ProtocolError(f"a vector of {got} bytes; want {total.size * m // 8}, for {total.size} of {m} bits")
    words = _words(data, total.size, m)
    for begin in range(0, words.size, _PIECE):
        piece = total[begin : begin + _PIECE][: words.size - begin]
        np.add(piece, words[begin : begin + _PIECE], out=piece)
        reduce(piece, m)
    for last in range(words.size, total.size):
        low = int.from_bytes(memoryview(data).cast("B")[3 * last :], "little")
        total[last] = (int(total[last]) + low) % 2**m


def reduce(vector: Ring, m: int) -> None:
    """Bring every number below 2^m, in place."""
    _check(m)
    if m < 32:
        np.bitwise_and(vector, np.uint32(2**m - 1), out=vector)


def _words(data: Buffer, size: int, m: int) -> NDArray[np.unsignedinteger]:
    """The packed numbers where they are, with higher bits that mean nothing; of 24 bits, all but the last."""
    if m == 32:
        return np.frombuffer(data, "<u4")
    if m == 16:
        return np.frombuffer(data, "<u2")
    # Words of 4 bytes that begin at every third: each reaches into the next number, which the last doesn't have.
    return np.ndarray((max(size - 1, 0),), "<u4", data, 0, (3,))


def _check(m: int) -> None:
    if m not in MODULI:
        raise ValueError(f"a ring of {m} bits; want 16, 24 or 32")
