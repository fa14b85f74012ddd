"""What trains: the interface that torch, the cohort engine and onnxruntime implement."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedpeft.adapters import Adapter, Array, LowRank, Pool, Tensors
from fedpeft.rounds.metrics import Metrics
from fedpeft.rules import PLAIN, Objective


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One client's training in one round.

    client: whose data; seed: of this client in this round; start: the adapter to train from, personal
    parts already in place; trains: the factors to train ("a", "b", "ab"; dense leaves always), or, of layers in core
    form, "core" or "heads", as ``Rule.trains`` says them;
    tail: low-rank layers to run beside it, frozen; kept: what the trainer left last time; objective: what is added
    to the loss, and no trainer may leave out; pool: directions to walk along by forward passes alone
    (``training.forward_only``), None to train by gradients.
    """

    client: int
    round: int
    seed: int
    start: Adapter
    trains: str = "ab"
    tail: Mapping[str, LowRank] = field(default_factory=dict)
    kept: Tensors = field(default_factory=dict)
    objective: Objective = PLAIN
    pool: Pool | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Done:
    """A job that went well: the trained adapter (same spec as the start), its metrics, what to keep.

    travel, moves: as in ``Update``, by the steps that were taken: 0 if they were not along gradients, and None unless
    they were along the job's pool.
    """

    trained: Adapter
    metrics: Metrics
    kept: Tensors = field(default_factory=dict)
    travel: float = 0.0
    moves: Array | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """A job that could not be done; the others go on."""

    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """One evaluation: of this adapter, on this client's ``split``, or on the central test set for client None.

    split: "train", "validation" or "test".
    """

    client: int | None
    split: str
    adapter: Adapter
    tail: Mapping[str, LowRank] = field(default_factory=dict)


class Trainer(Protocol):
    """Trains and evaluates on this process's clients. Results come in the order of the jobs, one by one."""

    @property
    def base(self) -> str:
        """The fingerprint of the frozen base model and the adapter's shape: two sides must have the same."""
        ...

    def start(self) -> Adapter:
        """The adapter before any training: the same for every process with the same settings and seed."""
        ...

    def train_many(self, jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        """Train each job on its client's data."""
        ...

    def evaluate_many(self, trials: Sequence[Trial]) -> Iterator[Metrics | Failed]:
        """Evaluate each trial; no training state changes."""
        ...
