"""Messages of a secure session, as Flower records: the protocol's own bytes, which only the protocol can read.

A message to a client may have a request with it: the model to train on, or what was broadcast for a pass. That record
is the same for all clients of a rank, and is packed once.
"""

from dataclasses import dataclass

import numpy as np
from flwr.app import RecordDict

from fedpeft.errors import ProtocolError
from fedpeft.flower import facts as read
from fedpeft.flower.packing import Parcel, apart, pack, together, unpack

QUERY, TRAIN = "query.secure", "train.secure"
_MESSAGE = "message"


@dataclass(frozen=True, slots=True, eq=False)
class Sealed:
    """What a client is sent. thread: which of the coordinator's sessions it belongs to; request: what is to be trained
    on, or None."""

    settings: str
    thread: str
    message: bytes
    request: RecordDict | None = None


def pack_sealed(sealed: Sealed) -> RecordDict:
    """A message to a client."""
    facts = {"settings": sealed.settings, "thread": sealed.thread}
    content = pack(Parcel("secure", facts, {_MESSAGE: np.frombuffer(sealed.message, np.uint8)}))
    return content if sealed.request is None else together(content, sealed.request)


def unpack_sealed(content: RecordDict) -> Sealed:
    """The inverse of ``pack_sealed``; the request is not looked at. Raises ProtocolError."""
    mine, request = apart(content)
    parcel = unpack(mine, "secure")
    read.exactly(parcel.facts, ("settings", "thread"))
    thread = read.text(parcel.facts, "thread")
    if not 1 <= len(thread) <= 64 or not thread.isalnum():
        raise ProtocolError(f"thread is {thread[:80]!r}; want 1 to 64 letters and digits")
    return Sealed(read.text(parcel.facts, "settings"), thread, _message(parcel), request)


def pack_reply(message: bytes) -> RecordDict:
    """A client's answer: nothing of the client is beside the protocol's bytes."""
    return pack(Parcel("secured", {}, {_MESSAGE: np.frombuffer(message, np.uint8)}))


def unpack_reply(content: RecordDict) -> bytes:
    """The inverse of ``pack_reply``. Raises ProtocolError."""
    parcel = unpack(content, "secured")
    read.exactly(parcel.facts, ())
    return _message(parcel)


def _message(parcel: Parcel) -> bytes:
    x = parcel.tensors.get(_MESSAGE)
    if x is None or len(parcel.tensors) != 1 or x.dtype != np.uint8 or x.ndim != 1:
        told = {n: f"{x.dtype} {x.shape}" for n, x in list(parcel.tensors.items())[:3]}
        raise ProtocolError(f"the message holds {told}; want one vector of uint8, {_MESSAGE!r}")
    return x.tobytes()
