"""Masks: the stream of a cipher under a secret key, added to a vector or taken from it, modulo 2^32.

A mask of 10 M numbers is 40 MB of key stream, so the work goes piece by piece through a buffer that stays in the
processor's cache: all masks of one piece, then the next piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES256, ChaCha20
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fedpeft.secagg.protocol import Ring

CipherName: TypeAlias = Literal["aes256", "chacha20"]
CIPHERS: Final[tuple[str, ...]] = get_args(CipherName)

LARGEST: Final = 2**36
"""Numbers that one key can mask: ChaCha20 counts its blocks of 16 with 32 bits."""

_KEY: Final = 32
_PIECE: Final = 2**17  # bytes; a power of two keeps every piece at a whole block of either cipher
_SLACK: Final = 64  # update_into asks for up to a block more than it writes


@dataclass(frozen=True, slots=True)
class Mask:
    """A key, and what is done with its stream.

    key: 32 bytes, to be used for one vector only; sign: 1 where the mask is added, -1 where it is taken off.
    """

    key: bytes = field(repr=False)
    sign: int

    def __post_init__(self) -> None:
        if len(self.key) != _KEY or self.sign not in (1, -1):
            raise ValueError(f"a key of {len(self.key)} bytes and sign {self.sign}; want {_KEY} bytes, and 1 or -1")


def add_masks(vector: Ring, masks: Sequence[Mask], cipher: CipherName = "aes256", start: int = 0) -> None:
    """Add all masks to the vector, modulo 2^32 and in place: no second vector is made.

    vector: shape (n,), contiguous; for a ring of 16 or 24 bits its low bits count. start: which number of the whole
    vector its first is, so that slices can be masked one by one, or by several processes.
    Number j of a mask is bytes 4j to 4j + 3 of the key stream, little-endian. "aes256": AES-256 in counter mode, the
    counter's 16 bytes beginning at zero (NIST SP 800-38A). "chacha20": ChaCha20 with a zero nonce, its blocks counted
    from zero (RFC 8439). ValueError for another cipher, or a vector of another kind.
    """
    if (
        vector.dtype != np.dtype("<u4")
        or vector.ndim != 1
        or not (vector.flags.c_contiguous and vector.flags.writeable)
    ):
        raise ValueError(
            f"a vector of {vector.dtype} and shape {vector.shape}; want uint32, (n,), contiguous, writeable"
        )
    if start < 0 or start + vector.size > LARGEST:
        raise ValueError(f"numbers {start} to {start + vector.size}; one key masks numbers 0 to {LARGEST}")
    if cipher not in CIPHERS:
        raise ValueError(f"got cipher {cipher!r}; want one of {', '.join(CIPHERS)}")
    zeros = memoryview(bytes(min(_PIECE, 4 * vector.size)))
    buffer = bytearray(len(zeros) + _SLACK)
    stream = np.frombuffer(buffer, "<u4")
    signed = [(_stream(mask.key, cipher, start), np.add if mask.sign == 1 else np.subtract) for mask in masks]
    for begin in range(0, vector.size, _PIECE // 4):
        piece = vector[begin : begin + _PIECE // 4]
        nothing, numbers = zeros[: piece.nbytes], stream[: piece.size]
        for keyed, apply in signed:
            keyed.update_into(nothing, buffer)
            apply(piece, numbers, out=piece)


def _stream(key: bytes, cipher: CipherName, start: int) -> CipherContext:
    """The cipher's stream from number ``start`` on."""
    if cipher == "aes256":
        block, within = divmod(4 * start, 16)
        found = Cipher(AES256(key), CTR(block.to_bytes(16, "big"))).encryptor()
    else:
        block, within = divmod(4 * start, 64)
        found = Cipher(ChaCha20(key, block.to_bytes(4, "little") + bytes(12)), None).encryptor()
    if within:
        found.update(bytes(within))
    return found
