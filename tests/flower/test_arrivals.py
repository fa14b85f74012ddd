"""Nodes that come late, go, and come back: who takes part from when on, and who can't take whose place."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from flwr.app import Message
from typing_extensions import override

from fedpeft.errors import ProtocolError
from fedpeft.flower import Fleet, InProcessGrid, Registry, in_process, muster
from fedpeft.flower.answers import Refusal, pack_capabilities, pack_refusal, unpack_capabilities
from fedpeft.flower.inprocess import NodeConfig
from fedpeft.rules import FactorMean
from tests.flower.grids import Clock, one_round
from tests.flower.linear import LinearTrainer, counts, participant


@dataclass
class World:
    """Nodes that come and go. here: the client that each node present is; mute: nodes that do not answer."""

    here: dict[int, int] = field(default_factory=dict)
    mute: set[int] = field(default_factory=set)
    change: Callable[[int, Message], Message] | None = None
    asked: list[int] = field(default_factory=list)


class Changing(InProcessGrid):
    """A grid of the nodes of a ``World``."""

    def __init__(self, world: World) -> None:
        handler = in_process(lambda settings, config: participant(), 100)._handler

        def handle(messages: Sequence[Message], nodes: Mapping[int, NodeConfig]) -> Iterator[Message]:
            for message in messages:
                node = message.metadata.dst_node_id
                if message.metadata.message_type == "query":
                    world.asked.append(node)
                if node not in world.mute:
                    (reply,) = handler([message], {node: {"partition-id": world.here[node]}})
                    yield reply if world.change is None else world.change(node, reply)

        InProcessGrid.__init__(self, handle, ())
        self._nodes = world.here  # type: ignore[assignment]  # of their clients: the handler makes the configs
        self.world = world

    @override
    def get_node_ids(self) -> list[int]:
        return list(self.world.here)

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ids = list(message_ids)
        self._queue = {k: v for k, v in self._queue.items() if v.metadata.dst_node_id in self._nodes}
        return InProcessGrid.pull_messages(self, ids)


def begun(world: World, clients: int = 5, registry: Registry | None = None) -> tuple[Fleet, Clock]:
    clock = Clock()
    world.mute, mute = set(), world.mute
    fleet = muster(Changing(world), FactorMean(), "{}", clients, 10.0, True, clock, clock.sleep, 60.0, registry)
    world.mute = mute
    world.asked.clear()
    return fleet, clock


def test_a_node_that_comes_late_takes_part_from_then_on_and_nobody_else_is_asked_again() -> None:
    world = World({11: 0, 12: 2})
    fleet, clock = begun(world)
    assert fleet.meet() == ()
    world.here[13] = 1
    began = clock.now
    assert fleet.meet() == ("client 1 takes part from now on",)
    assert (world.asked, clock.now) == ([13], began)
    assert (fleet.nodes, fleet.clients(), fleet.known) == ({0: 11, 1: 13, 2: 12}, range(3), 3)
    outcome, _ = one_round(fleet, fleet.clients())
    assert outcome.survivors == (0, 1, 2)
    assert fleet.meet() == ()
    assert world.asked == [13]


def test_the_grid_is_not_asked_for_anything_but_its_nodes_while_they_stay_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet, _ = begun(World({11: 0, 12: 1}))
    fleet.meet()
    monkeypatch.setattr(Registry, "arrivals", lambda *_: pytest.fail("the same nodes were looked up again"))
    assert fleet.meet() == fleet.meet() == ()


def test_a_client_that_comes_back_as_another_node_takes_its_place_again() -> None:
    world = World({11: 0, 12: 1, 13: 2})
    fleet, _ = begun(world)
    del world.here[12]
    assert fleet.meet() == ()
    assert (fleet.nodes, fleet.clients(), fleet.known) == ({0: 11, 2: 13}, (0, 2), 3)
    world.here[99] = 1
    assert fleet.meet() == ("client 1 is back",)
    assert fleet.nodes == {0: 11, 1: 99, 2: 13}
    assert one_round(fleet, fleet.clients())[0].survivors == (0, 1, 2)


def test_a_node_that_claims_a_client_which_is_here_is_left_out_until_that_ones_node_has_gone() -> None:
    world = World({11: 0, 12: 1})
    fleet, _ = begun(world)
    world.here[66] = 1
    assert fleet.meet() == ("node 66 says that it is client 1, which node 12 is: left out while that stays",)
    assert fleet.meet() == ()
    assert (fleet.nodes, world.asked) == ({0: 11, 1: 12}, [66])
    del world.here[12]  # the old node of a client that was started anew
    assert fleet.meet() == ("client 1 is back",)
    assert fleet.nodes == {0: 11, 1: 66}


def test_of_two_newcomers_that_claim_one_client_the_first_to_answer_has_it() -> None:
    world = World({11: 0})
    fleet, _ = begun(world)
    world.here |= {21: 3, 22: 3}
    assert fleet.meet() == (
        "client 3 takes part from now on",
        "node 22 says that it is client 3, which node 21 is: left out while that stays",
    )
    assert fleet.nodes == {0: 11, 3: 21}


def test_a_client_that_comes_back_under_the_same_node_id_is_asked_anew() -> None:
    world = World({11: 0, 12: 1})
    fleet, _ = begun(world)
    del world.here[12]
    fleet.meet()
    world.here[12] = 4  # with another number in its config
    assert fleet.meet() == ("client 4 takes part from now on",)
    assert fleet.nodes == {0: 11, 4: 12}


@pytest.mark.parametrize(
    ("fields", "news"),
    [
        ({"client": 7}, "client 7: want a number from 0 to 4"),
        ({"base": "other"}, "client 3: its base model and adapter shape are other; the run's are linear-5x4"),
    ],
)
def test_a_newcomer_that_does_not_fit_is_left_out_with_the_reason(fields: dict[str, object], news: str) -> None:
    world = World({11: 0})
    fleet, _ = begun(world)

    def change(node: int, reply: Message) -> Message:
        reply.content = pack_capabilities(replace(unpack_capabilities(reply.content), **fields))  # type: ignore[arg-type]
        return reply

    world.change = change
    world.here[12] = 3
    assert fleet.meet() == (news,)
    assert fleet.meet() == ()
    assert (fleet.nodes, fleet.known) == ({0: 11}, 1)


def test_a_newcomer_that_can_not_take_part_says_why() -> None:
    world = World({11: 0})
    fleet, _ = begun(world)

    def refuse(node: int, reply: Message) -> Message:
        reply.content = pack_refusal(Refusal("failed", "no such file: mine.jsonl"))
        return reply

    world.change = refuse
    world.here[12] = 3
    assert fleet.meet() == ("node 12: no such file: mine.jsonl",)
    assert fleet.meet() == ()


def test_nobody_waits_for_a_newcomer_that_is_silent_and_it_is_asked_again_after_a_while() -> None:
    world = World({11: 0}, mute={12})
    fleet, clock = begun(world)
    world.here[12] = 1
    began = clock.now
    assert fleet.meet() == ()
    assert (clock.now, fleet.nodes) == (began, {0: 11})
    clock.now += 59
    assert fleet.meet() == ()
    clock.now += 2
    world.mute.clear()
    assert fleet.meet() == (
        "node 12: no answer to a query within 60 seconds; it is asked again",
        "client 1 takes part from now on",
    )
    assert fleet.nodes == {0: 11, 1: 12}


def test_a_newcomer_that_goes_before_it_has_answered_is_forgotten() -> None:
    world = World({11: 0}, mute={12})
    fleet, clock = begun(world)
    world.here[12] = 1
    fleet.meet()
    del world.here[12]
    for _ in range(2):
        clock.now += 100
        assert fleet.meet() == ()
    assert world.asked == [12]


def test_too_few_clients_are_waited_for_and_no_longer_than_asked() -> None:
    world = World({11: 0})
    fleet, clock = begun(world)
    began = clock.now
    assert fleet.meet(2, 20.0) == ()
    assert clock.now == pytest.approx(began + 20.0)
    sleep = clock.sleep

    def comes(seconds: float) -> None:
        sleep(seconds)
        if clock.now > began + 25.0:
            world.here[12] = 1

    assert replace(fleet, sleep=comes).meet(2, 20.0) == ("client 1 takes part from now on",)
    assert clock.now < began + 27.0


def test_a_run_that_goes_on_keeps_its_base_whatever_most_nodes_have(tmp_path) -> None:
    registry = Registry(tmp_path / "fleet.sqlite")
    begun(World({11: 0, 12: 1, 13: 2}), registry=registry)
    other = World({21: 0, 22: 1, 23: 2})

    def change(node: int, reply: Message) -> Message:
        if node > 21:
            reply.content = pack_capabilities(replace(unpack_capabilities(reply.content), base="other"))
        return reply

    other.change = change
    later = Registry(registry.path)
    fleet, _ = begun(other, registry=later)
    assert (fleet.base, fleet.nodes, fleet.known) == ("linear-5x4", {0: 21}, 3)
    assert fleet.refused == (
        "client 1: its base model and adapter shape are other; the run's are linear-5x4",
        "client 2: its base model and adapter shape are other; the run's are linear-5x4",
    )
    here = in_process(lambda settings, config: participant(LinearTrainer(base="moved")), 3)
    with pytest.raises(ProtocolError, match="its base model and adapter shape are moved; the run's are linear-5x4"):
        muster(here, FactorMean(), "{}", 3, 10.0, registry=later)


def test_nodes_that_are_alike_are_known_from_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    queries = []
    push = InProcessGrid.push_messages
    monkeypatch.setattr(InProcessGrid, "push_messages", lambda self, x: queries.extend(x) or push(self, x))
    fleet = muster(in_process(lambda settings, config: participant(), 40), FactorMean(), "{}", 40, 10.0)
    assert len(queries) == 1
    assert fleet.start is not None
    assert (fleet.nodes[39], len(fleet.nodes), fleet.clients(), fleet.known) == (40, 40, range(40), 40)
    assert (39 in fleet.nodes, 40 in fleet.nodes, fleet.central, fleet.meet()) == (True, False, 0, ())
    assert one_round(fleet, (3, 39))[0].survivors == (3, 39)


def test_alike_nodes_of_whom_the_first_can_not_answer_are_known_from_the_next() -> None:
    def examples(client: int) -> object:
        if client == 0:
            raise OSError("disk")
        return counts(client)

    build = lambda settings, config: replace(participant(), examples=examples)  # noqa: E731
    fleet = muster(in_process(build, 5), FactorMean(), "{}", 5, 10.0)
    assert fleet.start is not None
    assert len(fleet.nodes) == 5
