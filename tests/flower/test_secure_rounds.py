"""Secure rounds over messages: the sum of those who stay, whoever vanishes, cheats, or answers late or twice."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedpeft.errors import ProtocolError
from fedpeft.flower import ClientStore, drive_secure, retried
from fedpeft.flower.sealed import pack_reply, unpack_reply
from fedpeft.rounds import Outcome, SecureRound
from fedpeft.rules import FedSB, Scaffold, ServerState
from fedpeft.secagg import Mock, Policy
from fedpeft.secagg.messages import Kind
from fedpeft.secagg.params import Params
from tests.flower.covert import DEADLINE, PATIENCE, Stage, kind_of, when
from tests.flower.grids import first_state, gathered, one_round
from tests.flower.linear import RANK, LinearTrainer
from tests.flower.test_drive_rounds import TwoPasses

N = 7
BAD = 2
KINDS = (Kind.KEYS, Kind.SHARES, Kind.VECTOR, Kind.SURVIVORS, Kind.UNMASK)
CLOSE = 2e-6
"""A step of the grid is 4 / 2^28 for seven clients, times 16/8 for weights below the largest; what is kept is fp32."""


def plain(stage: Stage, cohort: object, state: ServerState | None = None) -> Outcome:
    here = replace(stage.here, secure=None, store=ClientStore(), trainer=replace(stage.trainer, seen=[]))
    fleet, _, _ = gathered(here, stage.clients, stage.rule)
    return one_round(fleet, cohort, state, stage.rule, stage.ranks)[0]  # type: ignore[arg-type]


def check(stage: Stage, got: Outcome, survivors: tuple[int, ...], state: ServerState | None = None) -> None:
    want = plain(stage, survivors, state)
    assert got.survivors == survivors
    for name, x in want.state.adapter.tensors().items():
        np.testing.assert_allclose(got.state.adapter.tensors()[name], x, atol=CLOSE, rtol=0)
    assert got.metrics.loss == pytest.approx(want.metrics.loss, abs=len(survivors) / 1024)  # steps of 2^-10 a client
    assert (got.metrics.units, got.metrics.correct) == (want.metrics.units, want.metrics.correct)
    assert got.weight == pytest.approx(want.weight, rel=1e-4)  # each to 1/65535 of the largest


@pytest.mark.parametrize("protocol", ["mock", "full"])
def test_a_secure_round_is_the_round_in_the_clear_to_the_grids_rounding(protocol: str) -> None:
    stage = Stage(N) if protocol == "full" else Stage(N, Mock(), "mock")
    got, traffic = stage.run()
    check(stage, got, tuple(range(N)))
    assert got.refused == ()
    assert stage.clock.now == 0
    assert stage.trainer.seen == list(range(N))  # each once, and all in one go
    names = ["keys", "shares", "vectors", "survivors", "unmask"] if protocol == "full" else ["vectors"]
    assert [leg.name for leg in traffic.legs] == names
    assert sum(leg.bytes_down for leg in traffic.legs) == traffic.bytes_down > 0
    assert sum(leg.bytes_up for leg in traffic.legs) == traffic.bytes_up > 0
    assert traffic.strays == 0


@pytest.mark.parametrize("protocol", ["mock", "full"])
def test_a_later_pass_encodes_the_kept_update_without_training_again(protocol: str) -> None:
    rule = TwoPasses()
    stage = Stage(N, rule=rule) if protocol == "full" else Stage(N, Mock(), "mock", rule=rule)
    got, traffic = stage.run()
    check(stage, got, tuple(range(N)))
    assert stage.trainer.seen == list(range(N))
    assert [leg.pass_ for leg in traffic.legs] == ([0] * 5 + [1] * 3 if protocol == "full" else [0, 1])


def test_ranks_constants_and_what_rules_keep_go_on_from_round_to_round() -> None:
    """Core form: what is fixed travels once; a client encodes by what its store holds."""
    stage = Stage(N, rule=FedSB(), ranks={c: 2 if c % 2 else RANK for c in range(N)}, policy=Policy(min_slice=3))
    state = first_state()
    for round in range(4):
        got, _ = stage.run(state=state)
        assert got.refused == ()
        assert got.survivors == tuple(range(N))
        if round < 3:  # from there on a grid's rounding has turned the singular directions a little
            want = plain(stage, range(N), state).state.adapter.layers["q"].product()
            np.testing.assert_allclose(got.state.adapter.layers["q"].product(), want, atol=1e-4)
        state = got.state


def test_a_rule_that_needs_the_way_of_training_has_it_in_a_later_message() -> None:
    class Walking(LinearTrainer):
        def _train(self, job):  # type: ignore[no-untyped-def]
            return replace(LinearTrainer._train(self, job), travel=0.02)

    rule = Scaffold()
    stage = Stage(N, rule=rule, trainer=Walking())
    check(stage, stage.run()[0], tuple(range(N)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_vanishes_at_any_phase_costs_nothing_but_itself(kind: Kind) -> None:
    stage = Stage(N)
    stage.grid.change = when({BAD}, kind, lambda reply: [])  # type: ignore[assignment]
    got, _ = stage.run()
    is_in = kind in (Kind.SURVIVORS, Kind.UNMASK)  # its vector had come
    check(stage, got, tuple(c for c in range(N) if c != BAD or is_in))
    assert [c for c, _ in got.refused] == [BAD]
    assert "no answer before the deadline" in got.refused[0][1]
    assert stage.clock.now == pytest.approx(DEADLINE if kind == Kind.SHARES else PATIENCE)


def test_clients_that_vanish_at_all_phases_of_two_passes_leave_the_sum_of_the_others() -> None:
    stage = Stage(11, rule=TwoPasses())
    gone = {0: (Kind.KEYS, 0), 3: (Kind.SHARES, 0), 5: (Kind.VECTOR, 1)}
    seen: dict[tuple[int, Kind | None], int] = {}

    def change(client: int, reply: Message) -> list[Message]:
        kind = kind_of(reply)
        seen[client, kind] = seen.get((client, kind), -1) + 1
        return [] if gone.get(client) == (kind, seen[client, kind]) else [reply]

    stage.grid.change = change  # type: ignore[assignment]
    round = stage.round()
    got, _ = stage.run(round)
    assert got.survivors == tuple(c for c in range(11) if c not in gone)
    # Client 5 is in the first pass's mean and not in the second's, as in the clear.
    fleet, grid, _ = gathered(replace(stage.here, secure=None, store=ClientStore()), 11, stage.rule)
    count = 0

    def lose(client: int, reply: Message) -> list[Message]:
        nonlocal count
        count += client == 5
        return [] if client == 5 and count == 2 else [reply]

    grid.change = lose
    want, _ = one_round(fleet, [c for c in range(11) if c not in (0, 3)], rule=stage.rule)
    for name, x in want.state.adapter.tensors().items():
        np.testing.assert_allclose(got.state.adapter.tensors()[name], x, atol=CLOSE, rtol=0)


def with_message(reply: Message, message: bytes) -> list[Message]:
    reply.content = pack_reply(message)
    return [reply]


def flipped(at: int) -> Callable[[Message], list[Message]]:
    def change(reply: Message) -> list[Message]:
        message = bytearray(unpack_reply(reply.content))
        message[at] ^= 1
        return with_message(reply, bytes(message))

    return change


def another_record(reply: Message) -> list[Message]:
    reply.content = RecordDict({"loss": ConfigRecord({"loss": 0.5})})
    return [reply]


GARBAGE: dict[str, Callable[[Message], list[Message]]] = {
    "nothing": lambda reply: with_message(reply, b""),
    "noise": lambda reply: with_message(reply, bytes(range(256)) * 3),
    "a flipped bit of the end": flipped(-1),
    "a flipped bit of the session": flipped(5),
    "cut off": lambda reply: with_message(reply, unpack_reply(reply.content)[:-1]),
    "another record": another_record,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_client_that_sends_garbage_is_out_and_stops_nobody(kind: Kind, garbage: str) -> None:
    stage = Stage(N)
    stage.grid.change = when({BAD}, kind, GARBAGE[garbage])  # type: ignore[assignment]
    got, _ = stage.run()
    is_in = kind in (Kind.SURVIVORS, Kind.UNMASK)
    check(stage, got, tuple(c for c in range(N) if c != BAD or is_in))
    assert {c for c, _ in got.refused} <= {BAD}
    assert stage.clock.now == 0  # nobody waits for it
    # Of an unmasking answer a wrong share is left out, and the rest of it is as good as any.
    assert got.refused or (kind, garbage) == (Kind.UNMASK, "a flipped bit of the end")


@pytest.mark.parametrize("kind", KINDS)
def test_who_answers_twice_is_counted_once_and_goes_on(kind: Kind) -> None:
    stage = Stage(N)
    stage.grid.change = when({BAD}, kind, lambda reply: [reply, reply])  # type: ignore[assignment]
    got, _ = stage.run()
    check(stage, got, tuple(range(N)))
    assert {c for c, _ in got.refused} <= {BAD}
    assert all("answered twice" in why for _, why in got.refused)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_an_answer_that_comes_in_a_later_phase_is_not_taken(kind: Kind) -> None:
    stage = Stage(N)
    held: list[Message] = []

    def change(client: int, reply: Message) -> list[Message]:
        if client == BAD and kind_of(reply) == kind and not held:
            held.append(reply)
            return []
        return [*held, reply] if client == 0 and held else [reply]

    stage.grid.change = change  # type: ignore[assignment]
    got, _ = stage.run()
    check(stage, got, tuple(c for c in range(N) if c != BAD or kind == Kind.SURVIVORS))
    assert {c for c, _ in got.refused} == {BAD}


def test_a_copy_of_an_earlier_answer_does_not_take_the_place_of_a_later_one() -> None:
    stage = Stage(N)
    held: list[Message] = []

    def change(client: int, reply: Message) -> list[Message]:
        if client == BAD and kind_of(reply) == Kind.KEYS:
            held.append(reply)
        return [*held, reply] if client == 0 and kind_of(reply) == Kind.VECTOR else [reply]

    stage.grid.change = change  # type: ignore[assignment]
    got, _ = stage.run()
    check(stage, got, tuple(range(N)))
    assert got.refused == ((BAD, "answered twice, or after its phase: the first answer in time counts"),)


def test_too_few_end_the_round_with_the_reason_and_nothing_is_unmasked() -> None:
    stage = Stage(N)
    asked: list[Kind | None] = []

    def change(client: int, reply: Message) -> list[Message]:
        asked.append(kind_of(reply))
        return [] if kind_of(reply) == Kind.VECTOR and client < 4 else [reply]

    stage.grid.change = change  # type: ignore[assignment]
    round = stage.round()
    drive_secure(stage.fleet, round, DEADLINE, PATIENCE)
    with pytest.raises(ProtocolError, match="3 of 7 clients are left; want at least 5"):
        round.result()
    assert Kind.UNMASK not in asked
    assert round.session.total is None


def test_a_client_without_a_node_or_that_can_not_be_reached_is_left_out() -> None:
    stage = Stage(N)
    stage.fleet = replace(stage.fleet, nodes={c: c + 1 for c in range(N) if c != 1} | {3: 99})
    got, _ = stage.run()
    check(stage, got, (0, 2, 4, 5, 6))
    assert dict(got.refused) == {1: "has no node", 3: "the message could not be sent"}


# Another attempt


def spoiled(reply: Message) -> list[Message]:
    """Sealed shares that none of their holders can open. Each is 84 bytes, behind a head of 18."""
    message = bytearray(unpack_reply(reply.content))
    for holder in range(N - 1):
        message[18 + 84 * holder + 40] ^= 1
    return with_message(reply, bytes(message))


def attempts(stage: Stage, made: list[SecureRound]) -> Callable[[int, frozenset[int]], SecureRound]:
    def open_round(attempt: int, without: frozenset[int]) -> SecureRound:
        made.append(stage.round([c for c in range(stage.clients) if c not in without], attempt=attempt))
        return made[-1]

    return open_round


def test_a_session_that_a_cheat_ends_is_tried_again_without_it_and_without_training_again() -> None:
    stage, made = Stage(N), list[SecureRound]()
    stage.grid.change = when({BAD}, Kind.SHARES, spoiled)  # type: ignore[assignment]
    round, traffic = retried(stage.fleet, attempts(stage, made), DEADLINE, PATIENCE)
    assert len(made) == 2
    assert list(made[0].culprits) == [BAD]
    check(stage, round.result(), tuple(c for c in range(N) if c != BAD))
    assert stage.trainer.seen == list(range(N))
    sessions = list(stage.sessions.values())
    assert [(p.attempt, p.n) for p in sessions] == [(0, N), (1, N - 1)]
    assert sessions[0].session != sessions[1].session
    names = ["keys", "shares", "vectors", "survivors", "unmask"]
    assert [leg.name for leg in traffic.legs] == names[:3] + names
    assert sum(leg.bytes_up for leg in traffic.legs) == traffic.bytes_up == sum(up for _, up in traffic.each.values())


def test_there_is_no_other_attempt_where_nobody_is_to_blame() -> None:
    stage, made = Stage(N), list[SecureRound]()
    stage.grid.change = when(range(4), Kind.VECTOR, lambda reply: [])  # type: ignore[assignment]
    round, _ = retried(stage.fleet, attempts(stage, made), DEADLINE, PATIENCE)
    assert len(made) == 1
    with pytest.raises(ProtocolError, match="clients are left"):
        round.result()


def test_there_is_no_other_attempt_once_somebody_was_asked_to_unmask() -> None:
    stage, made = Stage(N), list[SecureRound]()
    bad = when(range(4), Kind.UNMASK, lambda reply: with_message(reply, unpack_reply(reply.content)[:-1]))
    stage.grid.change = bad  # type: ignore[assignment]
    round, _ = retried(stage.fleet, attempts(stage, made), DEADLINE, PATIENCE)
    assert len(made) == 1
    assert set(round.culprits) == {0, 1, 2, 3}
    with pytest.raises(ProtocolError):
        round.result()


def test_where_too_few_are_left_for_another_attempt_the_first_ones_reason_stands() -> None:
    stage, made = Stage(N), list[SecureRound]()
    stage.grid.change = when({BAD}, Kind.SHARES, spoiled)  # type: ignore[assignment]
    once = attempts(stage, made)

    def open_round(attempt: int, without: frozenset[int]) -> SecureRound:
        if attempt:
            raise ProtocolError("no session with 6 clients")
        return once(attempt, without)

    round, _ = retried(stage.fleet, open_round, DEADLINE, PATIENCE)
    assert made == [round]
    with pytest.raises(ProtocolError, match="clients are left"):
        round.result()

    def never(attempt: int, without: frozenset[int]) -> SecureRound:
        raise ProtocolError("no session with 2 clients")

    with pytest.raises(ProtocolError, match="no session with 2 clients"):
        retried(stage.fleet, never, DEADLINE, PATIENCE)


def test_attempts_come_to_an_end() -> None:
    stage, made = Stage(11), list[SecureRound]()
    cheats = iter((1, 2, 3))
    now: dict[str, int] = {}

    def open_round(attempt: int, without: frozenset[int]) -> SecureRound:
        now["cheat"] = next(cheats)
        made.append(stage.round([c for c in range(11) if c not in without], attempt=attempt))
        return made[-1]

    def spoil(reply: Message) -> list[Message]:
        message = bytearray(unpack_reply(reply.content))
        for holder in range(len(made[-1].ranks) - 1):
            message[18 + 84 * holder + 40] ^= 1
        return with_message(reply, bytes(message))

    stage.grid.change = lambda client, reply: when({now["cheat"]}, Kind.SHARES, spoil)(client, reply)  # type: ignore[operator,assignment]
    round, _ = retried(stage.fleet, open_round, DEADLINE, PATIENCE)
    assert [sorted(x.ranks) for x in made] == [[c for c in range(11) if c not in out] for out in ((), (1,), (1, 2))]
    with pytest.raises(ProtocolError):
        round.result()


def test_a_client_refuses_a_second_sum_of_a_round_that_was_unmasked() -> None:
    """Whatever the coordinator calls it: two sums of one update with and without somebody tell what that one did."""
    stage = Stage(N)
    first, _ = stage.run()
    again = stage.round(range(N - 1), attempt=1)
    drive_secure(stage.fleet, again, DEADLINE, PATIENCE)
    with pytest.raises(ProtocolError, match="keys"):
        again.result()
    assert {why.rpartition(": ")[2] for _, why in again.refused} == {"round"}
    check(stage, stage.run(state=first.state)[0], tuple(range(N)), first.state)  # the next round is as welcome as ever


def test_a_client_refuses_a_session_that_it_has_seen_whatever_became_of_it() -> None:
    stage = Stage(N)
    stage.grid.change = when({BAD}, Kind.KEYS, lambda reply: [])  # type: ignore[assignment]
    round = stage.round()
    params: Params = next(iter(stage.sessions.values()))
    stage.run(round)
    del stage.grid.change
    next_ = first_state()
    next_ = replace(next_, task=replace(next_.task, round=1))
    stage.entropy.count = 0  # the same session again, of a later round
    again = stage.round(state=next_)
    assert list(stage.sessions) == [params.session]
    drive_secure(stage.fleet, again, DEADLINE, PATIENCE)
    assert {why.rpartition(": ")[2] for _, why in again.refused} == {"replay"}
