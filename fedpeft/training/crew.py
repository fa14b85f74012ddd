"""Worker processes that train clients side by side, on one base model in shared memory."""

import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import override

from fedpeft.data import Federation
from fedpeft.rounds import Done, Failed, Job, Metrics, Trial
from fedpeft.training.environment import cores, starting
from fedpeft.training.settings import Training

if TYPE_CHECKING:
    from fedpeft.training.cohort import CohortTrainer

Kind: TypeAlias = Literal["train", "evaluate"]
Result: TypeAlias = Done | Metrics | Failed

_CORES = 4  # that a worker has use for: with fewer, two workers are no faster than one with more threads
_PATIENCE = 10.0  # seconds that a worker has to end by itself


def usual(wanted: int | None) -> int:
    """How many workers to have: as many as wanted, or else one for every four cores, and one at least."""
    return wanted if wanted is not None else max(1, cores() // _CORES)


@dataclass(slots=True, eq=False)
class _Worker:
    process: Any
    line: Connection
    knows: tuple[Federation, Training] | None = None


@dataclass(slots=True, eq=False, weakref_slot=True)
class Crew:
    """Processes that hold a trainer each, whose models are views of one piece of shared memory.

    They start when first needed, and end with this object. One that dies takes its jobs with it, each of which is
    ``Failed``, and another takes its place.
    """

    trainer: "CohortTrainer"
    size: int
    _workers: list[_Worker] = field(default_factory=list, init=False)
    _requests: int = field(default=0, init=False)

    def train(self, trainer: "CohortTrainer", jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        """What ``trainer`` gives for these jobs, in their order. It is ``self.trainer``, or made by its ``over``."""
        for x in self._spread("train", trainer, jobs, [_weight(trainer.federation, x.client) for x in jobs]):
            assert not isinstance(x, Metrics)
            yield x

    def evaluate(self, trainer: "CohortTrainer", trials: Sequence[Trial]) -> Iterator[Metrics | Failed]:
        """What ``trainer`` gives for these trials, in their order."""
        for x in self._spread("evaluate", trainer, trials, [1] * len(trials)):
            assert not isinstance(x, Done)
            yield x

    def close(self) -> None:
        """End the workers."""
        _end(self._workers)

    def _spread(
        self, kind: Kind, trainer: "CohortTrainer", items: Sequence[Job] | Sequence[Trial], weights: Sequence[int]
    ) -> Iterator[Result]:
        parts = shares(weights, self.size)
        self._muster(trainer)
        self._requests += 1
        results: dict[int, Result] = {}
        asked: dict[Connection, list[int]] = {}
        for worker, part in zip(self._workers, parts, strict=True):
            if part:
                worker.line.send((self._requests, kind, [items[i] for i in part]))
                asked[worker.line] = list(part)
        for number in range(len(items)):
            while number not in results:
                for line in wait(list(asked)):
                    assert isinstance(line, Connection)
                    results |= self._answer(line, asked[line], items)
                    if not asked[line]:
                        del asked[line]
            yield results.pop(number)

    def _answer(self, line: Connection, left: list[int], items: Sequence[Job] | Sequence[Trial]) -> dict[int, Result]:
        """The next result of a worker, which is off the list of what is left; of all that is left if it has died."""
        try:
            request, result = line.recv()
        except (EOFError, OSError) as error:
            for worker in self._workers:  # its line is closed before the process is seen to have ended
                if worker.line is line:
                    worker.process.join(_PATIENCE)
            why = f"its worker process ended ({type(error).__name__})"
            lost: dict[int, Result] = {i: Failed(f"client {items[i].client}: {why}") for i in left}
            left.clear()
            return lost
        # Else the answer to a request whose asker has gone.
        return {left.pop(0): result} if request == self._requests else {}

    def _muster(self, trainer: "CohortTrainer") -> None:
        """All workers, alive and with this trainer's clients and settings."""
        for worker in [x for x in self._workers if not x.process.is_alive()]:
            self._workers.remove(worker)
        while len(self._workers) < self.size:
            if not self._workers:
                share(self.trainer.bridge.model)
            self._workers.append(self._start())
        for worker in self._workers:
            known = worker.knows
            if known is None or known[0] is not trainer.federation or known[1] is not trainer.training:
                worker.knows = (trainer.federation, trainer.training)
                worker.line.send((0, "over", worker.knows))

    def _start(self) -> _Worker:
        here = torch.multiprocessing.get_context("spawn")
        mine, theirs = here.Pipe()
        lean = replace(self.trainer, crew=None, group=self.trainer.room(), _store=None, _stack=None)
        threads = max(1, cores() // self.size)
        process = here.Process(target=_work, args=(theirs, _Sent(lean), threads), daemon=True)
        process.start()
        theirs.close()
        if not self._workers:
            weakref.finalize(self, _end, self._workers)
        return _Worker(process, mine)


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """A trainer on its way to a worker, where what it is made of is imported in the context ``starting``."""

    trainer: "CohortTrainer"

    @override
    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return _received, (bytes(ForkingPickler.dumps(self.trainer)),)


def _received(content: bytes) -> Any:
    with starting():
        return pickle.loads(content)


def _weight(federation: Federation, client: int) -> int:
    """How much work a client's training is: its rows; nothing for one that is not here, which will be refused."""
    try:
        return len(federation.rows(client, "train"))
    except ValueError:
        return 0


def shares(weights: Sequence[int], size: int) -> list[list[int]]:
    """The indices of the weights in ``size`` parts of like sum: each goes, heaviest first, to the lightest part."""
    parts: list[list[int]] = [[] for _ in range(size)]
    sums = [0] * size
    for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        lightest = min(range(size), key=lambda p: (sums[p], p))
        parts[lightest].append(i)
        sums[lightest] += weights[i]
    return [sorted(part) for part in parts]


def share(model: nn.Module) -> None:
    """Move a model's tensors into shared memory, those of one type into one piece: a process may open few files."""
    found: dict[int, Tensor] = {x.data_ptr(): x for x in (*model.parameters(), *model.buffers()) if x.numel()}
    for kind in {x.dtype for x in found.values()}:
        some = [x for x in found.values() if x.dtype == kind]
        whole: Tensor = torch.cat([x.detach().flatten() for x in some])
        whole.share_memory_()  # type: ignore[no-untyped-call]  # torch's own
        for x, part in zip(some, torch.split(whole, [x.numel() for x in some]), strict=True):
            places = [y for y in (*model.parameters(), *model.buffers()) if y.data_ptr() == x.data_ptr()]
            for y in places:
                y.data = part.view(x.shape)


def _work(line: Connection, trainer: "CohortTrainer", threads: int) -> None:
    """A worker's life: answer each request with one result an item, until there are no more."""
    torch.set_num_threads(threads)
    own = trainer
    while True:
        try:
            request, what, given = line.recv()
            if what == "over":
                own = trainer.over(*given)
                continue
            for result in own.train_many(given) if what == "train" else own.evaluate_many(given):
                line.send((request, result))
        except (EOFError, OSError, KeyboardInterrupt):  # the one who asked has gone
            return


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.line.close()
    for worker in workers:
        worker.process.join(_PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
