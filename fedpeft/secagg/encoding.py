"""Bytes that mean one thing only: what the protocol hashes, signs and derives keys from.

Source: this project's suite FP-SA-1. SHA-256 is FIPS 180-4, HKDF is RFC 5869.
"""

import hashlib
import json
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedpeft.errors import ProtocolError

V: Final = b"fedpeft-sa/1/"
"""What every hash, key and signature of this version begins with."""

_WORD: Final = 4
_PLAIN: Final = frozenset({str, int, bool, type(None)})


def lp(*parts: bytes) -> bytes:
    """The parts one after another, each behind its length in 4 bytes, big-endian: no two lists give the same bytes."""
    return b"".join(len(x).to_bytes(_WORD, "big") + x for x in parts)


def parts(data: bytes, most: int) -> list[bytes]:
    """The parts that ``lp`` joined. ProtocolError for more than ``most``, or bytes that are no whole number of them."""
    found: list[bytes] = []
    at = 0
    while at < len(data):
        if len(found) == most:
            raise ProtocolError(f"a message of more than {most} parts; want at most {most}")
        begin = at + _WORD
        at = begin + int.from_bytes(data[at:begin], "big")
        if begin > len(data) or at > len(data):
            raise ProtocolError(f"a message of {len(data)} bytes ends within part {len(found)}; want whole parts")
        found.append(data[begin:at])
    return found


def digest(label: str, *parts: bytes) -> bytes:
    """SHA-256 of the version, the label and the parts: 32 bytes. No other label or list has the same input."""
    return hashlib.sha256(V + label.encode() + b"\0" + lp(*parts)).digest()


def derive_key(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """A key of 32 bytes for one purpose, which ``info`` names.

    secret: at least 32 bytes that only those know who may know the key; salt: the digest of all keys of the session.
    Source: HKDF-SHA256, RFC 5869.
    """
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=V + info).derive(secret)


def canonical(value: Any) -> bytes:
    """The value as JSON with one way to write it: sorted keys, no spaces, ASCII.

    ValueError for a fraction anywhere in it (write it as a decimal string), and for what JSON doesn't have.
    """
    _check(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _check(value: Any) -> None:
    """ValueError for what canonical JSON can't be made of. Most values are leaves: these are looked up."""
    if type(value) in _PLAIN:
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            if type(key) is not str:
                raise ValueError(f"a key of type {type(key).__name__}; canonical JSON takes strings")
            _check(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            if type(inner) not in _PLAIN:
                _check(inner)
    else:
        raise ValueError(
            f"a value of type {type(value).__name__}; canonical JSON takes strings, whole numbers, lists, objects, "
            f"true, false and null: write a fraction as a decimal string"
        )
