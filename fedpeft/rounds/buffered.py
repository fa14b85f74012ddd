"""Buffered asynchronous aggregation, as a state machine without I/O.

So many clients are always at work, each on the adapter that was newest when it was asked. The server adds up the
answers as they come, and takes a step when it has enough of them: no client waits for another.
Source: Nguyen et al., arXiv:2106.06639 (FedBuff), algorithm 1.
An encoding is a change, so one from an older adapter still means something; it counts less the older it is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedpeft.adapters import Array, Layout
from fedpeft.channel import PlainChannel, Running
from fedpeft.errors import ProtocolError
from fedpeft.rounds.answer import STATISTICS, answer_size, inspect, measured, need_finite
from fedpeft.rounds.exactness import compared
from fedpeft.rounds.metrics import Metrics
from fedpeft.rounds.plain import Outcome
from fedpeft.rounds.ranks import WHOLE
from fedpeft.rounds.seeds import derive
from fedpeft.rounds.selection import draw
from fedpeft.rules import Averaging, Broadcast, MeanRule, ServerOptimiser, ServerState, Task


def _whole(client: int, round: int) -> int:
    return WHOLE


@dataclass(frozen=True, slots=True)
class Synchronous:
    """Rounds one after another: each begins when the one before it is over."""


@dataclass(frozen=True, slots=True)
class Buffered:
    """A step after every ``buffer`` answers, with ``concurrency`` clients always at work.

    exponent: an answer that is τ steps old counts (1 + τ)^-exponent: 0.5 is FedBuff's, 0 makes no difference between
    old and new (Xie et al., arXiv:1903.03934, section 5.2, has this family); max_staleness: the most
    steps that may be taken before a client's answer is no longer waited for; normalised: divide the sum of answers
    by what they count, so that a buffer of old ones makes as large a step as one of new ones; FedBuff divides by
    what they would count if they were new.
    """

    buffer: int = 10
    concurrency: int = 30
    exponent: float = 0.5
    max_staleness: int = 10
    normalised: bool = False

    def __post_init__(self) -> None:
        for key, good, want in (
            ("buffer", self.buffer >= 1, "at least 1 answer"),
            ("concurrency", self.concurrency >= 1, "at least 1 client"),
            ("exponent", 0 <= self.exponent <= 10, "0 to 10"),
            ("max_staleness", self.max_staleness >= 0, "0 steps or more"),
        ):
            if not good:
                raise ValueError(f"{key}: got {getattr(self, key)}; want {want}")

    def factor(self, staleness: int) -> float:
        """What an answer counts after so many steps: 1 at once, and less and less."""
        return float((1.0 + staleness) ** -self.exponent)


@dataclass(slots=True)
class Buffer:
    """The server's side: who is at work on which round's adapter, and the sum of what has come in since the last step.

    Whoever drives it asks the clients that ``choose`` names, carries ``ask``'s broadcasts to them, gives their answers
    to ``receive`` and calls ``step`` when ``is_full``. Memory does not grow with the clients: it holds one sum.
    rank: of all clients; largest_weight: the most that one client may claim; exactness: whether clients send
    sketches of their changes, and outcomes have the error.
    """

    state: ServerState
    rule: MeanRule
    terms: Buffered
    optimiser: ServerOptimiser = field(default_factory=Averaging)
    channel: PlainChannel = field(default_factory=PlainChannel)
    largest_weight: float = float("inf")
    rank: Callable[[int, int], int] = _whole
    refused: list[tuple[int, str]] = field(default_factory=list)
    draws: int = 0
    exactness: bool = field(default=False, kw_only=True)
    _at_work: dict[int, int] = field(default_factory=dict, init=False)
    _asked: set[int] = field(default_factory=set, init=False)
    _answered: list[tuple[int, int]] = field(default_factory=list, init=False)
    _sum: Running = field(init=False)

    def __post_init__(self) -> None:
        if self.rule.passes != 1:
            raise ValueError(f"rule: {type(self.rule).__name__} takes {self.rule.passes} sums a round; want 1")
        if not self.rule.is_change:
            raise ValueError(
                f"rule: {type(self.rule).__name__}'s mean is no change that others may be added to; want one"
            )
        spec = self.state.task.spec
        layouts = [self.rule.layout(Task(spec, r)) for r in range(4)]
        if any(x != layouts[0] for x in layouts):
            raise ValueError(
                f"rule: {type(self.rule).__name__} sums other tensors in other rounds; want always the same"
            )
        self._sum = self._empty()

    @property
    def layout(self) -> Layout:
        """What an answer begins with."""
        return self.rule.layout(self.state.task)

    @property
    def size(self) -> int:
        """How many numbers an answer has."""
        return self._sum.size

    @property
    def at_work(self) -> Mapping[int, int]:
        """The clients that are waited for, in the order asked, and the round whose adapter each has."""
        return dict(self._at_work)

    @property
    def answers(self) -> int:
        """How many answers are in the sum."""
        return len(self._answered)

    @property
    def is_full(self) -> bool:
        """Whether there are answers enough for a step."""
        return len(self._answered) >= self.terms.buffer

    @property
    def has_room(self) -> bool:
        """Whether another client may be asked."""
        return len(self._at_work) < self.terms.concurrency

    def choose(self, clients: Sequence[int], seed: int) -> tuple[int, ...]:
        """Who is to be asked now, ascending: drawn from the seed, as many as there is room for.

        None of them is at work, and none has already been asked with this adapter: it would compute the same again.
        """
        room = self.terms.concurrency - len(self._at_work)
        drawn = derive(seed, "select", self.state.task.round, self.draws)
        self.draws += 1
        return draw(clients, room, drawn, self._asked | set(self._at_work))

    def ask(self, client: int) -> Broadcast:
        """What this client, which is at work from now on, should receive."""
        if client in self._at_work:
            raise ValueError(f"client {client} is at work already; want one that is not")
        self._at_work[client] = self.state.task.round
        self._asked.add(client)
        return self.rule.send(self.state, self.rank(client, self.state.task.round))

    def receive(self, client: int, answer: Array, round: int, pass_: int) -> None:
        """Add one client's answer, with the weight that its age leaves it.

        A ProtocolError is also counted in ``refused``, and leaves the sum as it was.
        """
        try:
            if client not in self._at_work:
                raise ProtocolError("was not asked, or is no longer waited for")
            if (round, pass_) != (self._at_work[client], 0):
                raise ProtocolError(
                    f"the answer is for round {round}, pass {pass_}; want round {self._at_work[client]}, pass 0"
                )
            size = self.rule.layout(self.state.task).size
            inspect(answer, size, self.channel, self.largest_weight, self._sum.size - size - 1 - STATISTICS)
        except ProtocolError as error:
            self.refuse(client, str(error))
            raise
        term = self.channel.weigh(answer, size)
        factor = self.terms.factor(self.state.task.round - round)
        term[:size] *= factor
        term[size + 1 + STATISTICS :] *= factor
        if self.terms.normalised:
            term[size] *= factor
        self._sum.add(term)
        del self._at_work[client]
        self._answered.append((client, self.state.task.round - round))

    def refuse(self, client: int, reason: str) -> None:
        """Go on without what this client is at work on."""
        self._at_work.pop(client, None)
        self.refused.append((client, reason))

    def step(self) -> Outcome:
        """The outcome of the answers so far; those at work go on, but for those that are now too old to count.

        Raises ProtocolError if there are too few: the next step begins without them.
        """
        answered, total = sorted(self._answered), self._sum.total
        before, is_full = self.state, self.is_full
        self._sum, self._answered, self._asked = self._empty(), [], set()
        layout = self.rule.layout(before.task)
        if is_full:
            mean, weight, statistics = self.channel.down(total, layout.size)
            change, moments = self.optimiser.step(layout.unflatten(mean), before.moments)
            after = self.rule.decode(change, replace(before, moments=moments))
            self.state = after if after.is_finite else before.next(before.adapter)
        else:
            self.state = before.next(before.adapter)
        for client, round in list(self._at_work.items()):
            age = self.state.task.round - round
            if age > self.terms.max_staleness:
                self.refuse(client, f"no answer within {self.terms.max_staleness} steps (schedule.max_staleness)")
        if is_full:
            need_finite(after)
        else:
            raise ProtocolError(f"too few answers: got {len(answered)}; want {self.terms.buffer}")
        survivors, staleness = tuple(c for c, _ in answered), tuple(age for _, age in answered)
        metrics, sketches = Metrics.of(statistics[:STATISTICS]), statistics[STATISTICS:]
        found = compared(sketches, weight, measured(self.rule, before.task, self.exactness), before, self.state)
        return Outcome(self.state, metrics, weight, survivors, self.take_refused(), staleness, found)

    def take_refused(self) -> tuple[tuple[int, str], ...]:
        """Who was refused and why since this was last asked; a step that succeeds takes them into its outcome."""
        refused, self.refused = tuple(self.refused), []
        return refused

    def restore(self, at_work: Iterable[tuple[int, int]], draws: int) -> None:
        """Go on as one that had these clients at work, each on the adapter of a round, right after a step."""
        self._at_work, self.draws = dict(at_work), draws

    def _empty(self) -> Running:
        return Running(answer_size(self.rule, self.state.task, self.exactness))
