"""A model's sums on rows that it is not trained on."""

import torch
from torch import nn

from fedpeft.rounds import Metrics
from fedpeft.training.bases import Base
from fedpeft.training.batches import Encoded, by_length, collate
from fedpeft.training.devices import Place
from fedpeft.training.objectives import cross_entropy, predictions, right

_ROWS = 64  # in one forward pass, for labels; replies have a word's logits at each position, and take fewer


def measure(model: nn.Module, base: Base, rows: Encoded, batch: int, image_size: int | None, place: Place) -> Metrics:
    """Summed loss, predictions, right ones (labels, or next tokens of replies) and rows; zeros where there are none.

    batch: the rows of one pass of a language model; classifiers take 64.
    """
    model.eval()
    done = Metrics(examples=len(rows))
    with torch.inference_mode():
        for index in by_length(rows.lengths, batch if base.task == "lm" else max(batch, _ROWS)):
            x = collate(rows, index, base, image_size, place.device)
            with place.arithmetic():
                logits = predictions(model, base.head, x)
            done += Metrics(cross_entropy(logits, x.targets).item(), x.units, right(logits, x.targets))
    return done
