"""One client's training in one round: a fresh optimiser, and the steps it takes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, islice
from math import ceil, isfinite

import numpy as np
import torch
from torch import nn

from fedpeft.data import Rows
from fedpeft.rounds import Metrics
from fedpeft.training.bases import Base
from fedpeft.training.batches import Batch, collate, order
from fedpeft.training.devices import Place
from fedpeft.training.objectives import Extra, Proximal, outcome
from fedpeft.training.settings import Training
from fedpeft.training.tokens import Encoded


def fit(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    base: Base,
    rows: Encoded,
    training: Training,
    seed: int,
    place: Place,
    extra: Extra,
) -> Metrics:
    """Train the named parameters of a model on a client's rows, in place; the sums over all steps.

    extra: what a rule adds to the loss; losses are without it.

    A step's gradient is of the mean loss over all units (labels, target tokens) of its ``accumulate``
    batches, so that how they are cut makes no difference. The result depends on nothing but the arguments.
    ValueError if there are no rows, FloatingPointError if the loss stops being finite.
    """
    need_rows(rows)
    chosen = list(parameters.values())
    for x in chosen:
        x.grad = None
    start = [x.detach().clone() for x in chosen] if training.prox else []
    optimiser = _optimiser(chosen, training)
    done = Metrics(examples=len(rows))
    with place.seeded(seed), in_training(model), base.recomputing(training.checkpointing):
        for number, group in enumerate(groups(rows, training, np.random.default_rng(seed))):
            batches = [collate(rows, index, base, training.image_size, place.device) for index in group]
            units = sum(x.units for x in batches)
            for batch in batches:
                done += _backward(model, base, batch, units, number, place)
            if training.prox:
                Proximal(training.prox)(chosen, start).backward()  # type: ignore[no-untyped-call]  # torch's own
            extra.penalise()
            if training.clip is not None:
                torch.nn.utils.clip_grad_norm_(chosen, training.clip)
            extra.shift()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    return done


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


def _backward(model: nn.Module, base: Base, batch: Batch, units: int, number: int, place: Place) -> Metrics:
    """Add this batch's share to the gradient of the mean loss over ``units``."""
    with place.arithmetic():
        each, hits = outcome(model, base.head, batch, base.vocabulary)
    loss = each.sum()
    total = loss.item()
    if not isfinite(total):
        raise FloatingPointError(diverged(total, number + 1))
    (loss / units).backward()  # type: ignore[no-untyped-call]  # torch's own
    return Metrics(total, batch.units, int(hits.sum().item()))


def diverged(loss: float, step: int) -> str:
    """What to say of a loss that is not finite."""
    return f"the loss is {loss} at step {step}: lower training.lr, or set training.clip"


def groups(rows: Encoded, training: Training, rng: np.random.Generator) -> Iterator[Sequence[Rows]]:
    """The batches of each optimiser step: whole epochs, or as many of them as the set number of steps takes."""
    lengths = rows.lengths

    def allgroups() -> Iterator[Sequence[Rows]]:
        for _ in count() if training.steps is not None else range(training.epochs):
            batches = order(lengths, training.batch, rng)
            for i in range(0, len(batches), training.accumulate):
                yield batches[i : i + training.accumulate]

    return islice(allgroups(), training.steps)


def _optimiser(parameters: Sequence[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    if training.optimiser == "sgd":
        return torch.optim.SGD(
            parameters, lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay
        )
    return torch.optim.AdamW(parameters, lr=training.lr, weight_decay=training.weight_decay)


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """The model in training mode, but for batch norms, whose running means would carry over to the next client."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    try:
        yield
    finally:
        model.eval()
