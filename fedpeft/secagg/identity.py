"""Who a party is: an Ed25519 key pair, whose public half is its id.

Source: RFC 8032.
"""

from dataclasses import dataclass, field
from typing import NoReturn, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

ID_SIZE = 32
SEED_SIZE = 32
SIGNATURE_SIZE = 64

_FIELD = 2**255 - 19
_Y_OF_ORDER_8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_WEAK = frozenset({0, 1, _FIELD - 1, _Y_OF_ORDER_8, _FIELD - _Y_OF_ORDER_8})


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """A party that can sign.

    id: the public key, 32 bytes, which everybody may know. The private key is in no text and no pickle: ``to_bytes``
    is the one way to keep it.
    """

    id: bytes
    _key: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def of(cls, seed: bytes) -> Self:
        """The identity whose private key is these 32 secret bytes. ValueError for another number of bytes."""
        if len(seed) != SEED_SIZE:
            raise ValueError(f"got {len(seed)} bytes; want the {SEED_SIZE} of an Ed25519 private key")
        key = Ed25519PrivateKey.from_private_bytes(seed)
        return cls(key.public_key().public_bytes_raw(), key)

    def sign(self, message: bytes) -> bytes:
        """A signature of 64 bytes, the same for the same message."""
        return self._key.sign(message)

    def to_bytes(self) -> bytes:
        """The private key, 32 bytes: what ``of`` takes. Secret."""
        return self._key.private_bytes_raw()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an identity is not pickled, since its private key would be in the pickle; use to_bytes")


def verify(id: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the party of this id signed this message. False for whatever is no id or no signature, too."""
    if not is_id(id):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(id).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def is_id(id: bytes) -> bool:
    """Whether these bytes can be somebody's id: 32 of them, and none of the points of small order.

    Under such a point anybody can sign, without a private key.
    """
    if len(id) != ID_SIZE:
        return False
    y = int.from_bytes(id, "little") & ((1 << 255) - 1)  # the highest bit is the sign of x
    return y % _FIELD not in _WEAK
