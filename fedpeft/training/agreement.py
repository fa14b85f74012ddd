"""Whether a PEFT method trains as well stacked as alone: tried on the very model, since some are silently wrong."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from fedpeft.rounds import Done, Failed, Job
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.pool import Member, Pool
from fedpeft.training.stack import Stack

_CLIENTS, _ROWS = 3, 2
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""The largest relative difference of a tensor's two gradients that is rounding, of which 3e-4 and 0.06 have been seen;
what is wrong has been off by 5 % and more in fp32, and by all of it in bf16."""
_SMALL = 0.01  # of the whole gradient: a tensor whose part is smaller is compared with this


def disagreement(trainer: TorchTrainer, stack: Stack) -> str:
    """Why the trainer's model can't be stacked; empty if it can.

    Three clients (or those that have rows, some of them twice) with adapters that differ take one plain step on two
    rows each, once together and once one after the other, without dropout: the steps are their gradients.
    """
    short = replace(trainer.training, optimiser="sgd", momentum=0.0, lr=1.0, steps=1, batch=_ROWS)
    alone = trainer.over(trainer.federation, replace(short, accumulate=1, clip=None, prox=0.0, weight_decay=0.0))
    jobs = _jobs(alone)
    with _without_dropout(alone.bridge.model):
        apart = list(TorchTrainer.train_many(alone, jobs))
        pool = Pool(stack, alone.frozen, alone.training, alone.place, len(jobs))
        members = [Member.of(j, alone.rows(j.client, "train"), alone.training, i) for i, j in enumerate(jobs)]
        try:
            together = dict(pool.train(members))
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    pairs = [(apart[i], together[i], job) for i, job in enumerate(jobs)]
    worst = float(np.max([0.0, *(_difference(x, y, job) for x, y, job in pairs)]))  # nan, where one of them is
    if worst <= _TOLERANCE[alone.place.dtype]:
        return ""
    return f"its gradients differ by {worst:.2g} of their size"


def _jobs(trainer: TorchTrainer) -> list[Job]:
    start, jobs = trainer.start(), list[Job]()
    first, clients = trainer.federation.first, trainer.federation.clients
    some = list(islice((i for i in range(first, first + clients) if len(trainer.rows(i, "train"))), _CLIENTS))
    for number, client in zip(range(_CLIENTS), cycle(some)):
        rng = np.random.default_rng(number)
        change = {n: 0.05 * rng.standard_normal(x.shape) for n, x in start.tensors().items()}
        jobs.append(Job(client, 0, number, start.moved(change)))
    return jobs


def _difference(apart: Done | Failed, together: Done | Failed, job: Job) -> float:
    if isinstance(apart, Failed):  # then the loop can't do it either, and says so in its turn
        return 0.0
    if isinstance(together, Failed):
        return float("inf")
    start, want, got = (x.tensors() for x in (job.start, apart.trained, together.trained))
    sizes = {n: _norm(x - start[n]) for n, x in want.items()}
    least = max(_SMALL * _norm(list(sizes.values())), 1e-12)
    return float(np.max([_norm(got[n] - x) / max(sizes[n], least) for n, x in want.items()]))


def _norm(x: ArrayLike) -> float:
    return float(np.linalg.norm(np.ravel(x)))


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    found: Sequence[nn.modules.dropout._DropoutNd] = [
        x for x in model.modules() if isinstance(x, nn.modules.dropout._DropoutNd)
    ]
    rates = [x.p for x in found]
    try:
        for x in found:
            x.p = 0.0
        yield
    finally:
        for x, rate in zip(found, rates, strict=True):
            x.p = rate
