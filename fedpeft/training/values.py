"""A loaded model's values: those that its files lack, their precision, and dropout that is off."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import nn


def draw(model: nn.Module, fresh: Sequence[str], seed: int) -> None:
    """Fill what the files lack from the seed: matrices N(0, 0.02²), norms one, the rest zero."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name in fresh:
            x = model.get_parameter(name)
            if x.ndim > 1:
                x.copy_(torch.from_numpy(0.02 * rng.standard_normal(tuple(x.shape))))
            else:
                x.fill_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)


def store(model: nn.Module, names: Collection[str], dtype: torch.dtype) -> None:
    """Have the named parameters in this precision, as copies that keep no file mapped."""
    with torch.no_grad():
        for name in names:
            x = model.get_parameter(name)
            x.data = x.data.to(dtype, copy=True)


def silence(model: nn.Module) -> None:
    """Set every dropout and stochastic-depth rate of a model to zero; its configuration stays as it is."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def own_tensors(model: nn.Module, fresh: Collection[str]) -> dict[int, str]:
    """The names of what a model's files hold, by identity: parameters, tied ones once, and buffers that are saved."""
    saved = model.state_dict(keep_vars=True).keys()
    buffers = [(n, x) for n, x in model.named_buffers() if n in saved]
    return {id(x): n for n, x in (*model.named_parameters(), *buffers) if n not in fresh}
