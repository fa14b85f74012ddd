"""The loss of a language model without its logits all at once: some positions at a time, forward and backward.

A large vocabulary's logits, their probabilities and two gradients of that size are most of the memory of a step. Here
the output layer sees some of the predicted positions, their losses and the gradient of the hidden states are taken,
and the logits are forgotten before the next ones are made. The backward pass only scales that gradient. The idea is
that of Wijmans et al., arXiv:2411.09009, without its kernels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from fedpeft.training.memory import LOGITS


def vocabulary(model: nn.Module) -> int:
    """How many logits a language model's output layer gives for a position; 0 where those of the model are not exactly
    these, because it scales or caps them, so that the layer may not be run by itself."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]  # transformers' own
    if head is None:
        return 0
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda _, __, out: seen.append(out))
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            logits = model.eval()(input_ids=torch.arange(3, 6, device=device)[None], use_cache=False).logits
    finally:
        hook.remove()
    same = len(seen) == 1 and seen[0].shape == logits.shape and torch.equal(seen[0], logits)
    return int(logits.shape[-1]) if same else 0


def runs_alone(head: nn.Module) -> bool:
    """Whether the output layer can be run on hidden states by ``losses``: nothing of it is trained or put on it."""
    if head._forward_hooks or head._forward_pre_hooks:
        return False
    return not torch.is_grad_enabled() or not any(x.requires_grad for x in head.parameters())


@contextmanager
def passing(head: nn.Module, chosen: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A context in which the output layer gives what ``chosen`` makes of its hidden states, and computes nothing."""
    head.forward = lambda x, *_, **__: chosen(x)
    try:
        yield
    finally:
        del head.forward


def losses(
    head: nn.Module, hidden: Tensor, targets: Tensor, words: int, at_once: int = LOGITS
) -> tuple[Tensor, Tensor]:
    """−log p of each target (units,), and whether it has the largest logit, from hidden states (units, width).

    Only ``hidden`` gets a gradient. Exact: a unit's loss and gradient are those of ``functional.cross_entropy`` of all
    logits, to rounding. words: logits of a position; at_once: logits in memory, of one position at least.
    """
    step = max(1, at_once // words)
    found: tuple[Tensor, Tensor] = _Losses.apply(hidden, targets, head, step)  # type: ignore[no-untyped-call]  # torch's
    return found


class _Losses(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, step: int) -> tuple[Tensor, Tensor]:
        each = torch.empty(len(targets), device=hidden.device)
        hits = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            h = hidden[part].detach().requires_grad_(slopes is not None)
            with torch.set_grad_enabled(slopes is not None):
                scores = head(h)
            logits, goal = scores.detach().float(), targets[part][:, None]
            hits[part] = logits.argmax(dim=-1) == targets[part]
            logits -= logits.amax(dim=-1, keepdim=True)  # in place from here on: no layer needs its output again
            wanted = logits.gather(1, goal)
            sums = logits.exp_().sum(dim=-1, keepdim=True)
            each[part] = (sums.log() - wanted)[:, 0]
            if slopes is not None:
                logits /= sums
                logits.scatter_add_(1, goal, torch.full_like(wanted, -1.0))
                (slopes[part],) = torch.autograd.grad(scores, h, logits.to(scores.dtype))
            del scores, logits  # before the next ones are made
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(hits)
        return each, hits

    @staticmethod
    @override
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (slopes,) = ctx.saved_tensors
        return slopes * grad_outputs[0].to(slopes.dtype)[:, None], None, None, None
