"""The beginning of a run: which nodes are there, what they can do, and the adapter to start from."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from flwr.serverapp import Grid

from fedpeft.adapters import Adapter
from fedpeft.errors import ProtocolError
from fedpeft.flower.answers import Capabilities, unpack_capabilities
from fedpeft.flower.arrivals import NO_IDENTITY, Arrivals, content_of, misfit, stranger
from fedpeft.flower.fleet import AsRegistered, Clock, Fleet, InOrder, Sleep
from fedpeft.flower.inprocess import InProcessGrid
from fedpeft.flower.post import Letter, Post
from fedpeft.flower.registry import Registry
from fedpeft.flower.requests import Query, pack_query
from fedpeft.flower.shipping import Shipping
from fedpeft.rules import Rule

_TRIES = 3


def muster(
    grid: Grid,
    rule: Rule,
    settings: str,
    clients: int,
    deadline: float,
    want_start: bool = True,
    clock: Clock = time.monotonic,
    sleep: Sleep = time.sleep,
    patience: float | None = None,
    registry: Registry | None = None,
    identified: bool = False,
    least: int = 1,
) -> Fleet:
    """Wait for this many nodes, ask what they can do, and keep those that share one base.

    The base is the registry's if a run has begun with it; else what most have, and the lowest-numbered client's of two
    equally common ones. Of nodes that are alike one is asked, and says it for all. With ``want_start`` one node, the
    lowest-numbered, sends the start adapter. Raises ProtocolError if nobody can take part, or if two nodes claim the
    same client number. deadline: seconds to wait for the nodes; patience: seconds to wait for their answers, which may
    take loading a model (the same if not given); registry: a temporary one if not given; identified: leave out who has
    no identity for secure aggregation. Of two nodes with one identity the client with the lower number takes part.
    least: with fewer who can take part than this, those are waited for, however long it takes, to whom a kit is on its
    way.
    """
    until = clock() + deadline
    while len(found := _sized(grid)) < clients and clock() < until:
        sleep(0.5)
    registry = Registry() if registry is None else registry
    asking = _Asking(
        *(grid, settings, clients, deadline if patience is None else patience),
        *(Post(grid, "query", "query", clock, sleep), clock, least),
    )
    if isinstance(grid, InProcessGrid) and grid.is_alike:
        one = asking.first(found, want_start)
        registry.begin(one.base)
        if identified and not one.identity:
            raise ProtocolError(f"client {one.client}: {NO_IDENTITY}")
        if one.base != registry.base:
            raise ProtocolError(misfit(one, clients, f"the run's are {registry.base}"))
        nodes = InOrder(min(len(found), clients))
        start, traffic = one.start, asking.post.traffic
        return Fleet(grid, rule, settings, one.base, nodes, registry, start, (), traffic, clock, sleep, one.central)
    registry.arrivals(found)
    answers, refused = asking.all(sorted(found), want_start)
    members = _fitting(answers, clients, registry, refused, identified)
    if not members:
        raise ProtocolError(
            f"no node can take part: {len(found)} were asked; {'; '.join(refused[:3]) or 'none was there'}"
        )
    base = next(iter(members.values())).base
    registry.begin(base)
    registry.meet(members)
    start = asking.start(members) if want_start else None
    arrivals = Arrivals(grid, registry, settings, base, clients, asking.patience, clock, sleep, identified)
    traffic = asking.post.traffic
    return Fleet(
        grid, rule, settings, base, AsRegistered(registry), registry, start, tuple(refused), traffic, clock, sleep,
        arrivals=arrivals,
    )  # fmt: skip


def _sized(grid: Grid) -> Sequence[int]:
    found = grid.get_node_ids()
    return found if isinstance(found, Sequence) else list(found)


@dataclass(frozen=True, slots=True)
class _Asking:
    """The first questions to the nodes.

    patience: seconds to wait for an answer; least: answers to wait for while a kit is on its way.
    """

    grid: Grid
    settings: str
    clients: int
    patience: float
    post: Post
    clock: Clock
    least: int

    def first(self, nodes: Sequence[int], want_start: bool) -> Capabilities:
        """The answer of the first of the nodes, or of one soon after it, who is client 0 if it has a start to give."""
        refused: list[str] = []
        for node in nodes[:_TRIES]:
            answers, why = self._ask([node], node - 1 if want_start else None)
            if node in answers:
                return answers[node]
            refused += why
        raise ProtocolError(
            f"no node can take part: {len(nodes[:_TRIES])} were asked; {'; '.join(refused) or 'none was there'}"
        )

    def all(self, nodes: Sequence[int], want_start: bool) -> tuple[dict[int, Capabilities], list[str]]:
        """Answers by node, and why some gave none; with the start adapter of client 0, if it is there."""
        return self._ask(nodes, 0 if want_start else None)

    def start(self, members: dict[int, Capabilities]) -> Adapter:
        """The start adapter of the client with the lowest number."""
        node, first = next(iter(members.items()))
        if first.start is not None:
            return first.start
        answers, refused = self._ask([node], first.client)
        start = answers[node].start if node in answers else None
        if start is None:
            raise ProtocolError(f"client {first.client} could not give the start adapter: {'; '.join(refused)}")
        return start

    def _ask(self, nodes: Sequence[int], start: int | None) -> tuple[dict[int, Capabilities], list[str]]:
        content = pack_query(Query(self.settings, start))
        letters = [Letter(node, node, content) for node in nodes]
        refused = [f"node {node}: the message could not be sent" for node in self.post.push(letters, self.patience)]
        silent = set(nodes)
        answers: dict[int, Capabilities] = {}
        until = self.clock() + self.patience

        def is_settled() -> bool:
            is_served = isinstance(self.grid, Shipping) and self.grid.is_serving and len(answers) < self.least
            return self.clock() >= until and not is_served

        for reply in self.post.replies(inf if isinstance(self.grid, Shipping) else self.patience, is_settled):
            silent.discard(reply.letter.node)
            try:
                answers[reply.letter.node] = unpack_capabilities(content_of(reply.content))
            except ProtocolError as error:
                refused.append(f"node {reply.letter.node}: {error}")
        return answers, refused + [f"node {node}: no answer to a query before the deadline" for node in sorted(silent)]


def _fitting(
    answers: dict[int, Capabilities], clients: int, registry: Registry, refused: list[str], identified: bool
) -> dict[int, Capabilities]:
    """Answers by node of those who can take part, in ascending order of clients; the others are left out."""
    claims = Counter(x.client for x in answers.values())
    twice = sorted(client for client, n in claims.items() if n > 1)
    if twice:
        raise ProtocolError(
            f"{claims[twice[0]]} nodes say that they are client {twice[0]}; want one: "
            f"start each node with its own partition-id"
        )
    found = dict(sorted(answers.items(), key=lambda item: item[1].client))
    numbered = [x for x in found.values() if x.client < clients]
    begun = registry.base
    base = begun or (_shared(numbered) if numbered else "")
    want = f"the run's are {begun}" if begun else f"most have {base}"
    members: dict[int, Capabilities] = {}
    taken: dict[str, int] = {}
    for node, x in found.items():
        problem = misfit(x, clients, want) if x.client >= clients or x.base != base else ""
        problem = problem or stranger(x, taken.get(x.identity, registry.owner(x.identity)), identified)
        if problem:
            refused.append(problem)
            registry.leave_out(node)
            continue
        members[node] = x
        if x.identity:
            taken[x.identity] = x.client
    return members


def _shared(members: Sequence[Capabilities]) -> str:
    votes = Counter(x.base for x in members)
    most = max(votes.values())
    return next(x.base for x in members if votes[x.base] == most)
