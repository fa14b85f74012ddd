"""Who is who: an identity counts once, and a run that needs them leaves out who has none."""

from dataclasses import replace

import pytest
from flwr.app import Message

from fedpeft.errors import ProtocolError
from fedpeft.flower import Capabilities, Counts, Registry, identities, in_process, muster
from fedpeft.flower.answers import pack_capabilities, unpack_capabilities
from fedpeft.rules import FactorMean
from tests.flower.covert import Stage, identity
from tests.flower.grids import Change, Clock, FaultyGrid
from tests.flower.linear import participant
from tests.flower.test_arrivals import World, begun

HEX = [identity(c).id.hex() for c in range(6)]


def saying(said: dict[int, str]) -> Change:
    """Clients say these identities."""

    def change(client: int, reply: Message) -> list[Message]:
        found = unpack_capabilities(reply.content)
        reply.content = pack_capabilities(replace(found, identity=said.get(client, "")))
        return [reply]

    return change


def mustered(said: dict[int, str], identified: bool = True, registry: Registry | None = None):  # type: ignore[no-untyped-def]
    like = in_process(lambda settings, config: participant(), 4)
    grid, clock = FaultyGrid(like._handler, list(like._nodes.values())), Clock()
    grid.change = saying(said)
    return muster(grid, FactorMean(), "{}", 4, 10.0, True, clock, clock.sleep, registry=registry, identified=identified)


def test_of_two_nodes_with_one_identity_the_second_is_refused() -> None:
    fleet = mustered({0: HEX[0], 1: HEX[1], 2: HEX[1], 3: HEX[3]})
    assert list(fleet.nodes) == [0, 1, 3]
    assert fleet.refused == (
        f"client 2: has the identity of client 1, {HEX[1][:8]}; want one of its own: `fedpeft keys init`",
    )
    assert [fleet.registry.identity(c) for c in range(4)] == [identity(c).id if c != 2 else None for c in range(4)]
    assert fleet.registry.owner(HEX[1]) == 1
    assert fleet.registry.owner(HEX[5]) is None


def test_a_node_without_an_identity_is_left_out_where_the_run_needs_one_and_only_there() -> None:
    fleet = mustered({0: HEX[0], 1: HEX[1], 3: HEX[3]})
    assert list(fleet.nodes) == [0, 1, 3]
    assert fleet.refused == ("client 2: has no identity for secure aggregation; want one: `fedpeft keys init`",)
    assert list(mustered({}, identified=False).nodes) == [0, 1, 2, 3]
    with pytest.raises(ProtocolError, match="no node can take part"):
        mustered({})


def test_an_identity_stays_the_first_clients_when_a_run_is_taken_up_again(tmp_path) -> None:  # type: ignore[no-untyped-def]
    mustered(dict(enumerate(HEX)), registry=Registry(tmp_path / "r"))
    again = mustered({0: HEX[0], 1: HEX[3], 2: HEX[2], 3: HEX[5]}, registry=Registry(tmp_path / "r"))
    assert list(again.nodes) == [0, 2, 3]
    assert again.refused[0].startswith(f"client 1: has the identity of client 3, {HEX[3][:8]}")
    assert again.registry.identity(3) == bytes.fromhex(HEX[5])  # a new key of the same client is its own affair


def test_a_newcomer_with_anothers_identity_or_none_is_left_out() -> None:
    world, said = World({11: 0, 12: 1}), {11: HEX[0], 12: HEX[1], 13: HEX[1], 14: "", 15: HEX[4]}

    def change(node: int, reply: Message) -> Message:
        found = unpack_capabilities(reply.content)
        reply.content = pack_capabilities(replace(found, identity=said[node], counts=None))
        return reply

    world.change = change
    fleet, _ = begun(world)
    assert fleet.arrivals is not None
    fleet.arrivals.identified = True
    world.here |= {13: 2, 14: 3, 15: 4}
    assert fleet.meet() == (
        f"client 2: has the identity of client 1, {HEX[1][:8]}; want one of its own: `fedpeft keys init`",
        "client 3: has no identity for secure aggregation; want one: `fedpeft keys init`",
        "client 4 takes part from now on",
    )
    assert (fleet.nodes, fleet.meet()) == ({0: 11, 1: 12, 4: 15}, ())
    del world.here[15]
    fleet.meet()
    world.here[16], said[16] = 4, HEX[4]
    assert fleet.meet() == ("client 4 is back",)  # it told no counts, and is known all the same


def test_clients_of_one_process_are_asked_for_their_identities_as_they_are_needed_and_once() -> None:
    stage = Stage(5)
    grid = in_process(lambda settings, config: stage.here, 5)
    asked: list[int] = []
    handler = grid._handler
    grid._handler = lambda messages, nodes: (
        asked.extend(m.metadata.dst_node_id - 1 for m in messages)
        or handler(  # type: ignore[func-returns-value]
            messages, nodes
        )
    )
    fleet = muster(grid, stage.rule, "{}", 5, 10.0, identified=True)
    assert asked == [0]  # they are all alike
    found, why = identities(fleet, (1, 3), 5.0)
    assert (found, why) == ({1: identity(1).id, 3: identity(3).id}, {})
    found, why = identities(fleet, (3, 4, 9), 5.0)
    assert (found, why) == ({3: identity(3).id, 4: identity(4).id}, {9: "has no node"})
    assert asked == [0, 1, 3, 4]


def test_a_client_of_this_process_with_anothers_identity_or_none_has_none_that_counts() -> None:
    stage = Stage(4)
    grid = FaultyGrid(
        in_process(lambda settings, config: stage.here, 4)._handler, [{"partition-id": c} for c in range(4)]
    )
    grid.change = saying({0: HEX[0], 1: HEX[0]})
    fleet = replace(stage.fleet, grid=grid, registry=Registry())
    found, why = identities(fleet, range(3), 5.0)
    assert found == {0: identity(0).id}
    assert why == {
        1: "its identity is that of client 0; want one of its own: `fedpeft keys init`",
        2: "has no identity for secure aggregation; want one: `fedpeft keys init`",
    }
    grid.change = lambda client, reply: []
    assert identities(fleet, (0, 3), 5.0)[1] == {3: "no answer to a query before the deadline"}


def test_a_muster_of_clients_that_are_alike_and_have_no_identity_ends_at_once() -> None:
    with pytest.raises(ProtocolError, match="client 0: has no identity for secure aggregation"):
        muster(in_process(lambda settings, config: participant(), 3), FactorMean(), "{}", 3, 1.0, identified=True)


def test_registries_keep_what_is_not_told_apart_from_nothing(tmp_path) -> None:  # type: ignore[no-untyped-def]
    registry = Registry(tmp_path / "r")
    registry.meet({7: Capabilities(2, "b", None, identity=HEX[2]), 8: Capabilities(3, "b", Counts(0, 0, 0))})
    assert (registry.counts(2), registry.counts(3), registry.counts(4)) == (None, Counts(0, 0, 0), None)
    assert [registry.knows(c) for c in (2, 3, 4)] == [True, True, False]
    registry.identify(2, bytes.fromhex(HEX[2]))
    with pytest.raises(ProtocolError, match="that of client 2"):
        registry.identify(3, bytes.fromhex(HEX[2]))
    registry.meet({9: Capabilities(2, "b", None)})
    assert registry.identity(2) is None
