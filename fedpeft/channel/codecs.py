"""The numbers of a tensor in fewer bits: rounded to bf16, to a few steps, to a sign, or only the largest of them.

A codec takes numbers in blocks of 64, in order, the last block with what is left. Each block has a scale: an fp16 share
of the tensor's largest, rounded up, which itself travels in fp32, so that no change is too small or too large for it.
What is decoded is the same to the last bit on any machine: products and quotients of two fp32 numbers. All is little
endian, as every machine that trains is.

Sources: rounding at random to a block's steps: Alistarh et al., arXiv:1610.02132 (QSGD; with the largest number in
place of the norm); one step: Wen et al., arXiv:1705.07878, section 3 (TernGrad); the sign with the mean size:
Karimireddy et al., arXiv:1901.09847, section 4 (EF-SignSGD); the largest: Stich et al., arXiv:1809.07599 (Top-k).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from fedpeft.adapters import Array
from fedpeft.errors import ProtocolError

BLOCK = 64
"""Numbers that share a scale."""

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]


class Codec(ABC):
    """How the numbers of a tensor travel; at least one of them, and all finite."""

    @property
    def is_biased(self) -> bool:
        """Whether what it leaves out has to be kept and sent later, for it would else be lost in any mean."""
        return False

    @abstractmethod
    def length(self, size: int) -> int:
        """Bytes of so many numbers, always the same."""

    @abstractmethod
    def encode(self, x: Array, rng: np.random.Generator | None) -> bytes:
        """The numbers ``x`` (n,), taken as fp32. rng: to round at random, right in expectation; None: to nearest."""

    @abstractmethod
    def decode(self, coded: bytes, size: int) -> Floats:
        """So many numbers. Raises ProtocolError, and nothing else, for bytes that ``encode`` can't have written."""

    def need(self, coded: bytes, size: int) -> None:
        """Raise ProtocolError unless the bytes are as many as so many numbers take."""
        if len(coded) != self.length(size):
            raise ProtocolError(f"{size} numbers came in {len(coded)} bytes; want {self.length(size)}")


@dataclass(frozen=True, slots=True)
class Bfloat16(Codec):
    """The nearest bf16, ties to even: off by at most 2^-8 of the number, and 2 bytes a number."""

    @override
    def length(self, size: int) -> int:
        return 2 * size

    @override
    def encode(self, x: Array, rng: np.random.Generator | None) -> bytes:
        bits = x.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()

    @override
    def decode(self, coded: bytes, size: int) -> Floats:
        self.need(coded, size)
        return (np.frombuffer(coded, np.uint16).astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True, slots=True)
class Steps(Codec):
    """A whole number of steps in so many bits: 8 has 127 to each side of zero, 4 has 7, and 2 has 1 (ternary).

    Off by less than a step, which is the block's largest number over 127, 7 or 1, and by at most half of one without
    ``rng``; the scale's rounding adds up to 1/1024 of that. With ``rng`` right in expectation, to 2^-22 of a number.
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits: got {self.bits}; want 2, 4 or 8")

    @property
    def most(self) -> int:
        """Steps from zero to the block's largest."""
        return (1 << self.bits - 1) - 1

    @override
    def length(self, size: int) -> int:
        return -(-size * self.bits // 8) + _heads(size)

    @override
    def encode(self, x: Array, rng: np.random.Generator | None) -> bytes:
        blocks = _blocks(x)
        head, scales = _scaled(np.abs(blocks).max(axis=1))
        steps = _divided(blocks, scales) * self.most
        moved = np.rint(steps) if rng is None else steps + rng.random(steps.shape)
        # The most and nearly 1 are rounded to one more: fp64 has no room between.
        codes = moved.clip(max=self.most).ravel()[: len(x)] + self.most
        return head + _packed(codes.astype(np.uint8), self.bits)  # which leaves out what is behind the point

    @override
    def decode(self, coded: bytes, size: int) -> Floats:
        self.need(coded, size)
        scales = _each(coded, size)
        codes = _unpacked(coded[_heads(size) :], self.bits, size)
        if codes.max() > 2 * self.most:
            raise ProtocolError(f"a number has code {codes.max()}; want at most {2 * self.most} in {self.bits} bits")
        out = codes.astype(np.float32)
        out -= self.most
        out /= self.most
        return out * scales


@dataclass(frozen=True, slots=True)
class Sign(Codec):
    """A bit a number: plus or minus the mean size of its block. Zero comes back as plus."""

    @property
    @override
    def is_biased(self) -> bool:
        return True

    @override
    def length(self, size: int) -> int:
        return -(-size // 8) + _heads(size)

    @override
    def encode(self, x: Array, rng: np.random.Generator | None) -> bytes:
        sums = np.abs(_blocks(x)).sum(axis=1)
        counts = (len(x) - BLOCK * np.arange(len(sums))).clip(max=BLOCK)
        head, _ = _scaled(sums / counts)
        return head + _packed((x >= 0).astype(np.uint8), 1)

    @override
    def decode(self, coded: bytes, size: int) -> Floats:
        self.need(coded, size)
        scales = _each(coded, size)
        return np.where(_unpacked(coded[_heads(size) :], 1, size), scales, -scales)


@dataclass(frozen=True, slots=True)
class TopK(Codec):
    """Only the largest numbers, by size: a bit each for where they are, and themselves by another codec.

    share: of all numbers that are sent, rounded up; values: the codec of those.
    """

    share: float = 0.1
    values: Codec = field(default_factory=lambda: Steps(8))

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: got {self.share}; want more than 0 and at most 1")
        if self.values.is_biased:
            raise ValueError(f"values: got {self.values}; want a codec that is right in expectation, or bf16")

    @property
    @override
    def is_biased(self) -> bool:
        return True

    def count(self, size: int) -> int:
        """How many of so many numbers are sent."""
        return ceil(self.share * size)

    @override
    def length(self, size: int) -> int:
        return -(-size // 8) + self.values.length(self.count(size))

    @override
    def encode(self, x: Array, rng: np.random.Generator | None) -> bytes:
        there = np.zeros(len(x), np.uint8)
        there[np.argpartition(np.abs(x), -self.count(len(x)))[-self.count(len(x)) :]] = 1
        return _packed(there, 1) + self.values.encode(x[there.view(bool)], rng)

    @override
    def decode(self, coded: bytes, size: int) -> Floats:
        self.need(coded, size)
        end = -(-size // 8)
        there = _unpacked(coded[:end], 1, size).view(bool)
        if np.count_nonzero(there) != self.count(size):
            raise ProtocolError(f"{np.count_nonzero(there)} of {size} numbers came; want {self.count(size)}")
        out = np.zeros(size, np.float32)
        out[there] = self.values.decode(coded[end:], self.count(size))
        return out


def _heads(size: int) -> int:
    """Bytes of the scales of so many numbers."""
    return 4 + 2 * -(-size // BLOCK)


def _blocks(x: Array) -> Floats:
    """The numbers as fp32, a row a block, zeros behind them."""
    padded = np.pad(x.astype(np.float32), (0, -len(x) % BLOCK))
    return padded.reshape(len(padded) // BLOCK, BLOCK)


def _scaled(largest: NDArray[Any]) -> tuple[bytes, NDArray[Any]]:
    """The scales of blocks, as bytes and as they will be read: of fp32 numbers none is smaller than it was."""
    top = largest.max()
    exact = _divided(largest[:, None], np.broadcast_to(top, largest.shape)).ravel()
    shares = exact.astype(np.float16)
    shares = np.where(shares < exact, np.nextafter(shares, np.ones_like(shares)), shares)
    return np.float32(top).tobytes() + shares.tobytes(), shares * top


def _each(coded: bytes, size: int) -> Floats:
    """The scale of each of so many numbers."""
    [top], shares = np.frombuffer(coded, np.float32, 1), np.frombuffer(coded[4 : _heads(size)], np.float16)
    if not (0 <= top < np.inf and (shares >= 0).all() and (shares <= 1).all()):
        raise ProtocolError("a block's scale is negative, not finite, or more than the tensor's")
    return np.repeat(shares * top, BLOCK)[:size]


def _divided(rows: NDArray[Any], by: NDArray[Any]) -> NDArray[np.float64]:
    """Each row over its number, in fp64; zero where that is zero."""
    whole, out = by.astype(np.float64)[:, None], np.zeros(rows.shape)
    np.divide(rows, whole, out=out, where=whole > 0)
    return out


def _packed(codes: Bytes, bits: int) -> bytes:
    """Codes of so many bits each, the first in the lowest bits of a byte."""
    each = 8 // bits
    padded = np.pad(codes, (0, -len(codes) % each))
    rows = padded.reshape(len(padded) // each, each) << _shifts(bits)
    whole: Bytes = np.bitwise_or.reduce(rows, axis=1)
    return whole.tobytes()


def _unpacked(coded: bytes, bits: int, size: int) -> Bytes:
    """The inverse of ``_packed``, of so many codes. Raises ProtocolError where there is something behind them."""
    rows: NDArray[Any] = np.frombuffer(coded, np.uint8)[:, None] >> _shifts(bits) & (1 << bits) - 1
    codes: Bytes = rows.ravel()
    if codes[size:].any():
        raise ProtocolError(f"something stands behind the last of {size} numbers; want zeros there")
    return codes[:size]


def _shifts(bits: int) -> Bytes:
    return np.arange(0, 8, bits, dtype=np.uint8)


CODECS: Mapping[str, Codec] = {
    "bf16": Bfloat16(),
    "int4": Steps(4),
    "int8": Steps(8),
    "sign": Sign(),
    "ternary": Steps(2),
}
"""Codecs by name; ``TopK`` is made of another."""
