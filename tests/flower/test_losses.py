"""Clients that vanish in the middle of a round lose the same answers in the clear and under secure aggregation."""

from collections.abc import Iterator, Mapping, Sequence

import pytest
from flwr.app import Message, RecordDict

from fedpeft.flower.inprocess import InProcessGrid, NodeConfig
from fedpeft.flower.losses import GONE, Losses, losing

NODES, STEPS, CLEAR = 20, 8, (2, 5)


def drawn(count: int = 6) -> Losses:
    return Losses(count, NODES, 11, STEPS, CLEAR, tuple(range(STEPS)))


def echo(messages: Sequence[Message], nodes: Mapping[int, NodeConfig]) -> Iterator[Message]:
    for message in messages:
        yield Message(RecordDict(), reply_to=message)


def answered(losses: Losses, kind: str, round: int) -> dict[int, bool]:
    """Which nodes answer one message of this kind."""
    grid = InProcessGrid(losing(echo, losses.is_lost), [{}] * NODES)
    messages = [Message(RecordDict(), node, kind, ttl=9.0, group_id=str(round)) for node in range(1, NODES + 1)]
    of = {m.metadata.dst_node_id: m for m in messages}
    replies = grid.send_and_receive(messages)
    by_name = {r.metadata.reply_to_message_id: r for r in replies}
    found = {node: by_name[m.metadata.message_id] for node, m in of.items()}
    assert all(r.has_content() or r.error.code == GONE for r in found.values())
    return {node: r.has_content() for node, r in found.items()}


def test_just_as_many_vanish_in_each_round_and_they_stay_away() -> None:
    losses = drawn()
    for round in (3, 4):
        left = [sum(answered(losses, "train.secure", round).values()) for _ in range(STEPS)]
        assert left == sorted(left, reverse=True)
        assert left[-1] == NODES - 6


def test_other_clients_vanish_in_other_rounds() -> None:
    losses = drawn()
    gone = [{n for n in range(1, NODES + 1) if losses.gone(round, n) < STEPS} for round in range(9)]
    assert [len(x) for x in gone] == [6] * 9
    assert len(set.union(*gone)) > 12


@pytest.mark.parametrize("pass_", [0, 1])
def test_a_round_in_the_clear_loses_whom_the_secure_one_has_lost_by_its_vectors(pass_: int) -> None:
    secure, clear = drawn(), drawn()
    by_step = [answered(secure, "query.secure", 7) for _ in range(STEPS)]
    in_the_clear = [answered(clear, "train", 7) for _ in CLEAR]
    assert in_the_clear[pass_] == by_step[CLEAR[pass_]]
    assert sum(in_the_clear[pass_].values()) < NODES


def test_a_second_attempt_begins_at_the_first_step() -> None:
    losses = drawn()
    first = [answered(losses, "train.secure", 1) for _ in range(STEPS)]
    assert [answered(losses, "train.secure", 1) for _ in range(STEPS)] == first


@pytest.mark.parametrize("kind", ["evaluate", "query"])
def test_messages_that_are_no_part_of_a_round_are_never_lost(kind: str) -> None:
    assert all(answered(drawn(NODES - 1), kind, 2).values())
