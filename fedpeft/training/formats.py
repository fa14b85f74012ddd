"""Matrices in 8 or 4 bits a number, as plain arrays: packing needs numpy alone, and reading a table of 16 levels.

"int8": each row has one scale, its largest magnitude over 127, and codes from -127 to 127. "nf4" and "int4": each
row is cut into blocks of 64 columns, the last of which may be shorter; a block has one scale in fp16, and a number is
its scale times one of 16 levels, whose index is its code. nf4's levels are quantiles of a normal distribution, from -1
to 1, and the scale is the largest magnitude. int4's are the integers from -8 to 7, and the scale is the number of
largest magnitude over -8, so that it is met exactly and its sign may be either.
Source of nf4: Dettmers et al., arXiv:2305.14314, appendix E.

Two codes share a byte, the first in its low half; a row of odd length ends with a half that means nothing. A level's
index is the integer in two's complement, so that the bytes of an int4 matrix with an even number of columns are those
of an ONNX tensor of type INT4, and its scales those of ``DequantizeLinear`` along axis 1 with blocks of 64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters import Spec

Format: TypeAlias = Literal["int8", "nf4", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)

BLOCK = 64
"""Columns that share a scale in the formats of 4 bits."""

EXPANDED = 1 << 22
"""Numbers of a weight that are expanded at a time: 16 MiB in fp32, and all of most layers."""

LEVELS: Mapping[Format, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "int4": (*map(float, range(8)), *map(float, range(-8, 0))),
}
"""What the 16 codes of a format of 4 bits stand for, before the scale."""

_PACKING = 1  # of how matrices are packed: raise it when that changes

_LARGEST = 65504.0  # in fp16
_AT_ONCE = 1 << 16  # numbers packed in one go: temporary arrays stay in the processor's cache


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A matrix (d, columns). codes: int8 (d, columns), or uint8 (d, ⌈columns / 2⌉) of two codes each; scales: fp32
    (d,), or fp16 (d, ⌈columns / 64⌉)."""

    format: Format
    columns: int
    codes: NDArray[Any]
    scales: NDArray[Any]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def pack(weight: NDArray[Any], format: Format) -> Packed:
    """The matrix nearest to ``weight`` (d, k) that the format has, for the scales that it prescribes.

    ValueError for what is no matrix, for numbers that are not finite, and in 4 bits for some beyond fp16's largest.
    """
    if weight.ndim != 2 or not weight.size:
        raise ValueError(f"got an array of shape {weight.shape}; want a matrix with rows and columns")
    rows = max(1, _AT_ONCE // weight.shape[1])
    ways = {"int8": _by_row, "nf4": _by_quantile, "int4": _by_integer}
    parts = [ways[format](_checked(weight[i : i + rows], format)) for i in range(0, len(weight), rows)]
    codes, scales = (np.concatenate(x) for x in zip(*parts, strict=True))
    return Packed(format, weight.shape[1], codes, scales)


def unpack(packed: Packed) -> NDArray[np.float32]:
    """The matrix (d, columns) in fp32."""
    if packed.format == "int8":
        return packed.codes.astype(np.float32) * packed.scales[:, None].astype(np.float32)
    halves = np.stack([packed.codes & 15, packed.codes >> 4], axis=-1).reshape(len(packed.codes), -1)
    levels = np.array(LEVELS[packed.format], np.float32)[halves[:, : packed.columns]]
    scales = np.repeat(packed.scales.astype(np.float32), BLOCK, axis=1)[:, : packed.columns]
    return levels * scales


def bits(format: Format, columns: int) -> float:
    """Bits that a number takes, its share of the scale among them, in a matrix of so many columns."""
    if format == "int8":
        return 8 + 32 / columns
    return (8 * -(-columns // 2) + 16 * -(-columns // BLOCK)) / columns


def _checked(weight: NDArray[Any], format: Format) -> NDArray[np.float32]:
    x = weight.astype(np.float32)
    top = float(np.abs(x).max())
    if not np.isfinite(top):
        raise ValueError("the weights are not all finite: the model is damaged")
    if format != "int8" and top > _LARGEST:
        raise ValueError(f"a weight's magnitude is {top:g}; {format} has at most {_LARGEST:g}: use int8")
    return x


def _by_row(x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    scales = np.abs(x).max(axis=1) / np.float32(127)
    scales[scales < np.finfo(np.float32).tiny] = 0  # whose inverse is no number
    return np.rint(x * _inverse(scales)[:, None]).astype(np.int8), scales


def _by_quantile(x: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    blocks = _blocks(x)
    scales = np.abs(blocks).max(axis=2).astype(np.float16)
    shares = blocks * _inverse(scales)[..., None]
    levels = np.array(LEVELS["nf4"])
    codes = np.zeros(blocks.shape, np.uint8)
    for between in ((levels[:-1] + levels[1:]) / 2).astype(np.float32):
        codes += shares > between
    return _halves(codes, x.shape[1]), scales


def _by_integer(x: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    blocks = _blocks(x)
    low, high = blocks.min(axis=2), blocks.max(axis=2)
    scales = (np.where(-low >= high, low, high) / np.float32(-8)).astype(np.float16)
    codes = np.rint(blocks * _inverse(scales)[..., None]).clip(-8, 7)
    return _halves(codes.astype(np.int8).view(np.uint8) & 15, x.shape[1]), scales


def _inverse(scales: NDArray[Any]) -> NDArray[np.float32]:
    """One over the scales, in fp32; zero where they are zero, as they are for numbers too small for them."""
    wide = scales.astype(np.float32)
    return np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)


def _blocks(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """(rows, blocks, 64), the last block filled up with zeros."""
    count = -(-x.shape[1] // BLOCK)
    return np.pad(x, ((0, 0), (0, count * BLOCK - x.shape[1]))).reshape(len(x), count, BLOCK)


def _halves(codes: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """(rows, blocks, 64) codes as (rows, ⌈columns / 2⌉) bytes."""
    flat = codes.reshape(len(codes), -1)[:, : columns + columns % 2]
    both: NDArray[np.uint8] = np.bitwise_or(flat[:, 0::2], flat[:, 1::2] << 4, dtype=np.uint8)
    return both


def packed_fingerprint(plain: str, quantise: str, formats: Sequence[str] = ()) -> str:
    """The fingerprint of a base whose matrices are packed in a format; for "none", its own, which is ``plain``.

    formats: where clients may hold one base in several, these, and then the fingerprint is the same for all of them.
    """
    if formats:
        return _digest(plain, "any of", *sorted({*formats}), str(_PACKING))
    return plain if quantise == "none" else _digest(plain, quantise, str(_PACKING))


def of_run(base: str, spec: Spec) -> str:
    """The fingerprint of a base with an adapter of this shape, which two sides of a run must share.

    base: a ``packed_fingerprint``.
    """
    return sha256(f"{base} {spec.digest}".encode()).hexdigest()


def _digest(*lines: str) -> str:
    return sha256("\n".join(lines).encode()).hexdigest()
