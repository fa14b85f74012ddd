"""What a session hashes, signs and makes keys of, byte by byte; the same for both halves of the protocol.

Every key, commitment and signature names the session's first transcript (``th1``): all public keys, who signed them,
and the parameters. What belongs to a pass after the first also names the pass and what the server broadcast for it, so
that clients which were told different things have masks that don't cancel.
Source: suite FP-SA-1; Bonawitz et al., "Practical secure aggregation", CCS 2017, figure 4.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final, Literal, TypeAlias

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedpeft.secagg.encoding import V, derive_key, digest
from fedpeft.secagg.protocol import Refused

Kind: TypeAlias = Literal["b", "s"]

KEY: Final = 32
SIGNATURE: Final = 64
DIGEST: Final = 32

_PROBE: Final = bytes(range(1, 33))


def private(secret: bytes) -> X25519PrivateKey:
    """The X25519 private key that 32 secret bytes are. It costs as much as an exchange: make it once."""
    return X25519PrivateKey.from_private_bytes(secret)


def public_of(secret: bytes) -> bytes:
    """The X25519 public key of 32 secret bytes."""
    return private(secret).public_key().public_bytes_raw()


def agree(secret: bytes | X25519PrivateKey, theirs: bytes, culprit: bytes) -> bytes:
    """What two parties know and nobody else (RFC 7748). Refused, with whose key it is, for one of small order."""
    mine = private(secret) if isinstance(secret, bytes) else secret
    try:
        return mine.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError as error:
        raise Refused("key", f"{culprit.hex()[:8]} has a public key that gives no secret", culprit) from error


def check_form(key: bytes, culprit: bytes) -> None:
    """Refused for a public key that could be another's, written in a second way."""
    if int.from_bytes(key, "little") >= 2**255 - 19:
        raise Refused("key", f"{culprit.hex()[:8]} has a public key that is not written in the one way", culprit)


def check_key(key: bytes, culprit: bytes) -> None:
    """Refused for a public key that gives no secret, or is not written in the one way."""
    check_form(key, culprit)
    agree(_PROBE, key, culprit)


def advert_text(ctx: bytes, keys: Sequence[bytes]) -> bytes:
    """What a client signs of its public keys: the one shares are sealed to, then the mask key of each pass.

    ctx: the digest of the session's parameters.
    """
    return V + b"adv" + ctx + b"".join(keys)


def first(ctx: bytes, adverts: Iterable[Sequence[bytes]]) -> bytes:
    """th1. adverts: (id, keys..., signature) of everyone, ascending by id."""
    return digest("U1", ctx, *(part for advert in adverts for part in advert))


def of_pass(pass_: int, shared: bytes) -> bytes:
    """What the labels of a pass end in: nothing for the first."""
    return bytes([pass_]) + shared if pass_ else b""


def sealing_key(
    secret: X25519PrivateKey, theirs: bytes, th1: bytes, sender: bytes, receiver: bytes, other: bytes
) -> bytes:
    """The key of the one message with shares from ``sender`` to ``receiver``. other: whose public key ``theirs`` is."""
    return derive_key(agree(secret, theirs, other), th1, b"enc" + sender + receiver)


def pair_key(secret: X25519PrivateKey, theirs: bytes, th1: bytes, me: bytes, other: bytes, suffix: bytes) -> bytes:
    """The key of the mask that two clients share in a pass; the same from either side."""
    low, high = sorted((me, other))
    return derive_key(agree(secret, theirs, other), th1, b"mask" + low + high + suffix)


def pair_sign(me: bytes, other: bytes) -> Literal[1, -1]:
    """With which sign ``me`` adds the mask that it shares with ``other``, so that the two cancel."""
    return 1 if me < other else -1


def self_key(seed: bytes, th1: bytes, me: bytes, suffix: bytes) -> bytes:
    """The key of the mask that only one client knows in a pass."""
    return derive_key(seed, th1, b"self" + me + suffix)


def seed_commitment(th1: bytes, owner: bytes, seed: bytes, pass_: int) -> bytes:
    """What binds a client to its seed before it's known."""
    return digest("b", th1, owner, seed, *_later(pass_))


def share_commitment(kind: Kind, th1: bytes, owner: bytes, holder: bytes, share: bytes, pass_: int) -> bytes:
    """What binds the owner of a secret to the share that it gave to a holder, and the holder to that it got."""
    return digest("sh" + kind, th1, owner, holder, share, *_later(pass_))


def shares_text(th1: bytes, commitments: Iterable[bytes]) -> bytes:
    """What a client signs of its commitments: to the seed of each pass; then pass by pass, and holder by holder
    ascending, to the holder's share of the seed, and of the mask key."""
    return V + b"shares" + digest("sharemsg", th1, *commitments)


def vector_text(th1: bytes, pass_: int, packed: bytes | memoryview) -> bytes:
    """What a client signs of its masked vector: digest("y", th1, pass, packed), without a copy of the vector."""
    found = hashlib.sha256(V + b"y\0")
    view = memoryview(packed)
    for part in (th1, bytes([pass_]), view):
        found.update(len(part).to_bytes(4, "big"))
        found.update(part)
    return V + b"masked" + found.digest()


def survivors_text(th1: bytes, pass_: int, shared: bytes, survivors: Sequence[bytes]) -> bytes:
    """What a client signs of who survived a pass: ascending ids."""
    about = (bytes([pass_]), shared) if pass_ else ()
    return V + b"cons" + digest("U3", th1, *about, *survivors)


def abort_text(session: bytes, code: bytes, culprit: bytes) -> bytes:
    """What a client signs when it refuses. culprit: an id, or nothing."""
    return V + b"abort" + digest("abort", session, code, culprit)


def _later(pass_: int) -> tuple[bytes, ...]:
    return (bytes([pass_]),) if pass_ else ()
