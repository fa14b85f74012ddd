"""Rounds with a second server over messages: one question a pass, whoever is lost, and one sum a round."""

from collections.abc import Callable

import pytest
from flwr.app import Message

from fedpeft.errors import ProtocolError
from fedpeft.flower import drive_secure, retried
from fedpeft.rounds import SecureRound
from fedpeft.rules import FactorMean, MeanRule
from fedpeft.secagg import Policy, TwoServer
from fedpeft.secagg.helper import Helper, InMemory
from fedpeft.secagg.messages import Kind
from tests.flower.covert import ADMIN, DEADLINE, HELPER, PATIENCE, Stage, when
from tests.flower.test_drive_rounds import TwoPasses
from tests.flower.test_secure_rounds import BAD, GARBAGE, N, check


def two_servers(rule: MeanRule | None = None) -> tuple[Stage, Callable[[bytes], bytes]]:
    stage = Stage(N, TwoServer(), "twoserver", rule=rule or FactorMean())
    helper = Helper(HELPER, stage.roster, {ADMIN.id}, Policy(), InMemory())

    def ask(question: bytes) -> bytes:
        reply = helper.answer(question, 0.0)
        if reply.refusal is not None:
            raise ProtocolError(f"the second server refused: {reply.refusal}")
        return reply.answer

    return stage, ask


@pytest.mark.parametrize("passes", [1, 2])
def test_a_round_with_two_servers_is_the_round_in_the_clear(passes: int) -> None:
    stage, ask = two_servers(TwoPasses() if passes == 2 else None)
    round = stage.round()
    traffic = drive_secure(stage.fleet, round, DEADLINE, PATIENCE, ask)
    check(stage, round.result(), tuple(range(N)))
    assert stage.trainer.seen == list(range(N))
    assert [(leg.name, leg.pass_) for leg in traffic.legs] == [
        (name, pass_) for pass_ in range(passes) for name in ("vectors", "helper")
    ]


def test_who_vanishes_or_sends_garbage_is_left_out() -> None:
    stage, ask = two_servers()
    lost, garbage = when({0}, Kind.VECTOR, lambda reply: []), when({BAD}, Kind.VECTOR, GARBAGE["cut off"])

    def change(client: int, reply: Message) -> list[Message]:
        return lost(client, reply) if client == 0 else garbage(client, reply)  # type: ignore[operator,no-any-return]

    stage.grid.change = change  # type: ignore[assignment]
    round = stage.round()
    drive_secure(stage.fleet, round, DEADLINE, PATIENCE, ask)
    check(stage, round.result(), (1, 3, 4, 5, 6))
    assert stage.clock.now == pytest.approx(DEADLINE)  # as clients train in this phase


@pytest.mark.parametrize("answer", [b"", b"noise", None])
def test_a_second_server_that_fails_ends_the_round_with_the_reason(answer: bytes | None) -> None:
    stage, _ = two_servers()

    def ask(question: bytes) -> bytes:
        if answer is None:
            raise ProtocolError("the second server can't be reached")
        return answer

    made: list[SecureRound] = []

    def open_round(attempt: int, without: frozenset[int]) -> SecureRound:
        made.append(stage.round(attempt=attempt))
        return made[-1]

    round, traffic = retried(stage.fleet, open_round, DEADLINE, PATIENCE, ask)
    with pytest.raises(ProtocolError, match="can't be reached" if answer is None else "."):
        round.result()
    assert len(made) == 1  # it may know the sum of the masks: nobody is asked again
    assert traffic.legs[-1].answered == (1 if answer else 0)


def test_a_protocol_with_a_second_server_needs_one() -> None:
    stage, _ = two_servers()
    with pytest.raises(ValueError, match="helper: got none"):
        drive_secure(stage.fleet, stage.round(), DEADLINE, PATIENCE)


def test_a_client_gives_one_vector_of_a_round_where_that_is_all_it_takes() -> None:
    stage, ask = two_servers()
    first = stage.round()
    drive_secure(stage.fleet, first, DEADLINE, PATIENCE, ask)
    again = stage.round(range(N - 1), attempt=1)
    drive_secure(stage.fleet, again, DEADLINE, PATIENCE, ask)
    with pytest.raises(ProtocolError):
        again.result()
    assert {why.rpartition(": ")[2] for _, why in again.refused} == {"round"}
    assert stage.trainer.seen == list(range(N))
