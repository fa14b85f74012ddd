"""A model's sums on rows that it is not trained on."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fedpeft.data import Encoded, by_length
from fedpeft.rounds import Metrics
from fedpeft.training.bases import Base
from fedpeft.training.batches import collate
from fedpeft.training.devices import Place
from fedpeft.training.objectives import outcome
from fedpeft.training.settings import Training

_ROWS = 64  # in one forward pass, for labels; replies have a word's logits at each position, and take fewer


def measure(model: nn.Module, base: Base, rows: Encoded, training: Training, place: Place) -> Metrics:
    """Summed loss, predictions, right ones (labels, or next tokens of replies) and rows; zeros where there are none.

    A pass takes as many rows as one of training; a classifier's takes 64, if those are more, unless ``training.micro``
    says that memory is short.
    """
    return measure_each(model, base, [rows], training, place)[0]


def measure_each(
    model: nn.Module, base: Base, clients: Sequence[Encoded], training: Training, place: Place
) -> list[Metrics]:
    """``measure`` of each client's rows, all of one store: rows of several clients share a pass."""
    model.eval()
    store = clients[0].store
    index = np.concatenate([x.index for x in clients])
    owner = np.repeat(np.arange(len(clients)), [len(x) for x in clients])
    sums = np.zeros((3, len(clients)))
    by_training = base.task == "lm" or training.micro is not None
    most = training.rows if by_training else max(training.rows, _ROWS)
    with torch.inference_mode():
        for chosen in by_length(store.lengths(index), most):
            x = collate(store, index[chosen], base, training.image_size, place.device)
            with place.arithmetic(), base.fed(x.inputs):
                losses, hits = (found.cpu().numpy() for found in outcome(model, base.head, x, base.vocabulary))
            whose = owner[chosen]
            if x.where is not None:
                whose = np.repeat(whose, x.where.sum(dim=1).cpu().numpy())
            for row, each in zip(sums, (losses, np.ones_like(losses), hits), strict=True):
                np.add.at(row, whose, each)
    return [
        Metrics(float(loss), int(units), int(right), examples=len(rows))
        for loss, units, right, rows in zip(*sums, clients, strict=True)
    ]
