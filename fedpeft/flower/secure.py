"""The coordinator's side of a secure round: carries the protocol's messages to clients, and their answers back.

Which clients are in a session, and what they may be asked, is the protocol's business. Nothing of an answer is kept
here, and what a client sends beside the protocol's bytes is refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from secrets import token_hex

from flwr.app import RecordDict

from fedpeft.errors import ProtocolError
from fedpeft.flower.answers import Refusal
from fedpeft.flower.drive import OnReply, Writer
from fedpeft.flower.fleet import Fleet
from fedpeft.flower.post import Leg, Letter, Post, Reply, Traffic
from fedpeft.flower.sealed import QUERY, TRAIN, Sealed, pack_sealed, unpack_reply
from fedpeft.rounds import SecureRound
from fedpeft.secagg.protocol import Phase

HELPER = "helper"
OPENS = ("unmask", HELPER)
"""The phases after which a sum of these updates may be known to somebody."""


def _ignore(client: int, problem: str | None) -> None:
    pass


def drive_secure(
    fleet: Fleet,
    round: SecureRound,
    deadline: float,
    patience: float,
    helper: Callable[[bytes], bytes] | None = None,
    on_reply: OnReply = _ignore,
) -> Traffic:
    """Run one session to its end, phase by phase, each closed when it is settled or when its time is up.

    deadline: seconds for a phase in which clients train, patience: for any other; helper: asks the second server, where
    the protocol has one; on_reply: told each client that answered, with the reason if its answer was refused. What is
    wrong with an answer is counted in the round and never raised; what ends the round, such as a ProtocolError of
    ``helper``, shows in ``round.result``.
    """
    post = Post(fleet.grid, QUERY, str(round.state.task.round), fleet.clock, fleet.sleep)
    thread, legs = token_hex(8), list[Leg]()
    while not round.is_over:
        phase, began, before = round.phase, fleet.clock(), post.traffic
        post.kind = TRAIN if phase.carries != "nothing" or phase.name == "vectors" else QUERY
        seconds = deadline if phase.carries == "model" else patience
        asked, answered = len(round.waiting), 0
        for client in post.push(list(_letters(fleet, round, thread)), seconds):
            round.refuse(client, "the message could not be sent")
        for reply in post.replies(seconds, lambda: round.is_settled):
            problem = _receive(round, reply)
            if problem is None:
                answered += 1
                fleet.holds[reply.letter.client].add(reply.letter.digest)
            on_reply(reply.letter.client, problem)
        round.close()
        legs.append(_leg(phase, fleet.clock() - began, before, post.traffic, asked, answered))
        if (question := round.to_helper()) is not None:
            legs.append(_helped(round, phase, question, helper, fleet.clock))
    return replace(post.traffic, legs=tuple(legs))


def retried(
    fleet: Fleet,
    open_round: Callable[[int, frozenset[int]], SecureRound],
    deadline: float,
    patience: float,
    helper: Callable[[bytes], bytes] | None = None,
    on_reply: OnReply = _ignore,
    attempts: int = 3,
) -> tuple[SecureRound, Traffic]:
    """A round in one session, or in a few where cheats end it: the last session's round, and what all of them cost.

    open_round: makes the round of an attempt (0, 1, …) without some clients, with a session of its own; a ProtocolError
    of it, where too few are left, is raised of the first attempt, and ends the others. Another attempt is made only
    where who is to blame is known, and nobody has been asked for what opens a sum: two sums of the same updates would
    tell what the clients of one of them did. So there is no other attempt where clients send at once all that it takes.
    Who has trained does not train again.
    """
    without: frozenset[int] = frozenset()
    spent, began = Traffic(), fleet.clock()
    for attempt in range(attempts):
        try:
            round = open_round(attempt, without)
        except ProtocolError:
            if not attempt:
                raise
            break
        start = fleet.clock() - began
        traffic = drive_secure(fleet, round, deadline, patience, helper, on_reply)
        spent = spent.then(traffic, start)
        names = [leg.name for leg in traffic.legs]
        is_open = round.session.total is not None or not set(OPENS).isdisjoint(names) or names[:1] == ["vectors"]
        if is_open or not round.culprits:
            break
        without |= round.culprits.keys()
    return round, spent


def _letters(fleet: Fleet, round: SecureRound, thread: str) -> Iterator[Letter]:
    writer = Writer(fleet, "train")
    for client, (message, broadcast) in sorted(round.outbox().items()):
        sealed = Sealed(fleet.settings, thread, message)
        if client not in fleet.nodes:
            round.refuse(client, "has no node")
        elif broadcast is None:
            yield Letter(client, fleet.nodes[client], pack_sealed(sealed))
        else:
            inner = writer.letter(client, round.ranks[client], broadcast)
            again = None if inner.in_full is None else partial(_with, sealed, inner.in_full)
            content = pack_sealed(replace(sealed, request=inner.content))
            yield replace(inner, content=content, in_full=again)


def _with(sealed: Sealed, request: Callable[[], RecordDict]) -> RecordDict:
    return pack_sealed(replace(sealed, request=request()))


def _receive(round: SecureRound, reply: Reply) -> str | None:
    """Give an answer to the round; the reason if it was refused."""
    client = reply.letter.client
    if not reply.is_current:  # of the network's doing, perhaps: the client goes on
        reason = "answered twice, or after its phase: the first answer in time counts"
        round.refused.append((client, reason))
        return reason
    try:
        if isinstance(reply.content, Refusal):
            raise ProtocolError(reply.content.reason)
        message = unpack_reply(reply.content)
    except ProtocolError as error:
        round.refuse(client, str(error))
        return str(error)
    try:
        round.receive(client, message)
    except ProtocolError as error:
        return str(error)
    return None


def _helped(
    round: SecureRound,
    phase: Phase,
    question: bytes,
    helper: Callable[[bytes], bytes] | None,
    clock: Callable[[], float],
) -> Leg:
    """Ask the second server, and give the round its answer."""
    if helper is None:
        raise ValueError("helper: got none; want what asks the second server, for this protocol has one")
    began, answer = clock(), b""
    try:
        answer = helper(question)
        round.from_helper(answer)
    except ProtocolError as error:
        round.fail(str(error))
    return Leg(HELPER, phase.pass_, clock() - began, len(question), len(answer), 1, int(bool(answer)))


def _leg(phase: Phase, seconds: float, before: Traffic, after: Traffic, asked: int, answered: int) -> Leg:
    down, up = after.bytes_down - before.bytes_down, after.bytes_up - before.bytes_up
    return Leg(phase.name, phase.pass_, seconds, down, up, asked, answered)
