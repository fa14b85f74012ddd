"""Who takes part in a run: the nodes that answered the first query, and what they can do."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedpeft.adapters import Adapter
from fedpeft.errors import ProtocolError
from fedpeft.flower.answers import Capabilities, Refusal, unpack_capabilities
from fedpeft.flower.post import Letter, Post, Traffic
from fedpeft.flower.requests import Query, pack_query
from fedpeft.rules import Rule


@dataclass(frozen=True, slots=True, eq=False)
class Fleet:
    """A run's clients, and how to reach them.

    nodes: each client's Flower node; members: what each said of itself; base: the fingerprint that
    they share; settings: what every request carries, so that a node can build itself from it; holds:
    the digests of the constants that each client has, which grows as they are sent; start: the adapter
    before any training, where it was asked for; refused: who can't take part, and why.
    """

    grid: Grid
    rule: Rule
    settings: str
    base: str
    nodes: dict[int, int]
    members: dict[int, Capabilities]
    start: Adapter | None = None
    refused: tuple[str, ...] = ()
    traffic: Traffic = field(default_factory=Traffic)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    holds: dict[int, set[str]] = field(default_factory=dict)

    @property
    def central(self) -> int | None:
        """The client with the lowest number whose node holds the central test set, if any does."""
        return min((client for client, x in self.members.items() if x.central), default=None)


def muster(
    grid: Grid,
    rule: Rule,
    settings: str,
    clients: int,
    deadline: float,
    want_start: bool = True,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    patience: float | None = None,
) -> Fleet:
    """Wait for this many nodes, ask all what they can do, and keep those that share one base.

    The base is what most have, and the lowest-numbered client's of two equally common ones. With
    ``want_start`` one node, the lowest-numbered, sends the start adapter. Raises ProtocolError if
    nobody can take part, or if two nodes claim the same client number. deadline: seconds to wait for the
    nodes; patience: seconds to wait for their answers, which may take loading a model (the same if not given).
    """
    until = clock() + deadline
    while len(found := sorted(grid.get_node_ids())) < clients and clock() < until:
        sleep(0.5)
    deadline = deadline if patience is None else patience
    fleet = Fleet(grid, rule, settings, "", {}, {}, clock=clock, sleep=sleep)
    post = Post(grid, "query", "query", clock, sleep)
    content = pack_query(Query(settings, 0 if want_start else None))
    answers, refused = _ask(post, [Letter(node, node, content) for node in found], deadline)
    members = _members(answers, clients, refused)
    if not members:
        raise ProtocolError(
            f"no node can take part: {len(found)} were asked; {'; '.join(refused[:3]) or 'none was there'}"
        )
    base = _shared_base(members)
    for client, x in list(members.items()):
        if x.base != base:
            refused.append(f"client {client}: its base model and adapter shape are {x.base[:80]}; most have {base}")
            del members[client]
    fleet = replace(
        fleet,
        base=base,
        nodes={x.client: node for node, x in answers.items() if members.get(x.client) is x},
        members=members,
        refused=tuple(refused),
        holds={client: set(x.holds) for client, x in members.items()},
    )
    start = _start(fleet, post, deadline) if want_start else None
    return replace(fleet, start=start, traffic=post.traffic)


def _ask(post: Post, letters: list[Letter], deadline: float) -> tuple[dict[int, Capabilities], list[str]]:
    """Answers by node, and why some gave none."""
    refused = [f"node {node}: the message could not be sent" for node in post.push(letters, deadline)]
    silent = {letter.node for letter in letters}
    answers: dict[int, Capabilities] = {}
    for reply in post.replies(deadline, lambda: False):
        silent.discard(reply.letter.node)
        try:
            answers[reply.letter.node] = unpack_capabilities(_content(reply.content))
        except ProtocolError as error:
            refused.append(f"node {reply.letter.node}: {error}")
    return answers, refused + [f"node {node}: no answer to a query before the deadline" for node in sorted(silent)]


def _content(content: RecordDict | Refusal) -> RecordDict:
    if isinstance(content, Refusal):
        raise ProtocolError(content.reason)
    return content


def _members(answers: dict[int, Capabilities], clients: int, refused: list[str]) -> dict[int, Capabilities]:
    """Answers by client, in ascending order."""
    claims = Counter(x.client for x in answers.values())
    twice = sorted(client for client, n in claims.items() if n > 1)
    if twice:
        raise ProtocolError(
            f"{claims[twice[0]]} nodes say that they are client {twice[0]}; want one: "
            f"start each node with its own partition-id"
        )
    found = sorted(answers.values(), key=lambda x: x.client)
    refused += [f"client {x.client}: want a number from 0 to {clients - 1}" for x in found if x.client >= clients]
    return {x.client: x for x in found if x.client < clients}


def _shared_base(members: dict[int, Capabilities]) -> str:
    votes = Counter(x.base for x in members.values())
    most = max(votes.values())
    return next(x.base for x in members.values() if votes[x.base] == most)


def _start(fleet: Fleet, post: Post, deadline: float) -> Adapter:
    first = min(fleet.members)
    offered = fleet.members[first].start
    if offered is not None:
        return offered
    letter = Letter(fleet.nodes[first], fleet.nodes[first], pack_query(Query(fleet.settings, first)))
    answers, refused = _ask(post, [letter], deadline)
    start = answers[letter.node].start if letter.node in answers else None
    if start is None:
        raise ProtocolError(f"client {first} could not give the start adapter: {'; '.join(refused)}")
    return start
