"""What training took of a node's memory: noted by the process that trains, told by another one at the end."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
from flwr.app import Context, Message, RecordDict

from fedpeft.errors import ProtocolError
from fedpeft.flower import (
    Footprint,
    Footprints,
    Participant,
    Vault,
    answer,
    client_app,
    farewell,
    in_process,
    muster,
)
from fedpeft.flower.answers import Refusal, pack_refusal
from fedpeft.flower.footprints import MEMORY_QUERY, pack_footprint, pack_memory_query, unpack_footprint
from fedpeft.flower.inprocess import NodeConfig
from fedpeft.flower.packing import Parcel, pack
from fedpeft.flower.registry import Registry
from fedpeft.rounds import Job
from fedpeft.rules import FactorMean
from tests.flower.covert import Stage
from tests.flower.grids import Clock, FaultyGrid, one_round
from tests.flower.linear import RANK, LinearTrainer, participant

ONE = Footprint(8, "onnx", "int8", 512_000_000, 300_000_000, 310_000_001, 7)


def footprint(job: Job) -> Footprint:
    return Footprint(job.start.layers["q"].rank, "torch", "none", None, 90, 100 + job.client)


@pytest.mark.parametrize("found", [ONE, replace(ONE, budget=None, predicted=None, gpu=None), None])
def test_a_footprint_comes_as_it_was_sent(found: Footprint | None) -> None:
    assert unpack_footprint(pack_footprint(found)) == found


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"engine": "jax"}, r"it trained with 'jax int8'; want torch or onnx, and none, int8, nf4, int4"),
        ({"quantise": "int5"}, r"it trained with 'onnx int5'; want"),
        ({"measured": None}, r"measured is 'None'; want a whole number"),
        ({"predicted": -1}, r"predicted is '-1'; want a whole number"),
        ({"budget": 1.5}, r"budget is '1\.5'; want a whole number"),
        ({"gpu": True}, r"gpu is 'True'; want a whole number"),
        ({"rank": "8"}, r"rank is '8'; want a whole number"),
        ({"rows": 7}, r"facts that are not known: \['rows'\]"),
    ],
)
def test_what_a_node_can_not_have_meant_is_refused(changed: dict[str, object], reason: str) -> None:
    facts = {name: getattr(ONE, name) for name in ONE.__slots__} | changed
    with pytest.raises(ProtocolError, match=reason):
        unpack_footprint(pack(Parcel("memory", facts, {})))  # type: ignore[arg-type]


def test_of_each_client_the_largest_is_kept_and_the_later_of_two_alike() -> None:
    cells: dict[str, str] = {}
    notes = Footprints(cells)
    notes.note(3, ONE)
    notes.note(3, replace(ONE, measured=ONE.measured - 1, rank=9))
    assert notes.of(3) == ONE
    notes.note(3, replace(ONE, rank=2))
    notes.note(4, replace(ONE, measured=1))
    assert Footprints(cells).of(3) == replace(ONE, rank=2)
    assert (Footprints(cells).of(4), Footprints(cells).of(5)) == (replace(ONE, measured=1), None)


def test_a_nodes_state_keeps_it_between_messages_and_it_is_told_without_a_participant() -> None:
    in_process(lambda settings, config: participant(), 1)  # gives messages an identity

    def build(settings: str, config: Mapping[str, object]) -> Participant:
        raise AssertionError("nothing is built to answer this")

    context = Context(1, 1, {"partition-id": 4}, RecordDict(), {})
    app = client_app(build)
    assert unpack_footprint(app(Message(pack_memory_query(), 1, MEMORY_QUERY), context).content) is None
    Footprints.within(context.state).note(4, ONE)
    Footprints.within(context.state).note(5, replace(ONE, rank=1))
    assert unpack_footprint(app(Message(pack_memory_query(), 1, MEMORY_QUERY), context).content) == ONE


def nodes(each: Mapping[int, Participant], notes: Footprints | None) -> FaultyGrid:
    """Nodes that share their notes, and differ in what they are."""

    def handle(messages: Sequence[Message], configs: Mapping[int, NodeConfig]) -> Iterator[Message]:
        for message in messages:
            mine = each[message.metadata.dst_node_id - 1]
            yield from answer(lambda settings, config, mine=mine: mine, [message], configs, notes=notes)

    return FaultyGrid(handle, [{"partition-id": client} for client in each])


def test_at_the_end_those_that_trained_say_what_it_took_and_the_others_why_nothing_is_known() -> None:
    whole = replace(participant(), footprint=footprint)
    each = dict.fromkeys(range(8), whole)
    each[1] = replace(whole, trainer=LinearTrainer(fails=frozenset({1})))
    each[2] = replace(whole, footprint=lambda job: Footprint(**{}))  # type: ignore[call-arg]  # it breaks
    each[3] = participant()
    notes, clock = Footprints(), Clock()
    grid = nodes(each, notes)
    fleet = muster(grid, FactorMean(), "{}", 8, 10.0, clock=clock, sleep=clock.sleep)
    outcome, _ = one_round(fleet, range(7), ranks=dict.fromkeys(range(7), RANK) | {4: 1})
    assert outcome.survivors == (0, 2, 3, 4, 5, 6)
    fleet.registry.record(0, range(7), outcome.survivors, (), {})
    assert fleet.registry.silent() == {1}

    def change(client: int, reply: Message) -> list[Message]:
        if client == 5:
            return []
        if client == 6:
            reply.content = pack_refusal(Refusal("failed", "it is too hot"))
        return [reply]

    grid.change = change
    fleet.registry.leave_out(1)  # client 0's node is not its own any longer
    before = clock.now
    found, unknown = farewell(fleet, 20.0)
    assert clock.now == pytest.approx(before + 20.0)
    assert found == {4: Footprint(1, "torch", "none", None, 90, 104)}
    not_yet = "it has not trained since its node was started, or the run resumed"
    assert unknown == (
        (0, "its node has gone"), (1, not_yet), (2, not_yet), (3, not_yet), (5, "no answer"), (6, "it is too hot"),
    )  # fmt: skip


def test_a_client_of_a_secure_round_notes_it_once_it_has_trained_and_in_no_other_message() -> None:
    stage, notes, vault, jobs = Stage(6, trainer=LinearTrainer(fails=frozenset({4}))), Footprints(), Vault(), []

    def noting(job: Job) -> Footprint:
        jobs.append(job.client)
        return footprint(job)

    mine = replace(stage.here, footprint=noting)
    stage.grid._handler = lambda messages, configs: answer(
        lambda settings, config: mine, messages, configs, vault, notes=notes
    )
    stage.run()
    assert sorted(jobs) == [0, 1, 2, 3, 5]
    assert [notes.of(client) for client in (3, 4)] == [Footprint(RANK, "torch", "none", None, 90, 103), None]


def test_a_node_that_was_lost_is_not_waited_for() -> None:
    each = dict.fromkeys(range(3), replace(participant(), footprint=footprint))
    clock = Clock()
    grid = nodes(each, Footprints())
    fleet = muster(grid, FactorMean(), "{}", 3, 10.0, clock=clock, sleep=clock.sleep)
    one_round(fleet, range(3))
    fleet.registry.record(0, range(3), (0, 2), {2}, {})
    fleet.registry.record(1, (0, 2), (2,), (), {})
    fleet.registry.record(2, (2,), (2,), (), {})
    assert fleet.registry.silent() == {0, 1}  # each by the last round that asked it
    grid.change = lambda client, reply: [] if client == 0 else [reply]
    before = clock.now
    found, unknown = farewell(fleet, 20.0)
    assert clock.now - before < 1.0
    assert 2 in found
    assert (0, "no answer") in unknown


def test_a_client_whose_answer_came_in_a_later_step_is_waited_for() -> None:
    registry = Registry()
    registry.record(0, (0, 1, 2), (0,), (), {})
    registry.record(1, (0,), (1,), (), {})  # of a buffered run: client 1 had taken longer
    assert registry.silent() == {0, 2}
    registry.record(2, (1,), (0, 1), (), {})
    assert registry.silent() == {2}


def test_what_a_node_says_is_kept_short() -> None:
    clock, each = Clock(), dict.fromkeys(range(2), replace(participant(), footprint=footprint))
    grid = nodes(each, Footprints())
    fleet = muster(grid, FactorMean(), "{}", 2, 10.0, clock=clock, sleep=clock.sleep)
    fleet.registry.record(0, range(2), range(2), (), {})

    def change(client: int, reply: Message) -> list[Message]:
        reply.content = pack(Parcel("memory", dict.fromkeys((*ONE.__slots__, "<b>" * 9999), 1), {}))
        return [reply]

    grid.change = change
    found, unknown = farewell(fleet, 5.0)
    assert not found
    assert [len(why) for _, why in unknown] == [200, 200]


def test_a_process_that_trains_for_many_devices_notes_nothing() -> None:
    notes = Footprints()
    each = dict.fromkeys(range(2), participant())
    clock = Clock()
    for kept in (notes, None):
        each = dict.fromkeys(range(2), participant() if kept else replace(participant(), footprint=footprint))
        fleet = muster(nodes(each, kept), FactorMean(), "{}", 2, 10.0, clock=clock, sleep=clock.sleep)
        one_round(fleet, range(2))
        fleet.registry.record(0, range(2), (), (), {})
        found, unknown = farewell(fleet, 5.0)
        assert (found, [client for client, _ in unknown]) == ({}, [0, 1])
