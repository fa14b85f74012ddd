"""Frozen low-rank layers that a model runs beside its adapter."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from fedpeft.adapters import LowRank

ADAPTER = "default"


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


@contextmanager
def joined(model: PeftModel, tail: Mapping[str, LowRank]) -> Iterator[None]:
    """A context in which each named LoRA layer has its own directions and the tail's, at its own scale.

    What the model says is what it says with the tail ``beside`` it; its config has each layer's rank and alpha, so
    that peft saves, loads and merges it as it is. Without a tail nothing is touched.
    ValueError if there is no such layer, or one that is not linear.
    """
    config: Any = model.peft_config[ADAPTER]
    wide = copy.deepcopy(config)
    held: list[tuple[Any, nn.Parameter, nn.Parameter]] = []
    try:
        for name, x in tail.items():
            found = layer(model, name)
            if not isinstance(found, LoraLayer) or ADAPTER not in found.lora_A:
                raise ValueError(f"tail: {name} is a {type(found).__name__}; want a linear layer with LoRA on it")
            module: Any = found
            a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            own = LowRank(a.detach().cpu().numpy(), b.detach().cpu().numpy(), module.scaling[ADAPTER])
            both = own.join(x)
            held.append((module, a, b))
            _put(module, *(nn.Parameter(torch.tensor(y, dtype=a.dtype, device=a.device)) for y in (both.a, both.b)))
        if tail:
            wide.rank_pattern, wide.alpha_pattern = _patterns(model, bool(config.use_rslora))
            model.peft_config[ADAPTER] = wide
        yield
    finally:
        model.peft_config[ADAPTER] = config
        for module, a, b in held:
            _put(module, a, b)


def _put(module: Any, a: nn.Parameter, b: nn.Parameter) -> None:
    module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight = a, b
    module.r[ADAPTER] = a.shape[0]


def _patterns(model: PeftModel, is_root: bool) -> tuple[dict[str, int], dict[str, float]]:
    """Each LoRA layer's rank and alpha by its whole name; is_root: whether the scale is alpha/√rank, not alpha/rank."""
    layers = {n: x for n, x in model.get_base_model().named_modules() if isinstance(x, LoraLayer) and ADAPTER in x.r}
    ranks = {n: int(x.r[ADAPTER]) for n, x in layers.items()}
    return ranks, {n: float(x.scaling[ADAPTER]) * (ranks[n] ** (0.5 if is_root else 1)) for n, x in layers.items()}


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
