"""A client's vector in few bytes: each tensor of its layout by a codec, small ones and what stands behind as they are.

Rows and columns of a tensor that hold nothing, as those of directions that a client doesn't train, take a bit each.
All codes go through zstd together, which finds what is left to gain: a quarter on ternary, a few percent on int4.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import zstandard
from numpy.typing import NDArray

from fedpeft.adapters import Array, Layout, Shape
from fedpeft.channel.codecs import BLOCK, Codec, Floats
from fedpeft.errors import ProtocolError

LEAST = 4 * BLOCK
"""Numbers that a tensor has at least to be coded: smaller ones are biases and scales, which gain little."""
LEVEL = 10
"""Of zstd: about 30 MB a second."""


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A vector as it travels. codes: of the large tensors, compressed; rest: the small ones and what is behind."""

    codes: bytes
    rest: Floats


@dataclass(frozen=True, slots=True)
class Coding:
    """A codec, and the layout of the numbers that it is for: what both sides have to agree on."""

    codec: Codec
    layout: Layout

    @property
    def places(self) -> dict[str, slice]:
        """Where in a vector the tensors lie that are coded."""
        return {name: where for name, _, where, is_coded in self._tensors() if is_coded}

    @property
    def behind(self) -> int:
        """How many numbers of the layout are not coded."""
        return sum(prod(shape) for _, shape, _, is_coded in self._tensors() if not is_coded)

    @property
    def most(self) -> int:
        """Bytes of the codes before they are compressed, at most: what no peer can make this side go beyond."""
        sizes = [(shape[0], prod(shape)) for _, shape, _, is_coded in self._tensors() if is_coded]
        return sum(_bytes(rows) + _bytes(size // rows) + self.codec.length(size) for rows, size in sizes)

    def encode(self, x: Array, rng: np.random.Generator | None) -> Coded:
        """A vector, the first numbers of which are the layout's. ValueError for one that is too short, or not finite.

        rng: for codecs that round at random; None: they round to nearest.
        """
        if len(x) < self.layout.size or not np.isfinite(x).all():
            raise ValueError(f"x: got {len(x)} numbers; want at least {self.layout.size}, none of them NaN or infinite")
        codes: list[bytes] = []
        rest: list[Array] = []
        for _, shape, where, is_coded in self._tensors():
            if not is_coded:
                rest.append(x[where])
                continue
            grid = x[where].reshape(shape[0], prod(shape[1:]))
            rows, columns = grid.any(axis=1), grid.any(axis=0)
            inside = grid[rows][:, columns].ravel()
            codes += [np.packbits(rows).tobytes(), np.packbits(columns).tobytes()]
            codes += [self.codec.encode(inside, rng)] if len(inside) else []
        rest.append(x[self.layout.size :])
        return Coded(_deflated(b"".join(codes)), np.concatenate(rest).astype(np.float32))

    def decode(self, coded: Coded) -> Floats:
        """The vector, in fp32: as long as what was encoded. Raises ProtocolError, and nothing else, for what isn't one.

        It takes no more memory than the vector and ``most`` bytes, whatever came.
        """
        if len(coded.rest) < self.behind:
            raise ProtocolError(f"{len(coded.rest)} numbers came beside the codes; want at least {self.behind}")
        stream, rest = _Stream(_inflated(coded.codes, self.most)), coded.rest
        out = np.zeros(self.layout.size + len(rest) - self.behind, np.float32)
        for _, shape, where, is_coded in self._tensors():
            if not is_coded:
                out[where], rest = np.split(rest, [where.stop - where.start])
                continue
            grid = out[where].reshape(shape[0], prod(shape[1:]))
            rows, columns = (stream.mask(size) for size in grid.shape)
            if size := len(rows) * len(columns):
                inside = self.codec.decode(stream.take(self.codec.length(size)), size)
                grid[np.ix_(rows, columns)] = inside.reshape(len(rows), len(columns))
        stream.end()
        out[self.layout.size :] = rest
        return out

    def _tensors(self) -> Iterator[tuple[str, Shape, slice, bool]]:
        """Name and shape of each tensor, where it lies, and whether it is coded."""
        for name, (start, shape) in self.layout.places.items():
            yield name, shape, slice(start, start + prod(shape)), prod(shape) >= LEAST


@dataclass(slots=True)
class _Stream:
    """Bytes that are read from the beginning to the end."""

    content: bytes
    at: int = 0

    def take(self, size: int) -> bytes:
        """The next so many bytes."""
        self.at += size
        if self.at > len(self.content):
            raise ProtocolError(f"the codes end {self.at - len(self.content)} bytes too soon")
        return self.content[self.at - size : self.at]

    def mask(self, size: int) -> NDArray[np.intp]:
        """Where the next so many bits are set."""
        bits = np.unpackbits(np.frombuffer(self.take(_bytes(size)), np.uint8))
        if bits[size:].any():
            raise ProtocolError(f"something stands behind a mask of {size} bits; want zeros there")
        return np.flatnonzero(bits)

    def end(self) -> None:
        """Raise ProtocolError unless all was read."""
        if self.at < len(self.content):
            raise ProtocolError(f"{len(self.content) - self.at} bytes stand behind the codes")


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _deflated(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=LEVEL).compress(content)


def _inflated(coded: bytes, most: int) -> bytes:
    """What was compressed, of at most so many bytes: a frame that doesn't say how many it holds is refused."""
    try:
        size = zstandard.get_frame_parameters(coded).content_size
        if size > most:  # as one that isn't said is
            raise ProtocolError(f"the codes take {size} bytes; want at most {most}")
        return zstandard.ZstdDecompressor().decompress(coded, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ProtocolError(f"the codes are not compressed as they should be: {error}") from None
