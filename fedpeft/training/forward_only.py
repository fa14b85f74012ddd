"""Training by forward passes alone: the walk along a pool's directions, for every runtime the same."""

from collections.abc import Callable
from math import isfinite

import numpy as np

from fedpeft.adapters import Tensors, flat, places
from fedpeft.data import Encoded, Rows
from fedpeft.rounds import Done, Job, Metrics
from fedpeft.training.passes import diverged, groups, need_rows
from fedpeft.training.settings import Training


def walk(job: Job, rows: Encoded, training: Training, losses: Callable[[Tensors, Rows], Metrics]) -> Done:
    """What a client trains by the job's pool, and its moves: ``trained = start + Σ movesⱼ · directionⱼ``.

    losses: of the model with these trained tensors (fp32, named and shaped as ``job.start.tensors()``), on a batch of
    positions among the rows: the sum of the losses, the units it is over, and how many were right; without dropout.
    A step takes two calls for each of its ``accumulate`` batches. Both copies of the tensors are made from what has
    been trained so far, and that is kept in fp64, so that the moves say all of it. Batches are those of ``steps.fit``.

    training.clip bounds the slope g along a direction: in mean square over all directions, that is the gradient's norm.
    training.prox is in the slope, exactly. What else a walk can't follow is refused (``refused``).
    The losses that are told are the means of those on both sides of the steps' beginnings.
    ValueError if there are no rows, FloatingPointError if the loss stops being finite.
    """
    if job.pool is None:
        raise ValueError("the job has no pool of directions; want one to walk along")
    if problem := refused(training):
        raise ValueError(problem)
    need_rows(rows)
    pool, place, start = job.pool, places(job.start.tensors()), flat(job.start.tensors())
    now, moves, told = start.copy(), np.zeros(pool.size), Metrics(examples=len(rows))
    draw = np.random.default_rng([job.seed, 1])

    for number, group in enumerate(groups(rows, training, np.random.default_rng(job.seed))):
        chosen = int(draw.integers(pool.size))
        z = pool.direction(chosen, now.size)
        sides = []
        for epsilon in (pool.epsilon, -pool.epsilon):
            tensors = place.unflatten((now + epsilon * z).astype(np.float32))
            sides.append(sum((losses(tensors, batch) for batch in group), Metrics()))
        ahead, behind = sides
        told += Metrics((ahead.loss + behind.loss) / 2, ahead.units, (ahead.correct + behind.correct) / 2)
        rise = ahead.mean_loss - behind.mean_loss if ahead.units else 0.0  # of texts of one token there is no loss
        slope = rise / (2 * pool.epsilon)
        if not isfinite(slope):
            raise FloatingPointError(diverged(ahead.loss + behind.loss, number + 1))
        slope += training.prox * float(((now - start) * z).sum())
        if training.clip is not None:
            slope = min(max(slope, -training.clip), training.clip)
        now += -training.lr * slope * z
        moves[chosen] += -training.lr * slope

    kinds = {n: x.dtype for n, x in job.start.tensors().items()}
    trained = job.start.put({n: x.astype(kinds[n]) for n, x in place.unflatten(now).items()})
    return Done(trained, told, moves=moves)


def refused(training: Training) -> str:
    """What of these settings a walk can't do, as "key: what was got; what is wanted"; "" if there is nothing."""
    for key, got, want in (
        ("optimiser", training.optimiser, "sgd"),
        ("momentum", training.momentum, 0.0),
        ("weight_decay", training.weight_decay, 0.0),
    ):
        if got != want:
            return (
                f"{key}: got {got!r}, and clients that train by forward passes alone step along directions that all "
                f"know, and no others; want {want!r}".replace("'", '"')
            )
    return ""
