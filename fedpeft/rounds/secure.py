"""A round of which the server sees nothing but sums, as a state machine without I/O.

Driven like a round in the clear, phase by phase of a secure aggregation protocol: ``outbox`` to the clients, each
answer to ``receive``, ``close`` when ``is_settled`` or when time is up; at the end ``result``. What a phase is for is
the protocol's business; the round knows when a pass has been summed, and what to send for the next one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from fedpeft.adapters import Array, Tensors, Update
from fedpeft.channel import Grid, RingChannel, Seen
from fedpeft.errors import ProtocolError
from fedpeft.rounds.answer import STATISTICS, measured, need_finite
from fedpeft.rounds.exactness import compared, of_client
from fedpeft.rounds.metrics import Metrics
from fedpeft.rounds.plain import Outcome
from fedpeft.rules import Averaging, Broadcast, MeanRule, Rule, ServerOptimiser, ServerState, Task
from fedpeft.secagg.encoding import digest, lp
from fedpeft.secagg.protocol import Phase, Ring, ServerSide


def grids(
    rule: Rule,
    channel: RingChannel,
    task: Task,
    cohort: int,
    largest_weight: float,
    exactness: bool = False,
    halvings: tuple[tuple[int, ...], ...] = (),
) -> tuple[Grid, ...]:
    """The grid of each pass of a round, which client and server work out for themselves.

    halvings: of the channel's range, for each tensor of each pass; the whole range for all where there are none.
    ValueError where a sum could wrap, and for halvings that are not those of the rule's tensors.
    """
    sizes = _sizes(rule, task, exactness)
    if len(halvings) not in (0, len(sizes)):
        raise ValueError(f"halvings: got those of {len(halvings)} passes; want {len(sizes)}, or none")
    each = zip(sizes, halvings or ((),) * len(sizes), strict=True)
    return tuple(
        channel.over(cohort, sum(leaves), sketches, largest_weight, leaves, finer) for (leaves, sketches), finer in each
    )


def _sizes(rule: Rule, task: Task, exactness: bool) -> list[tuple[tuple[int, ...], int]]:
    """How many numbers each tensor of an encoding has, and its sketches, in each pass."""
    tasks = [replace(task, pass_=pass_) for pass_ in range(rule.passes)]
    return [
        (tuple(prod(shape) for _, shape in rule.layout(x).shapes), measured(rule, x, exactness).size) for x in tasks
    ]


def contribute_ring(
    rule: Rule,
    grid: Grid,
    update: Update,
    weight: float,
    metrics: Metrics,
    task: Task,
    exactness: bool,
    rng: np.random.Generator,
) -> Ring:
    """One client's vector for one pass, before it's masked: shape (grid.length,).

    rng: fresh, never the one that training draws from. ValueError for what has no place on the grid, such as NaN.
    """
    x = rule.layout(task).flatten(rule.encode(update, task))
    sketches = of_client(update, 1.0, measured(rule, task, exactness))
    return grid.up(x, weight, metrics.vector(), sketches, rng)


def shared_digest(task: Task) -> bytes:
    """SHA-256 of what was broadcast for a pass: names, dtypes, shapes and bytes, in any order; nothing for nothing."""
    if not task.shared:
        return b""
    each = [
        lp(name.encode(), x.dtype.str.encode(), repr(x.shape).encode(), x.tobytes())
        for name, x in sorted(task.shared.items())
    ]
    return digest("shared", *each)


@dataclass(slots=True, eq=False)
class SecureRound:
    """A round over a session of secure aggregation; it holds one sum and no client's vector.

    ranks: the chosen clients and the rank of each; ids: what the protocol calls each; quorum: the fewest survivors that
    make a result, beside what the protocol asks for; grid: of each pass; clients: how many there are in all, if not
    given, those who were asked; exactness: whether vectors hold sketches. refused: who, and why, as in other rounds.
    """

    state: ServerState
    ranks: Mapping[int, int]
    ids: Mapping[int, bytes]
    quorum: int
    grid: tuple[Grid, ...]
    session: ServerSide
    refused: list[tuple[int, str]] = field(default_factory=list)
    rule: MeanRule = field(kw_only=True)
    optimiser: ServerOptimiser = field(default_factory=Averaging, kw_only=True)
    clients: int | None = field(default=None, kw_only=True)
    exactness: bool = field(default=False, kw_only=True)
    saturated: int = field(init=False, default=0)
    """How many numbers of all clients and passes were cut at the channel's range."""
    seen: list[Seen] = field(init=False, default_factory=list[Seen], repr=False)
    """Of each pass that is summed, what its sum says of how fine its grid may be."""
    _numbers: dict[bytes, int] = field(init=False)
    _answered: set[int] = field(init=False, default_factory=set[int])
    _mean: tuple[Array, float, Array] | None = field(init=False, default=None, repr=False)
    _failure: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if self.quorum < 1:
            raise ValueError(f"quorum: got {self.quorum}; want at least 1, for no answer has no mean")
        self._numbers = {id_: client for client, id_ in self.ids.items()}
        if self.ids.keys() != self.ranks.keys() or len(self._numbers) < len(self.ids):
            raise ValueError(
                f"ids: got {len(self._numbers)} for {len(self.ranks)} clients; want one for each, no two the same"
            )
        want = [(sum(leaves), n) for leaves, n in _sizes(self.rule, self.state.task, self.exactness)]
        if (got := [(x.size, x.sketches) for x in self.grid]) != want:
            raise ValueError(f"grid: got sizes {got}; want those of the rule's passes, {want}")

    @property
    def phase(self) -> Phase:
        """What the session is doing. RuntimeError once it is over."""
        return self.session.phase

    @property
    def waiting(self) -> frozenset[int]:
        """Clients that were asked in this phase and have neither answered nor been refused."""
        return frozenset() if self.is_over else frozenset(self._numbers[id_] for id_ in self.session.waiting)

    @property
    def is_settled(self) -> bool:
        """Whether this phase has nothing more to wait for."""
        return not self.waiting

    @property
    def is_over(self) -> bool:
        """Whether all passes are summed, or the session has failed."""
        return bool(self._failure) or self.session.is_over

    @property
    def culprits(self) -> dict[int, str]:
        """Clients that were found to cheat, or were named by others, and for what."""
        return {self._numbers[id_]: why for id_, why in self.session.culprits.items() if id_ in self._numbers}

    def outbox(self) -> dict[int, tuple[bytes, Broadcast | None]]:
        """The message of this phase for each client that is waited for, ascending, and the model or the pass where
        the phase carries it; those of one rank share it."""
        waiting = sorted(self.waiting)
        if not waiting:
            return {}
        messages = self.session.outbox()
        sent = {} if self.phase.carries == "nothing" else self._broadcasts()
        return {client: (messages[self.ids[client]], sent.get(self.ranks[client])) for client in waiting}

    def receive(self, client: int, message: bytes) -> None:
        """Give one client's answer to the session, which keeps nothing but sums of it.

        A ProtocolError is also counted in ``refused``; of strangers and repeats the session does not hear.
        """
        try:
            if client in self._answered:
                raise ProtocolError("answered twice: the first answer counts")
            if client not in self.waiting:
                raise ProtocolError("was not asked, or is no longer waited for")
            self.session.receive(self.ids[client], message)
        except ProtocolError as error:
            self.refused.append((client, str(error)))
            raise
        self._answered.add(client)

    def refuse(self, client: int, reason: str) -> None:
        """Go on without this client, unless it has answered in this phase."""
        if client in self.waiting:
            self.session.drop(self.ids[client])
        self.refused.append((client, reason))

    def close(self) -> None:
        """No more answers in this phase: who has not answered has dropped out."""
        if self.is_over:
            raise RuntimeError("the round is over: nothing to close")
        self.refused.extend(
            (client, f"no answer before the deadline ({self.phase.name})") for client in sorted(self.waiting)
        )
        self._answered.clear()
        try:
            self.session.close()
            self._settle()
        except ProtocolError as error:
            self._failure = str(error)

    def to_helper(self) -> bytes | None:
        """What a second server has to be told before the round can go on; None where there is nothing."""
        return None if self._failure else self.session.to_helper()

    def from_helper(self, answer: bytes) -> None:
        """What the second server answered. ProtocolError, which ends the round, for what can't be taken."""
        try:
            self.session.from_helper(answer)
            self._settle()
        except ProtocolError as error:
            self._failure = str(error)
            raise

    def fail(self, reason: str) -> None:
        """End the round without a sum, for a reason that ``result`` repeats: the second server can't be reached."""
        self._failure = self._failure or reason or "the round was ended"

    def result(self) -> Outcome:
        """The outcome. ProtocolError if too few stayed to the end, or it is not finite; RuntimeError while open."""
        if not self.is_over:
            raise RuntimeError(f"the round is still open: {len(self.waiting)} clients have not answered")
        if self._failure or self._mean is None:
            raise ProtocolError(self._failure or "the session ended without a sum")
        vector, weight, statistics = self._mean
        mean = self.rule.layout(self.state.task).unflatten(vector)
        change, moments = self.optimiser.step(mean, self.state.moments)
        survivors = tuple(sorted(self._numbers[id_] for id_ in self.session.survivors))
        share = len(survivors) / (self.clients or len(self.ranks))
        state = self.rule.decode(change, replace(self.state, moments=moments, share=share))
        need_finite(state)
        layout = measured(self.rule, self.state.task, self.exactness)
        found = compared(statistics[STATISTICS:], weight, layout, self.state, state)
        metrics = Metrics.of(statistics[:STATISTICS])
        return Outcome(state, metrics, weight, survivors, tuple(self.refused), exactness=found)

    def _settle(self) -> None:
        """Take the sum of a pass that is over, and begin the next one."""
        task = self.state.task
        if self.session.to_helper() is not None:
            return
        if not self.session.is_over and self.session.phase.pass_ == task.pass_:
            return
        total, grid = self.session.total, self.grid[task.pass_]
        if total is None:
            raise ProtocolError("the session ended without a sum")
        if len(self.session.survivors) < self.quorum:
            raise ProtocolError(f"too few answers: got {len(self.session.survivors)}; want at least {self.quorum}")
        mean = grid.down(total)
        cut = grid.saturated(total)
        self.saturated += cut
        self.seen.append(Seen.of(grid, mean[0], mean[1], len(self.session.survivors), cut))
        if task.pass_ + 1 == self.rule.passes:
            self._mean = mean
            return
        between: Tensors = self.rule.between(self.rule.layout(task).unflatten(mean[0]), self.state)
        shared = dict(task.shared) | dict(between)
        self.state = replace(self.state, task=replace(task, pass_=task.pass_ + 1, shared=shared))
        told = {shared_digest(x.task) for x in self._broadcasts().values()}
        if len(told) > 1:
            raise ValueError(
                f"{type(self.rule).__name__} tells clients of different ranks different things in pass "
                f"{task.pass_ + 1}: want one thing for all, or their masks don't cancel"
            )
        if told:  # or nobody is left, and the session will say so
            self.session.begin(told.pop())

    def _broadcasts(self) -> dict[int, Broadcast]:
        """What those who are waited for should receive, by rank."""
        return {rank: self.rule.send(self.state, rank) for rank in {self.ranks[client] for client in self.waiting}}
