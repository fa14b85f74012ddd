"""The messages of ``full`` and ``kregular``, as bytes and back.

A message is its kind (1 byte), the session (16), the pass (1) and a body of rows whose size is known before it is read,
from what the session has agreed on so far. So each reading has one outcome, takes no more room than the message, and
ProtocolError is what follows from anything else.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import Final, Self

from fedpeft.errors import ProtocolError
from fedpeft.secagg.identity import ID_SIZE, SIGNATURE_SIZE, Identity, verify
from fedpeft.secagg.shamir import SIZE as SHARE
from fedpeft.secagg.transcript import DIGEST, KEY, abort_text

SESSION: Final = 16
_HEAD: Final = 2 + SESSION
_TAG: Final = 16  # of ChaCha20-Poly1305
_POINT: Final = 2
_MOST_CODE: Final = 64
NOBODY: Final = b""


class Kind(IntEnum):
    """What a message is: the server's begin with 0, the clients' with 1."""

    ASK_KEYS = 0x01
    ASK_SHARES = 0x02
    ASK_VECTOR = 0x03
    ASK_SURVIVORS = 0x04
    ASK_UNMASK = 0x05
    KEYS = 0x11
    SHARES = 0x12
    VECTOR = 0x13
    SURVIVORS = 0x14
    UNMASK = 0x15
    ABORT = 0x1F


@dataclass(frozen=True, slots=True, eq=False)
class Envelope:
    """What every message begins with. body: a view of the bytes that follow, of which none are copied."""

    kind: Kind
    session: bytes
    pass_: int
    body: memoryview = field(repr=False)

    @classmethod
    def open(cls, message: object) -> Self:
        """The parts of a message. ProtocolError for what has no such beginning, or is no bytes."""
        if not isinstance(message, bytes | bytearray | memoryview):
            raise ProtocolError(f"a message of type {type(message).__name__}; want bytes")
        view = memoryview(message)
        if view.nbytes < _HEAD or view.itemsize != 1 or view.ndim != 1 or not view.contiguous:
            raise ProtocolError(f"a message of {view.nbytes} bytes; want at least {_HEAD}")
        try:
            kind = Kind(view[0])
        except ValueError:
            raise ProtocolError(f"a message of kind {view[0]}, which there is not") from None
        return cls(kind, bytes(view[1 : 1 + SESSION]), view[_HEAD - 1], view[_HEAD:])


def enclose(kind: Kind, session: bytes, pass_: int, *body: bytes) -> bytes:
    """The message with this body."""
    return b"".join((bytes([kind]), session, bytes([pass_]), *body))


def session_of(message: bytes) -> bytes | None:
    """The session that a message says it belongs to: 16 bytes. None for what is no message of this protocol."""
    try:
        return Envelope.open(message).session
    except ProtocolError:
        return None


def rows(body: memoryview, size: int, most: int, what: str) -> list[bytes]:
    """A body of rows of ``size`` bytes each. ProtocolError for more than ``most``, or a last one that is cut off."""
    if size < 1 or body.nbytes % size or body.nbytes > most * size:
        raise ProtocolError(f"{body.nbytes} bytes of {what}; want at most {most} rows of {size}")
    return [bytes(body[i : i + size]) for i in range(0, body.nbytes, size)]


def cut(body: memoryview, sizes: Iterable[int], what: str) -> list[bytes]:
    """A body cut into pieces of these sizes. ProtocolError for any other length."""
    sizes = tuple(sizes)
    if body.nbytes != sum(sizes):
        raise ProtocolError(f"{body.nbytes} bytes of {what}; want {sum(sizes)}")
    found, at = [], 0
    for size in sizes:
        found.append(bytes(body[at : at + size]))
        at += size
    return found


@dataclass(frozen=True, slots=True)
class Advert:
    """A client's public keys of one session. box: what shares are sealed to; masks: a mask key for each pass."""

    id: bytes
    box: bytes
    masks: tuple[bytes, ...]
    signature: bytes

    @staticmethod
    def size(passes: int) -> int:
        """Bytes of one."""
        return ID_SIZE + KEY * (1 + passes) + SIGNATURE_SIZE

    @property
    def keys(self) -> tuple[bytes, ...]:
        """All public keys in order."""
        return (self.box, *self.masks)

    @property
    def parts(self) -> tuple[bytes, ...]:
        """What the session's first transcript says of it."""
        return (self.id, *self.keys, self.signature)

    def to_bytes(self) -> bytes:
        """A row of a list of adverts."""
        return b"".join(self.parts)

    @classmethod
    def read(cls, row: bytes | memoryview, passes: int) -> Self:
        """The advert of one row. ProtocolError for another length."""
        sizes = (ID_SIZE, *[KEY] * (1 + passes), SIGNATURE_SIZE)
        id_, box, *masks, signature = cut(memoryview(row), sizes, "an advert")
        return cls(id_, box, tuple(masks), signature)


@dataclass(frozen=True, slots=True)
class Dealt:
    """What a client sends of its secrets: sealed shares, commitments and a signature over these.

    sealed: along its neighbours, ascending; seeds: a commitment for each pass; shares: along its passes and within one
    along its holders (itself included), ascending: (commitment to the seed's share, to the mask key's).
    """

    sealed: tuple[bytes, ...]
    seeds: tuple[bytes, ...]
    shares: tuple[tuple[tuple[bytes, bytes], ...], ...]
    signature: bytes

    @staticmethod
    def sealed_size(passes: int) -> int:
        """Bytes of the sealed shares for one holder."""
        return _POINT + 2 * SHARE * passes + _TAG

    @property
    def commitments(self) -> tuple[bytes, ...]:
        """All that is signed, in order."""
        return (*self.seeds, *(one for of_pass in self.shares for both in of_pass for one in both))

    def to_bytes(self) -> bytes:
        """The body of the message."""
        return b"".join((*self.sealed, *self.commitments, self.signature))

    @classmethod
    def read(cls, body: memoryview, neighbours: int, passes: int) -> Self:
        """The body of one who has so many neighbours. ProtocolError for another length."""
        holders = neighbours + 1
        sizes = [cls.sealed_size(passes)] * neighbours + [DIGEST] * (passes + 2 * holders * passes) + [SIGNATURE_SIZE]
        found = cut(body, sizes, "shares")
        sealed, seeds = found[:neighbours], found[neighbours : neighbours + passes]
        flat = found[neighbours + passes : -1]
        both = list(zip(flat[::2], flat[1::2], strict=True))
        shares = tuple(tuple(both[i : i + holders]) for i in range(0, len(both), holders))
        return cls(tuple(sealed), tuple(seeds), shares, found[-1])


@dataclass(frozen=True, slots=True)
class Parcel:
    """What a holder is sent of one other client: the sealed shares, and what their owner has committed to.

    commitments: for each pass, to this holder's share of the seed, and of the mask key: so that a holder who says
    nothing has shares that fit, and a share that doesn't fit later on is the holder's own doing.
    """

    owner: bytes
    sealed: bytes
    commitments: tuple[tuple[bytes, bytes], ...]

    @staticmethod
    def size(passes: int) -> int:
        """Bytes of one."""
        return ID_SIZE + Dealt.sealed_size(passes) + 2 * DIGEST * passes

    def to_bytes(self) -> bytes:
        """A row of a list of parcels."""
        return b"".join((self.owner, self.sealed, *(one for both in self.commitments for one in both)))

    @classmethod
    def read(cls, row: bytes, passes: int) -> Self:
        """The parcel of one row."""
        sizes = (ID_SIZE, Dealt.sealed_size(passes), *[DIGEST] * (2 * passes))
        owner, sealed, *flat = cut(memoryview(row), sizes, "sealed shares")
        return cls(owner, sealed, tuple(zip(flat[::2], flat[1::2], strict=True)))


@dataclass(frozen=True, slots=True)
class Opened:
    """A holder's shares of one owner's two secrets, for each pass. Secret."""

    point: int
    shares: tuple[tuple[bytes, bytes], ...] = field(repr=False)

    def to_bytes(self) -> bytes:
        """What is sealed."""
        return self.point.to_bytes(_POINT, "big") + b"".join(one for both in self.shares for one in both)

    @classmethod
    def read(cls, plain: bytes, passes: int) -> Self:
        """What was sealed. ProtocolError for another length."""
        point, *flat = cut(memoryview(plain), (_POINT, *[SHARE] * (2 * passes)), "shares")
        return cls(int.from_bytes(point, "big"), tuple(zip(flat[::2], flat[1::2], strict=True)))


@dataclass(frozen=True, slots=True, eq=False)
class Vector:
    """A masked vector and its signature. packed: a view of the message, not a copy."""

    signature: bytes
    packed: memoryview = field(repr=False)

    @classmethod
    def read(cls, body: memoryview, size: int) -> Self:
        """The vector of ``size`` bytes. ProtocolError for another length."""
        if body.nbytes != SIGNATURE_SIZE + size:
            raise ProtocolError(f"a vector of {body.nbytes} bytes with its signature; want {SIGNATURE_SIZE + size}")
        return cls(bytes(body[:SIGNATURE_SIZE]), body[SIGNATURE_SIZE:])


def read_signatures(body: memoryview, most: int) -> list[tuple[bytes, bytes]]:
    """Rows of (id, signature)."""
    found = rows(body, ID_SIZE + SIGNATURE_SIZE, most, "signatures")
    return [(row[:ID_SIZE], row[ID_SIZE:]) for row in found]


def read_ids(body: memoryview, most: int) -> list[bytes]:
    """Rows of ids."""
    return rows(body, ID_SIZE, most, "ids")


def read_shares(body: memoryview, count: int) -> list[bytes]:
    """Exactly so many shares."""
    return cut(body, [SHARE] * count, "shares")


@dataclass(frozen=True, slots=True)
class Abort:
    """A client's word that it goes no further, and why. culprit: whose message it can't accept, or nobody's."""

    code: str
    culprit: bytes
    signature: bytes

    @classmethod
    def of(cls, me: Identity, session: bytes, code: str, culprit: bytes | None) -> Self:
        """A signed one."""
        blamed = culprit or NOBODY
        return cls(code, blamed, me.sign(abort_text(session, code.encode(), blamed)))

    def is_of(self, id_: bytes, session: bytes) -> bool:
        """Whether this client has signed it, for this session."""
        return verify(id_, self.signature, abort_text(session, self.code.encode(), self.culprit))

    def to_bytes(self) -> bytes:
        """The body of the message."""
        code = self.code.encode("ascii")
        return b"".join((bytes([len(code)]), code, bytes([len(self.culprit)]), self.culprit, self.signature))

    @classmethod
    def read(cls, body: memoryview) -> Self:
        """The abort of a body. ProtocolError for what is none, or a code that is no short plain word."""
        size = body[0] if body.nbytes else 0
        named = body[1 + size] if 1 + size < body.nbytes else 0
        if not 1 <= size <= _MOST_CODE or named not in (0, ID_SIZE):
            raise ProtocolError(f"an abort of {body.nbytes} bytes; want a short code, an id or none, and a signature")
        _, word, _, culprit, signature = cut(body, (1, size, 1, named, SIGNATURE_SIZE), "an abort")
        code = word.decode("ascii", "replace")
        if not code.replace("-", "").isalnum() or not code.isascii():
            raise ProtocolError("an abort whose code is no plain word")
        return cls(code, culprit, signature)


def is_ascending(ids: Sequence[bytes]) -> bool:
    """Whether each is there once, and they are in order."""
    return all(a < b for a, b in pairwise(ids))
