"""What makes a client's half of secure aggregation."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from fedpeft.channel import RingChannel
from fedpeft.errors import ProtocolError
from fedpeft.flower.journal import Journal
from fedpeft.secagg import Identity, Params, Policy, Roster
from fedpeft.secagg.messages import Envelope, Kind
from fedpeft.secagg.protocol import Entropy, Protocol


def params_of(message: bytes) -> Params | None:
    """What a message that opens a session says that this is about; None for any other.

    Raises ProtocolError for parameters that can't be read, or that are of another session than the message.
    """
    envelope = _envelope(message)
    if envelope is None or not (envelope.kind == Kind.ASK_KEYS or _asks_at_once(envelope)):
        return None
    params = Params.from_json(bytes(envelope.body))
    if bytes.fromhex(params.session) != envelope.session:
        raise ProtocolError("the parameters are of another session than the message")
    return params


def is_last_word(message: bytes) -> bool:
    """Whether an answer to this message lets a sum be opened: there must be no second one of the same updates.

    Where a session is opened by asking for a vector, its answer is all that it takes.
    """
    envelope = _envelope(message)
    return envelope is not None and (envelope.kind == Kind.ASK_UNMASK or _asks_at_once(envelope))


def step_of(message: bytes) -> str:
    """Which question of its session a message is: those that are answered once have each another one."""
    envelope = _envelope(message)
    return sha256(message).hexdigest() if envelope is None else f"{envelope.kind.name} {envelope.pass_}"


def _envelope(message: bytes) -> Envelope | None:
    try:
        return Envelope.open(message)
    except ProtocolError:
        return None


def _asks_at_once(envelope: Envelope) -> bool:
    return envelope.kind == Kind.ASK_VECTOR and bytes(envelope.body[:1]) == b"{"


@dataclass(frozen=True, slots=True, eq=False)
class Secure:
    """What a client needs to take part in secure rounds, beside what every participant has.

    run: the name of the run, which sessions have to be of; suite: the protocol's name in ``Params``; identity: of a
    client; roster: the one in force, asked for anew with each message, raising ProtocolError for one that is not; rank:
    of a client in a round; params: what a message says that a session is about.
    """

    run: str
    suite: str
    protocol: Protocol
    channel: RingChannel
    identity: Callable[[int], Identity]
    roster: Callable[[], Roster]
    policy: Policy
    journal: Journal
    rank: Callable[[int, int], int]
    params: Callable[[bytes], Params | None] = params_of
    entropy: Entropy = os.urandom
