"""Who takes part: nodes say what they can do, and those that can't share a round are left out with a reason."""

from dataclasses import replace

import pytest
from flwr.app import Message

from fedpeft.adapters import same
from fedpeft.errors import ProtocolError
from fedpeft.flower import Fleet, in_process, muster
from fedpeft.flower.answers import pack_capabilities, unpack_capabilities
from fedpeft.rules import FactorMean
from tests.flower.grids import Change, Clock, FaultyGrid
from tests.flower.linear import counts, participant, start


def called(clients: int, change: Change | None = None, want_start: bool = True, nodes: int | None = None) -> Fleet:
    like = in_process(lambda settings, config: participant(), clients if nodes is None else nodes)
    grid, clock = FaultyGrid(like._handler, list(like._nodes.values())), Clock()
    if change is not None:
        grid.change = change
    return muster(grid, FactorMean(), '{"a": 1}', clients, 10.0, want_start, clock, clock.sleep)


def claiming(**fields: object) -> Change:
    def change(client: int, reply: Message) -> list[Message]:
        if client == 1:
            reply.content = pack_capabilities(replace(unpack_capabilities(reply.content), **fields))  # type: ignore[arg-type]
        return [reply]

    return change


def test_nodes_say_their_client_number_examples_base_and_central_set() -> None:
    fleet = called(3)
    assert fleet.nodes == {0: 1, 1: 2, 2: 3}
    assert [fleet.registry.counts(c) for c in range(4)] == [counts(0), counts(1), counts(2), None]
    assert (fleet.base, fleet.settings, fleet.refused, fleet.central) == ("linear-5x4", '{"a": 1}', (), 0)
    assert (fleet.clients(), fleet.known) == (range(3), 3)
    assert fleet.start is not None
    assert same(fleet.start, start())
    assert fleet.traffic.bytes_up > sum(x.nbytes for x in start().tensors().values())


def test_only_one_node_sends_the_start_adapter_and_none_if_it_is_not_wanted() -> None:
    sent: list[bool] = []

    def note(client: int, reply: Message) -> list[Message]:
        sent.append(unpack_capabilities(reply.content).start is not None)
        return [reply]

    called(3, note)
    assert sent == [True, False, False]
    assert called(3, note, want_start=False).start is None
    assert sent[3:] == [False, False, False]


def test_another_node_gives_the_start_adapter_if_client_0_is_not_there() -> None:
    fleet = called(3, lambda client, reply: [] if client == 0 else [reply])
    assert list(fleet.nodes) == [1, 2]
    assert fleet.start is not None
    assert same(fleet.start, start())
    assert fleet.refused == ("node 1: no answer to a query before the deadline",)


def test_a_node_with_another_base_is_left_out_and_both_are_named() -> None:
    fleet = called(3, claiming(base="other"))
    assert list(fleet.nodes) == [0, 2]
    assert fleet.refused == ("client 1: its base model and adapter shape are other; most have linear-5x4",)


def test_of_two_equally_common_bases_the_lowest_client_has_the_runs() -> None:
    fleet = called(2, claiming(base="other"))
    assert (list(fleet.nodes), fleet.base) == ([0], "linear-5x4")


def test_two_nodes_that_claim_one_client_number_stop_the_run() -> None:
    with pytest.raises(
        ProtocolError, match="2 nodes say that they are client 0; want one: start each node with its own"
    ):
        called(3, claiming(client=0))


def test_a_client_number_beyond_the_partition_is_left_out() -> None:
    fleet = called(3, claiming(client=3))
    assert list(fleet.nodes) == [0, 2]
    assert fleet.refused == ("client 3: want a number from 0 to 2",)


def test_too_few_nodes_are_waited_for_and_then_gone_without() -> None:
    clock = Clock()
    grid = in_process(lambda settings, config: participant(), 2)
    fleet = muster(grid, FactorMean(), "{}", 5, 10.0, True, clock, clock.sleep)
    assert list(fleet.nodes) == [0, 1]
    assert clock.now == pytest.approx(10.0)


def test_a_run_that_nobody_can_take_part_in_says_why() -> None:
    with pytest.raises(ProtocolError, match="no node can take part: 2 were asked; node 1: no answer"):
        called(2, lambda client, reply: [])
    with pytest.raises(ProtocolError, match="0 were asked; none was there"):
        called(2, nodes=0)


def test_a_node_that_can_not_be_built_says_why() -> None:
    def build(settings: str, config: object) -> object:
        raise FileNotFoundError("no such file: mine.jsonl")

    clock = Clock()
    with pytest.raises(ProtocolError, match=r"node 1: FileNotFoundError: no such file: mine\.jsonl"):
        muster(in_process(build, 2), FactorMean(), "{}", 2, 10.0, True, clock, clock.sleep)  # type: ignore[arg-type]


def test_a_node_that_holds_constants_already_is_not_sent_them_again() -> None:
    fleet = called(3, claiming(holds=("ab" * 32, "no digest")))
    assert [fleet.registry.digests(c) for c in range(3)] == [(), ("ab" * 32,), ()]
    assert ["ab" * 32 in fleet.holds[c] for c in range(3)] == [False, True, False]
