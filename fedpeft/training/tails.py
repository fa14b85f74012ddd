"""Frozen low-rank layers that a model runs beside its adapter."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpeft.adapters import LowRank


@contextmanager
def beside(model: nn.Module, tail: Mapping[str, LowRank], device: torch.device) -> Iterator[None]:
    """A context in which each named layer's output y = f(x) is y + scale · b a x; nothing of it is trained.

    Names are those of an adapter's layers. ValueError if there is no such layer, or one of another shape.
    """
    hooks = []
    try:
        for name, x in tail.items():
            hooks.append(layer(model, name).register_forward_hook(_adding(name, x, device)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layer(model: nn.Module, name: str) -> nn.Module:
    """A model's module by its name. ValueError if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"tail: the model has no layer {name!r}") from error


def _adding(name: str, tail: LowRank, device: torch.device) -> Callable[..., Tensor]:
    a = torch.tensor(tail.a, dtype=torch.float32, device=device)
    b = torch.tensor(tail.scale * tail.b, dtype=torch.float32, device=device)

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        if x.shape[-1] != a.shape[1] or output.shape[-1] != b.shape[0]:
            raise ValueError(f"tail: {name} is ({output.shape[-1]}, {x.shape[-1]}); got ({b.shape[0]}, {a.shape[1]})")
        return output + functional.linear(functional.linear(x.to(a.dtype), a), b).to(output.dtype)

    return hook
