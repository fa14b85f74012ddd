"""Grids that misbehave, a clock that obeys, and a round over them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from typing_extensions import override

from fedpeft.flower import Fleet, InProcessGrid, Participant, Traffic, drive, in_process, muster
from fedpeft.rounds import Outcome, SumRound
from fedpeft.rules import FactorMean, MeanRule, ServerState, Task
from tests.flower.linear import RANK, start

Change = Callable[[int, Message], list[Message]]


@dataclass
class Clock:
    """Time passes only by sleeping."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class FaultyGrid(InProcessGrid):
    """An in-process grid whose replies pass through ``change(client, reply)``, which may drop or add some."""

    change: Change = staticmethod(lambda client, reply: [reply])

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ids = list(message_ids)
        for _ in ids:  # a dropped reply must not look like the end of the batch
            replies = super().pull_messages(ids)
            if not replies:
                return []
            changed = [x for reply in replies for x in self.change(reply.metadata.src_node_id - 1, reply)]
            if changed:
                return changed
        return []


def gathered(participant: Participant, clients: int, rule: MeanRule | None = None) -> tuple[Fleet, FaultyGrid, Clock]:
    """A fleet of this many clients in this process, all served by one participant."""
    like = in_process(lambda settings, config: participant, clients)
    grid, clock = FaultyGrid(like._handler, list(like._nodes.values())), Clock()
    rule = rule if rule is not None else FactorMean()
    return muster(grid, rule, "{}", clients, 10.0, clock=clock, sleep=clock.sleep), grid, clock


def first_state() -> ServerState:
    return ServerState(Task(start().spec), start())


def one_round(
    fleet: Fleet,
    clients: Iterable[int],
    state: ServerState | None = None,
    rule: MeanRule | None = None,
    ranks: Mapping[int, int] | None = None,
    enough: int | None = None,
) -> tuple[Outcome, Traffic]:
    """The outcome of a round with these clients, and what it cost."""
    ranks = ranks if ranks is not None else dict.fromkeys(clients, RANK)
    rule = rule if rule is not None else FactorMean()
    round = SumRound(state if state is not None else first_state(), ranks, 1, rule=rule, enough=enough)
    traffic = drive(fleet, round, 30.0)
    return round.result(), traffic
