"""Many clients at once on one base model: the frozen layers run once over everyone's rows."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Self

from typing_extensions import override

from fedpeft.adapters import CORES, bases, drawn
from fedpeft.rounds import Done, Failed, Job, Metrics, Trial
from fedpeft.training.agreement import disagreement
from fedpeft.training.crew import Crew
from fedpeft.training.environment import memory
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.memory import estimate
from fedpeft.training.passes import need_rows, reason
from fedpeft.training.pool import Member, Pool
from fedpeft.training.stack import Stack

_TOKENS = 4096  # in one pass: more than this makes no token cheaper on a processor
_SHARE = 0.5  # of the machine's memory, for one pass
_FAMILIES = ("bert", "llama", "vit", "dinov2")
"""Models that keep a batch's rows first and in order everywhere, so that plain adapters on them need no trial."""


@dataclass(slots=True, eq=False)
class CohortTrainer(TorchTrainer):
    """A ``rounds.Trainer`` that trains many clients in one step; it gives what ``TorchTrainer`` does, to rounding.

    group: the most clients in a step (unset: ``room``); crew: processes among which the jobs are shared out. A job by
    itself is done by the loop, and so are walks along a pool's directions. With dropout in the adapter method or the
    base, what is drawn depends on who shares a step, so that results equal the loop's in distribution alone.
    """

    group: int | None = None
    crew: Crew | None = None
    _stack: Stack | None = None
    _refusal: str | None = None

    def sized(self, group: int | None, workers: int) -> Self:
        """This trainer with so many clients in a step, and so many processes."""
        sized = replace(self, group=group)
        sized.crew = Crew(sized, workers) if workers > 1 else None
        return sized

    @property
    def stack(self) -> Stack:
        """The model, ready to run many clients at once."""
        if self._stack is None:
            self._stack = Stack.on(self.bridge)
        return self._stack

    @property
    @override
    def together(self) -> int:
        return 1 if self.refusal else self.room()

    @property
    @override
    def refusal(self) -> str:
        if self._refusal is None:
            is_known = self.stack.is_plain and self.frozen.model.config.model_type in _FAMILIES
            self._refusal = "" if is_known else disagreement(self, self.stack)
        return self._refusal

    @override
    def train_many(self, jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        """Train all jobs, as many at once as fit; results come in the order of the jobs."""
        if self.crew is not None and len(jobs) > 1:
            yield from self.crew.train(self, jobs)
            return
        for _, some in groupby(jobs, key=_kind):
            run = list(some)
            alone = len(run) == 1 or run[0].pool is not None or self.together == 1
            yield from TorchTrainer.train_many(self, run) if alone else self._together(run)

    @override
    def evaluate_many(self, trials: Sequence[Trial]) -> Iterator[Metrics | Failed]:
        """Evaluate each trial; consecutive trials of one adapter share passes."""
        if self.crew is not None and len(trials) > 1:
            return self.crew.evaluate(self, trials)
        return TorchTrainer.evaluate_many(self, trials)

    def room(self) -> int:
        """How many clients a step takes: as many as half of the machine's memory holds, and no more than pay."""
        if self.group is not None:
            return self.group
        training, base = self.training, self.frozen
        limit = _SHARE * memory()["total"] / (self.crew.size if self.crew else 1)
        most = max(1, _TOKENS // (training.rows * self._length))

        def takes(clients: int) -> int:
            whole = replace(training, batch=training.rows * clients, micro=None)
            return estimate(base.model.config, base.parameters, self.bridge.spec, whole, base.quantise)

        return next((n for n in range(most, 1, -1) if takes(n) <= limit), 1)

    @property
    def _length(self) -> int:
        if self.frozen.pixels is None:
            return self.training.length
        return ((self.training.image_size or self.frozen.pixels.size) // self.frozen.pixels.patch) ** 2 + 1

    def _together(self, jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        """Results of jobs of one kind, in their order."""
        results: dict[int, Done | Failed] = {}
        good: dict[int, Job] = {}
        for number, job in enumerate(jobs):
            try:
                need_rows(self.rows(job.client, "train"))
                self.bridge.padded(job.start)
                good[number] = job
            except Exception as error:
                results[number] = Failed(reason(job.client, error))
        going = self._attempt(good, self.room())
        for number in range(len(jobs)):
            while number not in results:
                done, result = next(going)
                results[done] = result
            yield results.pop(number)

    def _attempt(self, jobs: Mapping[int, Job], group: int) -> Iterator[tuple[int, Done | Failed]]:
        """Results by number, as they come. What breaks a whole pass, such as too little memory, is tried with half the
        clients in a pass, and at last one after another."""
        if group < 2:
            yield from zip(jobs, TorchTrainer.train_many(self, list(jobs.values())), strict=True)
            return
        left = dict(jobs)
        members = [
            Member.of(job, self.rows(job.client, "train"), self.training, number) for number, job in jobs.items()
        ]
        try:
            pool = Pool(self.stack, self.frozen, self.training, self.place, group)
            for number, result in pool.train(members):
                del left[number]
                yield number, result
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            warnings.warn(f"{group} clients could not train in one step ({why}): trying half", RuntimeWarning, 2)
            yield from self._attempt(left, group // 2)


def _kind(job: Job) -> tuple[object, ...]:
    """Jobs of one kind can share a pass, but for walks: they train the same factors of one method."""
    drawn_once = tuple((n, id(x)) for n, x in drawn(job.start).items())
    return job.pool, job.trains, drawn_once, tuple(bases(job.start)) if job.trains in CORES else ()
