"""What an aggregation rule is: an algorithm cut at the sum."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Self

import numpy as np

from fedpeft.adapters import Adapter, Layout, LowRank, Pool, Spec, Tensors, Update
from fedpeft.rules.objective import PLAIN, Objective


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What everyone knows of one pass of a round.

    pass_: 0 for the first sum of the round; shared: what the server broadcast since the round began.
    """

    spec: Spec
    round: int = 0
    pass_: int = 0
    shared: Tensors = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class ServerState:
    """All that the server keeps from round to round.

    tail: low-rank layers that every client runs beside the adapter and none trains; memory: the
    rule's own tensors (bases, moments); moments: the server optimiser's; share: how many of all clients are in the
    mean that ``decode`` is given, as a share.
    """

    task: Task
    adapter: Adapter
    tail: Mapping[str, LowRank] = field(default_factory=dict)
    memory: Tensors = field(default_factory=dict)
    moments: Tensors = field(default_factory=dict)
    share: float = 1.0

    @property
    def digest(self) -> str:
        """SHA-256 in hex of what the model runs: the adapter's own, or where there is a tail, that of both."""
        if not self.tail:
            return self.adapter.digest
        return sha256(f"{self.adapter.digest} {Adapter(self.tail).digest}".encode()).hexdigest()

    @property
    def is_finite(self) -> bool:
        """Whether no number that the model runs with is NaN or infinite, as one too large for its dtype becomes."""
        each = [*self.adapter.tensors().values(), *Adapter(self.tail).tensors().values()]
        return all(np.isfinite(x).all() for x in each)

    def next(self, adapter: Adapter) -> Self:
        """The state at the start of the next round, with this adapter."""
        return replace(self, task=Task(self.task.spec, self.task.round + 1), adapter=adapter)


@dataclass(frozen=True, slots=True, eq=False)
class Broadcast:
    """What one client receives for one pass."""

    task: Task
    adapter: Adapter
    tail: Mapping[str, LowRank]


class Rule(ABC):
    """The client's half of a rule, and what it sends."""

    @property
    def passes(self) -> int:
        """How many sums a round takes."""
        return 1

    @abstractmethod
    def layout(self, task: Task) -> Layout:
        """What one encoding holds: public, and the same for every client."""

    @abstractmethod
    def encode(self, update: Update, task: Task) -> Tensors:
        """What one client puts into the sum; zero for an update that changes nothing."""

    @property
    def tells_factors(self) -> bool:
        """Whether it takes a layer for ``scale · b @ a``: PEFT methods that compute otherwise can't be used with it."""
        return False

    @property
    def hides_ranks(self) -> bool:
        """Whether a client of any rank fills the same places of its encoding, so that no part of a sum is of few.

        Where it is false, those with the largest rank are alone in the directions that the others lack.
        """
        return False

    @property
    def fewest_rounds(self) -> int:
        """How many rounds a run needs to get beyond what the rule begins with."""
        return 1

    @property
    def needs_sgd(self) -> bool:
        """Whether clients must step along their gradients, so that an optimiser that rescales them can't be used."""
        return False

    @property
    def pool(self) -> Pool | None:
        """The directions that clients walk along by forward passes alone; None where they train by gradients."""
        return None

    def objective(self, task: Task, start: Adapter, own: Tensors) -> Objective:
        """What a client adds to its loss. start: the adapter that it trains; own: what it kept by this rule."""
        return PLAIN

    def begin(self, received: Adapter, own: Tensors) -> Adapter:
        """The adapter that a client works with, of the one it received. own: what it kept by this rule."""
        return received

    def keep(self, update: Update, task: Task, own: Tensors) -> Tensors:
        """What a client that did this keeps for the rounds to come, in place of what it had."""
        return {}

    def trains(self, task: Task) -> str:
        """The factors that clients train in this round: "a", "b" or "ab". Dense leaves are always trained.

        "core": of layers in core form (``adapters.bases``) the cores alone; "heads": and a scale of each core.
        """
        return "ab"

    def personal(self, spec: Spec) -> frozenset[str]:
        """Tensors (as ``Adapter.tensors`` names them) that each client trains, keeps and never sends."""
        return frozenset()

    def constant(self, spec: Spec) -> frozenset[str]:
        """Tensors that no round of this rule ever changes, so that they travel once."""
        return frozenset()

    def send(self, state: ServerState, rank: int) -> Broadcast:
        """What a client of this rank receives: by default its first directions, and no trace of the rest."""
        return Broadcast(state.task, state.adapter.cut(rank), state.tail)

    def is_for(self, sent: Broadcast, rank: int) -> bool:
        """Whether a client that is sent this trains as many directions as one of this rank, no more and no fewer."""
        whole = {x.name: x.rank for x in sent.task.spec.layers}
        return all(x.rank == min(rank, whole[name]) for name, x in sent.adapter.layers.items())

    def is_nested(self, ranks: Collection[int], spec: Spec) -> bool:
        """Whether clients of these ranks add to everything that those of lower ones add to, whatever they have learnt.

        Where they do not, nobody can count the contributors to a part of a sum from ranks: it may be of one client.
        """
        return True


class MeanRule(Rule):
    """A rule whose server needs only the weighted mean of what clients encode.

    So it runs in the clear, under secure aggregation, with central noise, and with a tree of
    servers that each keep one running sum.
    """

    @property
    def is_change(self) -> bool:
        """Whether the mean is a change of the adapter's tensors, which always stand for the same.

        A server optimiser may then scale it, and changes of several rounds may be added up.
        """
        return False

    def between(self, mean: Tensors, state: ServerState) -> Tensors:
        """What the server broadcasts after a pass that is not the round's last."""
        raise ValueError(f"{type(self).__name__} has one pass; nothing comes between")

    @abstractmethod
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        """The state after a round whose last pass has this weighted mean."""


class ListRule(Rule):
    """A rule whose server needs each client's encoding by itself: it can't be run on a sum."""

    @abstractmethod
    def decode(self, encodings: Sequence[tuple[Tensors, float]], state: ServerState) -> ServerState:
        """The state after a round with these encodings and their weights."""
