"""What a client minimises, and the forward pass that it takes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpeft.training.batches import Batch


@dataclass(frozen=True, slots=True)
class Proximal:
    """FedProx's term, μ/2 · ‖w − w₀‖² over the trained tensors: the norm is squared.

    Source: Li et al., arXiv:1812.06127, eq. 2.
    """

    mu: float

    def __call__(self, now: Iterable[Tensor], start: Iterable[Tensor]) -> Tensor:
        terms = [(x - y).square().sum() for x, y in zip(now, start, strict=True)]
        return self.mu / 2 * torch.stack(terms).sum()


def predictions(model: nn.Module, head: nn.Module | None, batch: Batch) -> Tensor:
    """Logits of a batch's targets, in fp32: (units, classes), or (units, words) for a language model.

    head: a language model's output layer. It is run on the positions that are predicted and no others,
    which for a large vocabulary is most of the memory of a step, and some of its time. Without it all
    positions are computed and the others thrown away. Tokens that a prompt method puts before the text
    are left out.
    """
    if batch.where is None:
        logits: Tensor = model(**batch.inputs).logits
        return logits.float()
    with _only(head, batch.where):
        logits = model(**batch.inputs, use_cache=False).logits
    if logits.ndim == 3:
        logits = _chosen(logits, batch.where)
    return logits.float()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−log p of the targets, summed: logits (units, classes), targets (units,)."""
    return functional.cross_entropy(logits, targets, reduction="sum")


def right(logits: Tensor, targets: Tensor) -> int:
    """How many targets have the largest logit."""
    return int((logits.detach().argmax(dim=-1) == targets).sum().item())


def _chosen(x: Tensor, where: Tensor) -> Tensor:
    """The rows of x (batch, more + length, n) where ``where`` (batch, length) holds, aligned at the end: (units, n)."""
    return x[:, x.shape[1] - where.shape[1] :][where]


@contextmanager
def _only(head: nn.Module | None, where: Tensor) -> Iterator[None]:
    """A context in which the head sees the chosen positions alone."""
    if head is None:
        yield
        return

    def choose(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_chosen(args[0], where), *args[1:])

    hook = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()
