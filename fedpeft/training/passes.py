"""Which rows a client trains on, in what order, and how far its steps go: for every runtime the same."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from math import ceil

import numpy as np

from fedpeft.data import Encoded, Federation, Rows, Store, order
from fedpeft.rounds import Done, Failed, Job
from fedpeft.training.settings import Training


def need_rows(rows: Encoded) -> None:
    """Raise ValueError if there are no rows to train on."""
    if not len(rows):
        left_out = f": all {rows.dropped} were cut before their reply; raise training.length" if rows.dropped else ""
        raise ValueError(f"no rows to train on{left_out}")


def travel(training: Training, rows: int) -> float:
    """What the gradients of a client with so many rows are multiplied with in all, as ``adapters.Update`` has it.

    With SGD's momentum m the gradient of step j of K moves the values by lr · (1 + m + … + m^(K−j)). AdamW: 0.
    """
    if training.optimiser != "sgd":
        return 0.0
    steps = training.steps or training.epochs * ceil(ceil(rows / training.batch) / training.accumulate)
    return training.lr * sum((1 - training.momentum**j) / (1 - training.momentum) for j in range(1, steps + 1))


def groups(rows: Encoded, training: Training, rng: np.random.Generator) -> Iterator[Sequence[Rows]]:
    """The batches of each optimiser step: whole epochs, or as many of them as the set number of steps takes.

    A batch of more rows than ``training.micro`` comes in parts; which rows a step takes does not depend on it.
    """
    lengths = rows.lengths

    def allgroups() -> Iterator[Sequence[Rows]]:
        for _ in count() if training.steps is not None else range(training.epochs):
            batches = order(lengths, training.batch, rng)
            for i in range(0, len(batches), training.accumulate):
                yield [part for x in batches[i : i + training.accumulate] for part in _cut(x, training.rows)]

    return islice(allgroups(), training.steps)


def _cut(rows: Rows, size: int) -> list[Rows]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def each_of(jobs: Sequence[Job], train: Callable[[Job], Done]) -> Iterator[Done | Failed]:
    """Train each job, one after the other, when asked for; one that raises is ``Failed``, and the next goes on."""
    for job in jobs:
        try:
            yield train(job)
        except Exception as error:
            yield Failed(reason(job.client, error))


def reason(client: int | None, error: Exception) -> str:
    """What is said of a job or trial that failed."""
    who = "central" if client is None else f"client {client}"
    return f"{who}: {error}" if str(error) else f"{who}: {type(error).__name__}"


def still_good(store: Store | None, had: Federation, has: Federation, is_as_long: bool) -> Store | None:
    """The tokenised rows of one federation for another, if it has the same table and they are all there; else None.

    is_as_long: whether texts are cut to the same length.
    """
    if store is None or had.table is not has.table or not is_as_long:
        return None
    return store if store.holds(has.used()) else None


def diverged(loss: float, step: int) -> str:
    """What to say of a loss that is not finite."""
    return f"the loss is {loss} at step {step}: lower training.lr, or set training.clip"
