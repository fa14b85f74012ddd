"""What a client minimises, and the forward pass that it takes."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpeft.adapters import Adapter, Tensors
from fedpeft.rules import Objective
from fedpeft.training.batches import Batch
from fedpeft.training.head import losses, passing, runs_alone
from fedpeft.training.predict import ADDED, FEW


@dataclass(frozen=True, slots=True)
class Proximal:
    """FedProx's term, μ/2 · ‖w − w₀‖² over the trained tensors: the norm is squared.

    Source: Li et al., arXiv:1812.06127, eq. 2.
    """

    mu: float

    def __call__(self, now: Iterable[Tensor], start: Iterable[Tensor]) -> Tensor:
        terms = [(x - y).square().sum() for x, y in zip(now, start, strict=True)]
        return self.mu / 2 * torch.stack(terms).sum()


def tail_gradients(a: Tensor, b: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by a (…, r, k) and b (…, d, r) of ‖b[:, behind]‖ · ‖a[behind]‖, in Frobenius norms.

    behind: (…, r), 1 for the directions in the tail and 0 for the others. Where one norm is zero so are both gradients.
    """
    left, right = a * behind[..., :, None], b * behind[..., None, :]
    sizes = [torch.linalg.matrix_norm(x)[..., None, None] for x in (left, right)]
    ratios = [torch.where(x > 0, y / torch.where(x > 0, x, 1.0), 0.0) for x, y in (sizes, sizes[::-1])]
    return left * ratios[0], right * ratios[1]


def shifts(start: Adapter, shift: Tensors) -> Adapter:
    """A shift in the form of an adapter, zero where it says nothing; ValueError for a tensor that ``start`` lacks."""
    zeros = {n: np.zeros_like(x) for n, x in start.tensors().items()}
    return start.put(zeros | {n: x.astype(np.float32) for n, x in shift.items()})


@dataclass(frozen=True, slots=True, eq=False)
class Extra:
    """What a rule's objective adds to the gradients of a model's parameters.

    penalty: λ; tails: a, b and the direction where the tail begins; shifts: parameters and what is added to their
    gradients.
    """

    penalty: float
    tails: tuple[tuple[nn.Parameter, nn.Parameter, int], ...]
    shifts: tuple[tuple[nn.Parameter, Tensor], ...]

    @classmethod
    def of(cls, objective: Objective, parameters: Mapping[str, nn.Parameter], shift: Tensors) -> "Extra":
        """The objective on these parameters, which are named as the adapter's tensors. shift: its own, of their sizes.

        ValueError for a penalty on a factor that is not trained.
        """
        cuts = objective.tails(parameters)
        tails = tuple((parameters[f"{n}/a"], parameters[f"{n}/b"], cut) for n, cut in cuts.items())
        shifts = ((parameters[n], torch.tensor(x)) for n, x in shift.items())
        return cls(objective.penalty, tails, tuple((p, x.reshape(p.shape).to(p)) for p, x in shifts))

    def penalise(self) -> None:
        """Add the penalty's gradients to those of the parameters."""
        for a, b, cut in self.tails:
            left, right = a.detach().flatten(1), b.detach().flatten(1)
            behind = (torch.arange(len(left), device=left.device) >= cut).to(left)
            for x, slope in zip((a, b), tail_gradients(left, right, behind), strict=True):
                _add(x, self.penalty * slope)

    def shift(self) -> None:
        """Add the shifts to the parameters' gradients."""
        for x, shift in self.shifts:
            _add(x, shift)


def _add(x: nn.Parameter, slope: Tensor) -> None:
    slope = slope.reshape(x.shape)
    x.grad = slope if x.grad is None else x.grad + slope


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


def scored(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """−log p of each target (units,), and whether it has the largest logit: logits (units, classes)."""
    each = functional.cross_entropy(logits, targets, reduction="none")
    return each, logits.detach().argmax(dim=-1) == targets


def outcome(model: nn.Module, head: nn.Module | None, batch: Batch, words: int = 0) -> tuple[Tensor, Tensor]:
    """``scored`` of a batch's ``predictions``.

    words: a language model's ``Base.vocabulary``; if it has a large one, or the logits are many, its head is run on
    some positions at a time, forward and backward, and their logits forgotten (``head.losses``).
    """
    few = words <= ADDED and batch.units * words <= FEW
    if few or head is None or batch.where is None or not runs_alone(head):
        return scored(predictions(model, head, batch), batch.targets)
    where = batch.where
    with passing(head, lambda x: _chosen(x, where)):
        hidden = model(**batch.inputs, use_cache=False).logits
    return losses(head, hidden, batch.targets, words)


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
