"""One client's training in one round: a fresh optimiser, and the steps it takes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite

import numpy as np
import torch
from torch import nn

from fedpeft.data import Encoded
from fedpeft.rounds import Metrics
from fedpeft.training.bases import Base
from fedpeft.training.batches import Batch, collate
from fedpeft.training.devices import Place
from fedpeft.training.objectives import Extra, Proximal, outcome
from fedpeft.training.passes import diverged, groups, need_rows
from fedpeft.training.settings import Training


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


def _backward(model: nn.Module, base: Base, batch: Batch, units: int, number: int, place: Place) -> Metrics:
    """Add this batch's share to the gradient of the mean loss over ``units``."""
    with place.arithmetic(), base.fed(batch.inputs):
        each, hits = outcome(model, base.head, batch, base.vocabulary)
    loss = each.sum()
    total = loss.item()
    if not isfinite(total):
        raise FloatingPointError(diverged(total, number + 1))
    (loss / units).backward()  # type: ignore[no-untyped-call]  # torch's own
    return Metrics(total, batch.units, int(hits.sum().item()))


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
