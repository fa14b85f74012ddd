"""The coordinator's side of a round: carries what a ``Round`` says to clients, and their answers back.

Answers go into the round one by one, and nothing of them is kept here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeAlias

from flwr.app import RecordDict

from fedpeft.channel import Coding
from fedpeft.errors import ProtocolError
from fedpeft.flower.answers import Refusal, Term, unpack_metrics, unpack_term
from fedpeft.flower.fleet import Fleet
from fedpeft.flower.packing import digest_of
from fedpeft.flower.post import Letter, Post, Reply, Traffic
from fedpeft.flower.requests import Part, constants_of, moving, pack_request
from fedpeft.flower.versions import Version
from fedpeft.rounds import Metrics, Round, derive
from fedpeft.rules import Broadcast, ServerState

OnReply: TypeAlias = Callable[[int, str | None], None]


def _ignore(client: int, problem: str | None) -> None:
    pass


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """Answers by client and part; who was refused or did not answer, and why."""

    answers: Mapping[int, Mapping[Part, Metrics]]
    refused: tuple[tuple[int, str], ...]
    traffic: Traffic


def drive(fleet: Fleet, round: Round, deadline: float, on_reply: OnReply = _ignore) -> Traffic:
    """Run a round to its end: all passes, each closed when it is settled or after ``deadline`` seconds.

    on_reply: told each client that answered, with the reason if its answer was refused. What is wrong
    with an answer is counted in the round and never raised; too few answers show in ``round.result``.
    """
    post = Post(fleet.grid, "train", str(round.state.task.round), fleet.clock, fleet.sleep)
    while not round.is_over:
        writer = Writer(fleet, "train")
        for client in post.push(list(_letters(fleet, round, writer)), deadline):
            round.refuse(client, "the message could not be sent")
        for reply in post.replies(deadline, lambda: round.is_settled):
            problem = _receive(round, reply, fleet.coding(round.layout))
            if problem is None:
                fleet.found(reply.letter)
            on_reply(reply.letter.client, problem)
        round.close()
    return post.traffic


def evaluate(
    fleet: Fleet,
    state: ServerState,
    ranks: Mapping[int, int],
    parts: Mapping[int, Sequence[Part]],
    deadline: float,
    on_reply: OnReply = _ignore,
) -> Evaluation:
    """Each client's metrics on the ``parts`` asked of it: its own at its rank, "central" at the server's.

    What is wrong with an answer is never raised: that client is in ``refused``.
    """
    post = Post(fleet.grid, "evaluate", str(state.task.round), fleet.clock, fleet.sleep)
    writer = Writer(fleet, "evaluate")
    whole = max((x.rank for x in state.task.spec.layers), default=0)
    letters: list[Letter] = []
    refused: list[tuple[int, str]] = []
    sent: dict[int, Broadcast] = {}
    for client in sorted(parts):
        for rank, some in _by_rank(parts[client], min(ranks[client], whole), whole):
            if client in fleet.nodes:
                if rank not in sent:
                    said = fleet.rule.send(state, rank)
                    sent[rank] = replace(said, task=replace(said.task, shared={}))  # which is for training alone
                letters.append(writer.letter(client, rank, sent[rank], some))
            else:
                refused.append((client, "has no node"))
    refused += [(client, "the message could not be sent") for client in post.push(letters, deadline)]
    answers: dict[int, dict[Part, Metrics]] = {}
    silent = {letter.client for letter in letters}
    for reply in post.replies(deadline, lambda: False):
        client, problem = reply.letter.client, None
        silent.discard(client)
        try:
            found = unpack_metrics(_content(reply))
            if not set(found) <= set(parts[client]):
                raise ProtocolError(f"evaluated {sorted(found)}; want {sorted(parts[client])}")
            answers.setdefault(client, {}).update(found)
            fleet.holds[client].add(reply.letter.digest)  # and not its version: what it takes is training's to count
        except ProtocolError as error:
            problem = str(error)
            refused.append((client, problem))
        on_reply(client, problem)
    refused += [(client, "no answer before the deadline") for client in sorted(silent - {c for c, _ in refused})]
    return Evaluation({c: answers[c] for c in sorted(answers)}, tuple(refused), post.traffic)


@dataclass(slots=True)
class Writer:
    """Writes the letters of one pass; those of one rank share one record, so that it is packed once."""

    fleet: Fleet
    kind: Literal["train", "evaluate"]
    _packed: dict[tuple[int, tuple[Part, ...], bool, str], RecordDict] = field(default_factory=dict)
    _digests: dict[int, str] = field(default_factory=dict)
    _versions: dict[int, Version | None] = field(default_factory=dict)

    def letter(self, client: int, rank: int, broadcast: Broadcast, parts: tuple[Part, ...] = ()) -> Letter:
        constant = self.fleet.rule.constant(broadcast.task.spec)
        if rank not in self._digests:
            constants = constants_of(broadcast.adapter, constant) if broadcast.task.pass_ == 0 else {}
            self._digests[rank] = digest_of(constants) if constants else ""
            self._versions[rank] = self._version(broadcast, constant)
        digest, version, versions = self._digests[rank], self._versions[rank], self.fleet.versions
        write = partial(self._write, rank, broadcast, constant, parts)
        is_held = not digest or digest in self.fleet.holds[client]
        before = "" if version is None or versions is None else versions.holds(client, version.rank)
        in_full = partial(write, True, "") if (digest and is_held) or before else None
        brings = None if version is None else (version.rank, version.digest)
        return Letter(client, self.fleet.nodes[client], write(not is_held, before), digest, in_full, brings)

    def _version(self, broadcast: Broadcast, constant: frozenset[str]) -> Version | None:
        if self.fleet.versions is None or broadcast.task.pass_:
            return None
        rank = max((x.rank for x in broadcast.adapter.layers.values()), default=0)
        return self.fleet.versions.of(rank, broadcast.task.round, moving(broadcast, constant))

    def _write(
        self,
        rank: int,
        broadcast: Broadcast,
        constant: frozenset[str],
        parts: tuple[Part, ...],
        in_full: bool,
        before: str,
    ) -> RecordDict:
        key = (rank, parts, in_full, before)
        if key not in self._packed:
            fleet, version = self.fleet, self._versions[rank]
            steps = None if version is None else version.since(before)
            self._packed[key] = pack_request(
                self.kind, broadcast, fleet.settings, fleet.base, constant, in_full, parts, version, steps
            )
        return self._packed[key]


def _letters(fleet: Fleet, round: Round, writer: Writer) -> Iterator[Letter]:
    outbox = round.outbox()
    order = sorted(outbox)
    if round.enough is not None:  # else a grid that answers in order would always leave out the same clients
        order.sort(key=lambda client: derive(round.state.task.round, "select", client))
    for client in order:
        if client in fleet.nodes:
            yield writer.letter(client, round.ranks[client], outbox[client])
        else:
            round.refuse(client, "has no node")


def _receive(round: Round, reply: Reply, coding: Coding | None) -> str | None:
    """Give an answer to the round; the reason if it was refused."""
    client = reply.letter.client
    try:
        term = term_of(reply, round.size, coding)
    except ProtocolError as error:
        if reply.is_current:
            round.refuse(client, str(error))
        return str(error)
    stale = reply.is_current and _stale(round, term)
    if stale:  # its one answer to this pass is used up, so that nothing more is to be waited for
        round.refuse(client, stale)
        return stale
    try:
        round.receive(client, term.vector, term.round, term.pass_)
    except ProtocolError as error:
        return str(error)
    return None


def _stale(round: Round, term: Term) -> str:
    task = round.state.task
    if (term.round, term.pass_) == (task.round, task.pass_):
        return ""
    return f"the answer is for round {term.round}, pass {term.pass_}; want round {task.round}, pass {task.pass_}"


def term_of(reply: Reply, most: int, coding: Coding | None = None) -> Term:
    """What a client answered, of at most so many numbers. Raises ProtocolError for a refusal, and for no answer."""
    return unpack_term(_content(reply), most, coding)


def _content(reply: Reply) -> RecordDict:
    if isinstance(reply.content, Refusal):
        raise ProtocolError(reply.content.reason)
    return reply.content


def _by_rank(parts: Sequence[Part], rank: int, whole: int) -> Iterator[tuple[int, tuple[Part, ...]]]:
    """Which parts to ask for at which rank: a client with few directions evaluates its own with these alone."""
    own = tuple(p for p in parts if p != "central" or rank == whole)
    rest = tuple(p for p in parts if p not in own)
    if own:
        yield rank, own
    if rest:
        yield whole, rest
