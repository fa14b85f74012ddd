"""A round in the clear, as a state machine without I/O.

Whoever drives it carries ``outbox`` to the clients, gives each answer to ``receive`` in any order,
calls ``close`` when ``is_settled`` or when time is up, again for each pass, and reads ``result``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from typing_extensions import override

from fedpeft.adapters import Array, Tensors, Update
from fedpeft.channel import PlainChannel, Running
from fedpeft.errors import ProtocolError
from fedpeft.rounds.metrics import Metrics
from fedpeft.rules import Averaging, Broadcast, ListRule, MeanRule, Rule, ServerOptimiser, ServerState, Task

STATISTICS = len(Metrics().vector())


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A round that is over: the next state, the survivors' metrics and total weight, and who was refused and why.

    staleness: how many rounds had passed since each survivor was asked, in the same order; empty where none can have.
    """

    state: ServerState
    metrics: Metrics
    weight: float
    survivors: tuple[int, ...]
    refused: tuple[tuple[int, str], ...]
    staleness: tuple[int, ...] = ()


def contribute(rule: Rule, channel: PlainChannel, update: Update, weight: float, metrics: Metrics, task: Task) -> Array:
    """One client's answer for one pass: all that leaves it."""
    x = rule.layout(task).flatten(rule.encode(update, task))
    return channel.up(x, weight, metrics.vector())


def inspect(answer: Array, size: int, channel: PlainChannel, largest_weight: float) -> None:
    """Raise ProtocolError for an answer that may not be added to a sum of encodings of this size."""
    if answer.shape != (size + 1 + STATISTICS,):
        raise ProtocolError(f"the update has shape {answer.shape}; want ({size + 1 + STATISTICS},)")
    channel.check(answer, size, largest_weight)
    counts = Metrics.of(answer[size + 1 :])
    if min(counts.loss, counts.correct, counts.examples) < 0 or counts.correct > counts.units:
        raise ProtocolError(f"the update has impossible counts: {counts}")


@dataclass(slots=True)
class Round(ABC):
    """What every round in the clear does: ask, check, refuse, count.

    ranks: the chosen clients and the rank of each; quorum: the fewest answers that make a result;
    enough: the number of answers after which nobody else is waited for; largest_weight: the most
    that one client may claim.
    """

    state: ServerState
    ranks: Mapping[int, int]
    quorum: int
    channel: PlainChannel = field(default_factory=PlainChannel)
    enough: int | None = None
    largest_weight: float = float("inf")
    refused: list[tuple[int, str]] = field(default_factory=list)
    _waiting: set[int] = field(init=False)
    _answered: list[int] = field(init=False)
    _is_over: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.quorum < 1:
            raise ValueError(f"quorum: got {self.quorum}; want at least 1, for no answer has no mean")
        self._open(self.ranks)

    @property
    @abstractmethod
    def _rule(self) -> Rule: ...

    @abstractmethod
    def _take(self, client: int, term: Array) -> None:
        """Keep what this round needs of a checked term."""

    @abstractmethod
    def _finish(self) -> None:
        """Settle the pass that has just been closed: start the next one or end the round."""

    @abstractmethod
    def result(self) -> Outcome:
        """The outcome. Raises ProtocolError if too few answered, RuntimeError while the round is open."""

    @property
    def waiting(self) -> frozenset[int]:
        """Clients that were asked in this pass and have neither answered nor been refused."""
        return frozenset(self._waiting)

    @property
    def answered(self) -> tuple[int, ...]:
        """Clients whose terms are in this pass."""
        return tuple(sorted(self._answered))

    @property
    def is_settled(self) -> bool:
        """Whether this pass has nothing more to wait for."""
        return not self._waiting or (self.enough is not None and len(self._answered) >= self.enough)

    @property
    def is_over(self) -> bool:
        """Whether all passes are closed."""
        return self._is_over

    def outbox(self) -> dict[int, Broadcast]:
        """What each client that is waited for should receive, in ascending order of clients."""
        return {client: self._rule.send(self.state, self.ranks[client]) for client in sorted(self._waiting)}

    def receive(self, client: int, answer: Array, round: int, pass_: int) -> None:
        """Add one client's answer.

        A ProtocolError is also counted in ``refused``, and leaves the sum as it was. After a bad answer
        its client is not waited for, and after a stale one it is: the answer to this pass may still come.
        """
        task = self.state.task
        if (round, pass_) != (task.round, task.pass_):
            reason = f"the answer is for round {round}, pass {pass_}; want round {task.round}, pass {task.pass_}"
            self.refused.append((client, reason))
            raise ProtocolError(reason)
        try:
            self._check(client, answer)
        except ProtocolError as error:
            self.refuse(client, str(error))
            raise
        self._take(client, self.channel.weigh(answer, self._rule.layout(task).size))
        self._waiting.discard(client)
        self._answered.append(client)

    def refuse(self, client: int, reason: str) -> None:
        """Go on without this client in this pass, unless its answer is already counted."""
        self._waiting.discard(client)
        self.refused.append((client, reason))

    def close(self) -> None:
        """No more answers in this pass: who has not answered has dropped out."""
        if self._is_over:
            raise RuntimeError("the round is over: nothing to close")
        if self.enough is None or len(self._answered) < self.enough:
            self.refused.extend((client, "no answer before the deadline") for client in sorted(self._waiting))
        self._waiting.clear()
        self._finish()

    def _check(self, client: int, answer: Array) -> None:
        if client in self._answered:
            raise ProtocolError("answered twice: the first answer counts")
        if client not in self._waiting:
            raise ProtocolError("was not asked, or is no longer waited for")
        inspect(answer, self._rule.layout(self.state.task).size, self.channel, self.largest_weight)

    def _open(self, clients: Mapping[int, int] | tuple[int, ...]) -> None:
        self._waiting, self._answered = set(clients), []

    def _need_quorum(self) -> None:
        if len(self._answered) < self.quorum:
            raise ProtocolError(f"too few answers: got {len(self._answered)}; want at least {self.quorum}")

    def _outcome(self, state: ServerState, weight: float, statistics: Array) -> Outcome:
        return Outcome(state, Metrics.of(statistics), weight, self.answered, tuple(self.refused))


@dataclass(slots=True)
class SumRound(Round):
    """A round that keeps nothing but sums, so only a ``MeanRule`` fits; memory does not grow with the cohort."""

    rule: MeanRule = field(kw_only=True)
    optimiser: ServerOptimiser = field(default_factory=Averaging, kw_only=True)
    _sum: Running = field(init=False)

    def __post_init__(self) -> None:
        Round.__post_init__(self)
        self._sum = self._empty()

    @property
    @override
    def _rule(self) -> Rule:
        return self.rule

    @override
    def _take(self, client: int, term: Array) -> None:
        self._sum.add(term)

    @override
    def _finish(self) -> None:
        task = self.state.task
        if task.pass_ + 1 == self.rule.passes or len(self._answered) < self.quorum:
            self._is_over = True
            return
        mean, _, _ = self._mean()
        shared = dict(task.shared) | dict(self.rule.between(mean, self.state))
        self.state = replace(self.state, task=replace(task, pass_=task.pass_ + 1, shared=shared))
        self._open(self.answered)
        self._sum = self._empty()

    @override
    def result(self) -> Outcome:
        if not self._is_over:
            raise RuntimeError(f"the round is still open: {len(self._waiting)} clients have not answered")
        self._need_quorum()
        mean, weight, statistics = self._mean()
        change, moments = self.optimiser.step(mean, self.state.moments)
        state = self.rule.decode(change, replace(self.state, moments=moments))
        return self._outcome(state, weight, statistics)

    def _empty(self) -> Running:
        return Running(self.rule.layout(self.state.task).size + 1 + STATISTICS)

    def _mean(self) -> tuple[Tensors, float, Array]:
        layout = self.rule.layout(self.state.task)
        mean, weight, statistics = self.channel.down(self._sum.total, layout.size)
        return layout.unflatten(mean), weight, statistics


@dataclass(slots=True)
class ListRound(Round):
    """A round that keeps each client's encoding, for a ``ListRule``: memory grows with the cohort.

    The rule gets the encodings in ascending order of clients, so the order of arrival changes nothing.
    """

    rule: ListRule = field(kw_only=True)
    _terms: dict[int, Array] = field(init=False, default_factory=dict)

    @property
    @override
    def _rule(self) -> Rule:
        return self.rule

    @override
    def _take(self, client: int, term: Array) -> None:
        self._terms[client] = term

    @override
    def _finish(self) -> None:
        self._is_over = True

    @override
    def result(self) -> Outcome:
        if not self._is_over:
            raise RuntimeError(f"the round is still open: {len(self._waiting)} clients have not answered")
        self._need_quorum()
        layout = self.rule.layout(self.state.task)
        each = [self.channel.down(term, layout.size) for _, term in sorted(self._terms.items())]
        encodings = [(layout.unflatten(mean), weight) for mean, weight, _ in each]
        statistics = sum((s for _, _, s in each), Metrics().vector())
        return self._outcome(self.rule.decode(encodings, self.state), sum(w for _, w, _ in each), statistics)
