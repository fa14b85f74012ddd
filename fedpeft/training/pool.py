"""A pool of clients that train together, a pass at a time, each with steps, moments and rows of its own."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import ceil, isfinite

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.data import Encoded, Rows
from fedpeft.rounds import Done, Failed, Job, Metrics
from fedpeft.training.bases import Base
from fedpeft.training.batches import Batch, collate
from fedpeft.training.cores import CoreRows
from fedpeft.training.devices import Place
from fedpeft.training.members import Members
from fedpeft.training.objectives import outcome, predictions, scored
from fedpeft.training.passes import diverged, groups, travel
from fedpeft.training.settings import Training
from fedpeft.training.stack import Stack
from fedpeft.training.steps import in_training
from fedpeft.training.turns import Turn, choose


@dataclass(slots=True, eq=False)
class Member:
    """A client in the pool.

    left: passes that it still needs; number: of its job in the list; row: where its state is; batches: what is left
    of its optimiser step, the next one first; units: predictions in that step; step: its number, from 1.
    """

    job: Job
    rows: Encoded
    plan: Iterator[Sequence[Rows]]
    left: int
    number: int
    row: int = 0
    batches: list[Rows] = field(default_factory=list)
    units: int = 0
    step: int = 0
    metrics: Metrics = field(default_factory=Metrics)

    @classmethod
    def of(cls, job: Job, rows: Encoded, training: Training, number: int) -> "Member":
        """The client of a job with these rows, of which there is one at least."""
        passes = ceil(len(rows) / training.batch)
        left = training.epochs * passes
        if training.steps is not None:
            epochs, steps = divmod(training.steps, ceil(passes / training.accumulate))
            left = epochs * passes + min(steps * training.accumulate, passes)
        left *= ceil(training.batch / training.rows)  # at most: what is left only says who goes first
        plan = groups(rows, training, np.random.default_rng(job.seed))
        return cls(job, rows, plan, left, number, metrics=Metrics(examples=len(rows)))

    def open(self, is_dialogue: bool) -> bool:
        """Have the next batch ready; False where there is none."""
        if not self.batches:
            self.batches = list(next(self.plan, ()))
            self.units = sum(_units(self.rows, x, is_dialogue) for x in self.batches)
            self.step += 1
        return bool(self.batches)

    @property
    def turn(self) -> Turn:
        """What it would bring to the next pass."""
        index = self.rows.index[self.batches[0]]
        return Turn(int(self.rows.store.lengths(index).max()), len(index), self.left)


def _units(rows: Encoded, index: Rows, is_dialogue: bool) -> int:
    """How many predictions these rows ask for: labels, or the target tokens of replies."""
    if not is_dialogue:
        return len(index)
    return int((rows.lengths[index] - np.maximum(rows.targets[index], 1)).sum())


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Clients on one stacked model. group: the most that go into one pass."""

    stack: Stack
    base: Base
    training: Training
    place: Place
    group: int

    def train(self, members: Sequence[Member]) -> Iterator[tuple[int, Done | Failed]]:
        """Train all, and give each one's number and result as it is done; one that fails stops nobody else.

        All jobs must train the same factors. At any time twice
        ``group`` of them have their state in memory.
        """
        if not members:
            return
        first, window = members[0].job, min(len(members), 2 * self.group)
        rows = CoreRows.of(self.stack.bridge, [m.job for m in members], window, self.place.device)
        state = Members.room(self.stack, self.training, self.place, first.trains, window, rows)
        state.tails = Members.tails_of([m.job for m in members], window, self.place)
        free, queue = deque(range(window)), deque(members)
        inside: list[Member] = []
        draws = np.random.default_rng(first.seed)
        while inside or queue:
            ended: list[tuple[Member, Done | Failed]] = []
            # Around the passes, and not around what is done with the results:
            with self._around(first, tuple(state.tails), int(draws.integers(2**63))):
                while not ended:
                    while free and queue:
                        member = queue.popleft()
                        member.row = free.popleft()
                        state.begin(member.row, member.job)
                        inside.append(member)
                    ended = self._turn(state, inside)
            gone = [member for member, _ in ended]
            free.extend(m.row for m in gone)
            inside = [m for m in inside if m not in gone]
            yield from ((member.number, result) for member, result in ended)

    @contextmanager
    def _around(self, first: Job, tails: Sequence[str], seed: int) -> Iterator[None]:
        """The context of passes: of the model, nothing but its fixed tensors outlasts it."""
        self.stack.bridge.write_fixed(first.start)
        if self.base.lower is not None:
            self.base.lower.need_above(tails)
        with ExitStack() as around:
            around.enter_context(self.place.seeded(seed))
            around.enter_context(in_training(self.stack.bridge.model))
            around.enter_context(self.base.recomputing(self.training.checkpointing))
            around.enter_context(self.stack.running(tails))
            yield

    def _turn(self, state: Members, inside: Sequence[Member]) -> list[tuple[Member, Done | Failed]]:
        """A pass of some of those inside, and the results of those that have none left or fail in it."""
        going = [m for m in inside if m.open(self.base.task == "lm")]
        failed = self._pass(state, going) if going else {}
        return [
            (m, Failed(f"client {m.job.client}: {failed[m.number]}"))
            if m.number in failed
            else (m, Done(state.adapter(m.row, m.job.start), m.metrics, travel=travel(self.training, len(m.rows))))
            for m in inside
            if m.number in failed or m not in going
        ]

    def _pass(self, state: Members, going: Sequence[Member]) -> dict[int, str]:
        """One pass of those whose turn it is; the numbers of those that fail, and why."""
        chosen = [going[i] for i in choose([m.turn for m in going], self.group)]
        batch, owner, width = self._batch(chosen)
        rows = torch.tensor([m.row for m in chosen], device=self.place.device)
        trained = state.put(rows, width)
        with self.place.arithmetic(), self.base.fed(batch.inputs):
            losses, are_hits, owner = self._outcome(batch, owner)
        sums = losses.new_zeros(len(chosen)).index_add(0, owner, losses)
        hits = owner[are_hits]
        right, counts = (torch.bincount(x, minlength=len(chosen)).tolist() for x in (hits, owner))
        totals = sums.tolist()
        del losses
        (sums / sums.new_tensor([m.units for m in chosen])).sum().backward()  # type: ignore[no-untyped-call]  # torch's own
        assert trained.grad is not None
        state.gather(rows, trained.grad)
        failed = {m.number: diverged(x, m.step) for m, x in zip(chosen, totals, strict=True) if not isfinite(x)}
        for member, loss, units, correct in zip(chosen, totals, counts, right, strict=True):
            member.metrics += Metrics(loss, units, correct)
            member.batches.pop(0)
            member.left -= 1
        state.step([m.row for m in chosen if not m.batches and m.number not in failed])
        return failed

    def _outcome(self, batch: Batch, owner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each prediction's loss, whether it is right, and whose it is."""
        model = self.stack.bridge.model
        if batch.where is not None:
            return *outcome(model, self._head, batch, self.base.vocabulary), owner
        real = owner >= 0  # not so for the rows that fill up a client's share
        return *scored(predictions(model, None, batch)[real], batch.targets), owner[real]

    def _batch(self, chosen: Sequence[Member]) -> tuple[Batch, Tensor, int]:
        """One batch with the same number of rows for each client, whose prediction is whose, and that number.

        A client with fewer rows has its first one repeated, and nothing is predicted there: in a batch of labels
        the owner of such a row is -1.
        """
        mine = [m.rows.index[m.batches[0]] for m in chosen]
        width = max(map(len, mine))
        index = np.concatenate([np.concatenate([x, np.full(width - len(x), x[0])]) for x in mine])
        owner = np.concatenate([np.where(np.arange(width) < len(x), i, -1) for i, x in enumerate(mine)])
        batch = collate(chosen[0].rows.store, index, self.base, self.training.image_size, self.place.device)
        owners = torch.from_numpy(owner).to(self.place.device)
        if batch.where is None:
            return replace(batch, targets=batch.targets[owners >= 0]), owners, width
        real = (owners >= 0)[:, None].expand_as(batch.where)
        kept = real[batch.where]
        where = batch.where & real
        return replace(batch, targets=batch.targets[kept], where=where), owners[where.nonzero()[:, 0]], width

    @property
    def _head(self) -> nn.Module | None:
        """The output layer that may be given the predicted positions alone: not where it has clients' own tensors."""
        return None if self.stack.holds(self.base.head) else self.base.head
