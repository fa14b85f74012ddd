"""Nodes that come after a run has begun, and clients that come back at another node."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedpeft.errors import ProtocolError
from fedpeft.flower.answers import Capabilities, Refusal, unpack_capabilities
from fedpeft.flower.post import Letter, Post, Reply
from fedpeft.flower.registry import Registry
from fedpeft.flower.requests import Query, pack_query

NO_IDENTITY = "has no identity for secure aggregation; want one: `fedpeft keys init`"


@dataclass(slots=True, eq=False)
class Arrivals:
    """Asks each node once, when it is first seen, and puts who can take part into the registry.

    A client stays at its node as long as that one is there: a node that claims its number meanwhile is left out, so
    that nobody can take a client's place by saying its number, and is asked again once the client's own node has
    gone. So a node that was started anew takes part again when Flower has noticed that the old one is dead, about a
    minute later. clients: how many there can be; patience: seconds after which a node that has not answered is asked
    once more; identified: leave out who has no identity for secure aggregation.
    """

    grid: Grid
    registry: Registry
    settings: str
    base: str
    clients: int
    patience: float
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    identified: bool = False
    _post: Post = field(init=False)
    _asked: dict[int, float] = field(default_factory=dict, init=False)
    _seen: bytes = field(default=b"", init=False)

    def __post_init__(self) -> None:
        self._post = Post(self.grid, "query", "query", self.clock, self.sleep)

    def look(self) -> Iterator[str]:
        """Ask who is new, and take in the answers that have come by now; what is to be said, a line each."""
        nodes = np.sort(np.fromiter(self.grid.get_node_ids(), np.uint64))
        seen = sha256(nodes.tobytes()).digest()
        present = frozenset(nodes.tolist()) if seen != self._seen else None
        for node in [node for node in self._asked if present is not None and node not in present]:
            self._forget(node)
        late = [node for node, until in self._asked.items() if until <= self.clock()]
        for node in late:
            self._forget(node)
            yield f"node {node}: no answer to a query within {self.patience:g} seconds; it is asked again"
        if present is not None or late:
            self._seen = seen
            self._ask(self.registry.arrivals(nodes.tolist()))
        while self._asked and (replies := self._post.some(0.0)):
            for reply in replies:
                if self._asked.pop(reply.letter.node, None) is not None:
                    yield self._told(reply)

    def _ask(self, arrivals: list[int]) -> None:
        content = pack_query(Query(self.settings, None))
        letters = [Letter(node, node, content) for node in arrivals if node not in self._asked]
        unsent = frozenset(self._post.push(letters, self.patience))
        until = self.clock() + self.patience
        self._asked |= {x.node: until for x in letters if x.node not in unsent}
        if unsent:  # it is gone again, or will be: look at the nodes anew next time
            self._seen = b""

    def _forget(self, node: int) -> None:
        del self._asked[node]
        self._post.abandon(node)

    def _told(self, reply: Reply) -> str:
        """Take a node in, or leave it out; a line about it."""
        node = reply.letter.node
        try:
            found = unpack_capabilities(content_of(reply.content))
        except ProtocolError as error:
            self.registry.leave_out(node)
            return f"node {node}: {error}"
        if found.client >= self.clients or found.base != self.base:
            self.registry.leave_out(node)
            return misfit(found, self.clients, f"the run's are {self.base}")
        if problem := stranger(found, self.registry.owner(found.identity), self.identified):
            self.registry.leave_out(node)
            return problem
        other = self.registry.node(found.client)
        if other is not None:
            self.registry.leave_out(node, found.client)
            return (
                f"node {node} says that it is client {found.client}, which node {other} is: left out while that stays"
            )
        is_new = not self.registry.knows(found.client)
        self.registry.meet({node: found})
        return f"client {found.client} {'takes part from now on' if is_new else 'is back'}"


def misfit(found: Capabilities, clients: int, want: str) -> str:
    """Why a node whose number or base is not the run's can't take part. want: what is said of the base."""
    if found.client >= clients:
        return f"client {found.client}: want a number from 0 to {clients - 1}"
    return f"client {found.client}: its base model and adapter shape are {found.base[:80]}; {want}"


def stranger(found: Capabilities, owner: int | None, identified: bool) -> str:
    """Why a node can't take part as who it says it is, "" where it can. owner: the client that has its identity."""
    if identified and not found.identity:
        return f"client {found.client}: {NO_IDENTITY}"
    if owner is not None and owner != found.client:
        return (
            f"client {found.client}: has the identity of client {owner}, {found.identity[:8]}; "
            f"want one of its own: `fedpeft keys init`"
        )
    return ""


def content_of(content: RecordDict | Refusal) -> RecordDict:
    """What a node answered. Raises ProtocolError for a refusal."""
    if isinstance(content, Refusal):
        raise ProtocolError(content.reason)
    return content
