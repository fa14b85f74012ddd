"""A grid in this process with a clock of its own, which advances without waiting.

What a client is asked to train is answered when its device would have answered (``rounds.devices``); all other
messages are answered at once, since they are the researcher's questions and no part of what is simulated. Clients are
trained when the first answer is needed, and all together that can still arrive by then; those whose answer would come
too late, or never, are not trained at all. The server's own work takes no time, and neither does what a client
fetches only once.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count

from flwr.app import Message
from typing_extensions import override

from fedpeft.errors import ProtocolError
from fedpeft.flower.answers import Refusal, pack_refusal
from fedpeft.flower.apps import Build, answer, client_of
from fedpeft.flower.inprocess import Alike, Handler, InProcessGrid, NodeConfig
from fedpeft.flower.packing import glance, tensor_bytes
from fedpeft.flower.vault import Vault
from fedpeft.rounds import Errand, Population, Visit

ErrandOf = Callable[[int, int, int], tuple[float, float, str]]
"""(client, round, pass) -> (tokens to train on, bytes to send up, why it can't be done or "")."""


class VirtualGrid(InProcessGrid):
    """Its ``clock`` and ``sleep`` are for whoever drives it: sleeping goes on to the next event.

    batch: the most clients that are trained in one call of the handler (all, if not set).
    """

    def __init__(
        self,
        handler: Handler,
        node_configs: Sequence[NodeConfig],
        population: Population,
        errand: ErrandOf,
        batch: int | None = None,
    ) -> None:
        InProcessGrid.__init__(self, handler, node_configs)
        self.visits: list[Visit] = []
        self._population, self._errand, self._largest = population, errand, batch
        self._now = 0.0
        self._numbers = count()
        self._free: dict[int, float] = {}
        self._begun: dict[int, tuple[float, float]] = {}
        self._due: dict[str, tuple[float, int]] = {}
        self._untrained: dict[str, Message] = {}
        self._ready: dict[str, Message] = {}
        self._events: list[float] = []

    def clock(self) -> float:
        """Simulated seconds since the run began."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Go on to the next answer or deadline; by so many seconds where nothing is under way."""
        while self._events and self._events[0] <= self._now:
            heapq.heappop(self._events)
        self._now = self._events[0] if self._events else self._now + seconds

    def take_visits(self) -> tuple[Visit, ...]:
        """All visits since this was last asked, in the order in which they were asked for."""
        visits, self.visits = tuple(self.visits), []
        return visits

    @property
    def time(self) -> tuple[float, Mapping[int, float]]:
        """The clock, and when each busy device will be free: with ``begun``, all that a schedule depends on."""
        return self._now, {client: t for client, t in sorted(self._free.items()) if t > self._now}

    def begun(self, client: int) -> tuple[float, float]:
        """When this client was last asked, and when its device was free at that time."""
        return self._begun[client]

    def restore(self, now: float, free: Mapping[int, float]) -> None:
        """Set what ``time`` gave."""
        self._now, self._free = now, dict(free)

    @contextmanager
    def as_of(self, client: int, asked: float, free: float) -> Iterator[None]:
        """What is pushed to this client inside is as ``begun`` says, and is no visit of its own."""
        now, visits = self._now, self.visits
        self._now, self._free[client], self.visits = asked, free, []
        try:
            yield
        finally:
            self._now, self.visits = now, visits

    @override
    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed: list[str] = []
        for message in messages:
            if message.metadata.message_type.partition(".")[0] != "train":
                pushed += InProcessGrid.push_messages(self, [message])
            elif message.metadata.dst_node_id in self._nodes:
                pushed.append(self._send(message))
        return pushed

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = list(dict.fromkeys(message_ids))
        mine = [name for name in wanted if name in self._due]
        arrived = [name for name in mine if self._due[name][0] <= self._now]
        if arrived:
            first = min(arrived, key=self._due.__getitem__)
            if first not in self._ready:
                self._train(mine)
            del self._due[first]
            return [self._ready.pop(first)] if first in self._ready else []
        rest = [name for name in wanted if name not in self._due]
        return InProcessGrid.pull_messages(self, rest) if rest else []

    def _send(self, message: Message) -> str:
        data = message.metadata
        name = next(self._names)
        data.__dict__["_message_id"] = name  # as in ``InProcessGrid``
        client = client_of(self._nodes[data.dst_node_id])
        facts = glance(message.content)[1]
        round, pass_ = facts.get("round"), facts.get("pass")
        if not isinstance(round, int) or not isinstance(pass_, int):
            raise ProtocolError(f"the request is for round {round}, pass {pass_}; want whole numbers")
        tokens, up, problem = self._errand(client, round, pass_)
        # Without the manifest, which has the run's own name in it, and constants, which travel once: a run that is
        # taken up again, or done again, has the same schedule.
        sizes = tensor_bytes(message.content).items()
        down = sum(size for x, size in sizes if not x.startswith(("constant/", "fixed/")))
        errand = Errand(down, tokens, up, problem)
        free, expires = self._free.get(client, 0.0), self._now + data.ttl
        visit = self._population.visit(client, round, errand, self._now, free, expires)
        self._begun[client] = (self._now, free)
        if visit.fate != "away":
            self._free[client] = visit.ended
        self.visits.append(visit)
        if visit.fate == "done":
            heapq.heappush(self._events, visit.ended)
            self._due[name] = (visit.ended, next(self._numbers))
            if problem:
                self._ready[name] = Message(pack_refusal(Refusal("failed", problem)), reply_to=message)
            else:
                self._untrained[name] = message
        heapq.heappush(self._events, expires)
        return name

    def _train(self, wanted: Sequence[str]) -> None:
        """Train what is waited for and can still arrive, in the order of arrival; forget what nobody waits for."""
        due = self._due
        for name in set(due) - set(wanted):
            del due[name]
            self._untrained.pop(name, None)
            self._ready.pop(name, None)
        names = sorted(self._untrained, key=due.__getitem__)[: self._largest]
        batch = [self._untrained.pop(name) for name in names]
        for reply in self._handler(batch, self._nodes):
            self._ready[reply.metadata.reply_to_message_id] = reply


def virtual(
    build: Build,
    clients: int,
    config: NodeConfig,
    population: Population,
    errand: ErrandOf,
    batch: int | None = None,
) -> VirtualGrid:
    """A grid of clients 0 to ``clients`` - 1 in this process, in virtual time; see ``in_process``."""
    vault = Vault()

    def handle(messages: Sequence[Message], nodes: Mapping[int, NodeConfig]) -> Iterator[Message]:
        return answer(build, messages, nodes, vault)

    return VirtualGrid(handle, Alike(config, clients), population, errand, batch)
