"""A round in the clear, as a state machine without I/O.

Whoever drives it carries ``outbox`` to the clients, gives each answer to ``receive`` in any order,
calls ``close`` when ``is_settled`` or when time is up, again for each pass, and reads ``result``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Array, Layout, Shape, Tensors
from fedpeft.channel import PlainChannel, Running, Sparse
from fedpeft.errors import ProtocolError
from fedpeft.rounds.answer import STATISTICS, answer_size, inspect, measured, need_finite
from fedpeft.rounds.exactness import Exactness, compared
from fedpeft.rounds.metrics import Metrics
from fedpeft.rules import Averaging, Broadcast, ListRule, MeanRule, Rule, ServerOptimiser, ServerState


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A round that is over: the next state, the survivors' metrics and total weight, and who was refused and why.

    staleness: how many rounds had passed since each survivor was asked, in the same order; empty where none can have;
    exactness: how far the new state is from the mean of what the clients did, None where it wasn't measured.
    """

    state: ServerState
    metrics: Metrics
    weight: float
    survivors: tuple[int, ...]
    refused: tuple[tuple[int, str], ...]
    staleness: tuple[int, ...] = ()
    exactness: Exactness | None = None


@dataclass(slots=True)
class Round(ABC):
    """What every round in the clear does: ask, check, refuse, count.

    ranks: the chosen clients and the rank of each; quorum: the fewest answers that make a result;
    enough: the number of answers after which nobody else is waited for; largest_weight: the most
    that one client may claim; exactness: whether clients send sketches of their changes, and the outcome has the error.
    """

    state: ServerState
    ranks: Mapping[int, int]
    quorum: int
    channel: PlainChannel = field(default_factory=PlainChannel)
    enough: int | None = None
    largest_weight: float = float("inf")
    refused: list[tuple[int, str]] = field(default_factory=list)
    exactness: bool = field(default=False, kw_only=True)
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
    def _take(self, client: int, answer: Array) -> None:
        """Keep what this round needs of a checked answer."""

    @abstractmethod
    def _finish(self) -> None:
        """Settle the pass that has just been closed: start the next one or end the round."""

    @abstractmethod
    def result(self) -> Outcome:
        """The outcome. ProtocolError if too few answered, or it is not finite; RuntimeError while the round is open."""

    @property
    def layout(self) -> Layout:
        """What an answer to this pass begins with."""
        return self._rule.layout(self.state.task)

    @property
    def size(self) -> int:
        """How many numbers an answer to this pass has."""
        return answer_size(self._rule, self.state.task, self.exactness)

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
        """What each client that is waited for should receive, in ascending order; those of one rank share it."""
        waiting = sorted(self._waiting)
        sent = {rank: self._rule.send(self.state, rank) for rank in {self.ranks[client] for client in waiting}}
        return {client: sent[self.ranks[client]] for client in waiting}

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
        self._take(client, answer)
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
        size = self._rule.layout(self.state.task).size
        inspect(answer, size, self.channel, self.largest_weight, self._sketches.size)

    def _open(self, clients: Mapping[int, int] | tuple[int, ...]) -> None:
        self._waiting, self._answered = set(clients), []

    def _need_quorum(self) -> None:
        if len(self._answered) < self.quorum:
            raise ProtocolError(f"too few answers: got {len(self._answered)}; want at least {self.quorum}")

    @property
    def _sketches(self) -> Layout:
        return measured(self._rule, self.state.task, self.exactness)

    def _outcome(self, state: ServerState, weight: float, statistics: Array) -> Outcome:
        need_finite(state)
        metrics, sketches = Metrics.of(statistics[:STATISTICS]), statistics[STATISTICS:]
        found = compared(sketches, weight, self._sketches, self.state, state)
        return Outcome(state, metrics, weight, self.answered, tuple(self.refused), exactness=found)


@dataclass(slots=True)
class SumRound(Round):
    """A round that keeps nothing but sums, so only a ``MeanRule`` fits; memory does not grow with the cohort.

    clients: how many there are in all; if not given, those who were asked.
    """

    rule: MeanRule = field(kw_only=True)
    optimiser: ServerOptimiser = field(default_factory=Averaging, kw_only=True)
    clients: int | None = field(default=None, kw_only=True)
    _sum: Running = field(init=False)

    def __post_init__(self) -> None:
        Round.__post_init__(self)
        self._sum = self._empty()

    @property
    @override
    def _rule(self) -> Rule:
        return self.rule

    @override
    def _take(self, client: int, answer: Array) -> None:
        self._sum.add(self.channel.weigh(answer, self.rule.layout(self.state.task).size))

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
        share = len(self._answered) / (self.clients or len(self.ranks))
        state = self.rule.decode(change, replace(self.state, moments=moments, share=share))
        return self._outcome(state, weight, statistics)

    def _empty(self) -> Running:
        return Running(self.size)

    def _mean(self) -> tuple[Tensors, float, Array]:
        layout = self.rule.layout(self.state.task)
        mean, weight, statistics = self.channel.down(self._sum.total, layout.size)
        return layout.unflatten(mean), weight, statistics


@dataclass(slots=True)
class ListRound(Round):
    """A round that keeps each client's encoding, for a ``ListRule``: memory grows with the cohort.

    An encoding is kept as it came, its zeros as a bit each, and a tensor of it is made when the rule asks for it. The
    rule gets the encodings in ascending order of clients, so the order of arrival changes nothing.
    """

    rule: ListRule = field(kw_only=True)
    _answers: dict[int, Sparse] = field(init=False, default_factory=dict)

    @property
    @override
    def _rule(self) -> Rule:
        return self.rule

    @override
    def _take(self, client: int, answer: Array) -> None:
        self._answers[client] = Sparse.of(answer)

    @override
    def _finish(self) -> None:
        self._is_over = True

    @override
    def result(self) -> Outcome:
        if not self._is_over:
            raise RuntimeError(f"the round is still open: {len(self._waiting)} clients have not answered")
        self._need_quorum()
        layout = self.rule.layout(self.state.task)
        each = [x for _, x in sorted(self._answers.items())]
        ends = [x.dense(layout.size).astype(np.float64) for x in each]
        places = layout.places
        encodings = [(_Encoding(places, x), float(end[0])) for x, end in zip(each, ends, strict=True)]
        statistics = np.sum([end[1:] for end in ends], axis=0)
        return self._outcome(self.rule.decode(encodings, self.state), sum(w for _, w in encodings), statistics)


@dataclass(frozen=True, slots=True, eq=False)
class _Encoding(Mapping[str, Array]):
    """The tensors of one answer in fp64, each made when it is asked for."""

    places: Mapping[str, tuple[int, Shape]]
    answer: Sparse

    def __getitem__(self, name: str) -> Array:
        start, shape = self.places[name]
        return self.answer.dense(start, start + prod(shape)).astype(np.float64).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
