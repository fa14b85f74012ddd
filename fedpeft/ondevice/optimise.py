"""AdamW and SGD in numpy, in place, step by step what ``torch.optim`` does; and clipping as torch clips."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Protocol

import numpy as np

from fedpeft.adapters import Array, Tensors
from fedpeft.training.settings import Training

_FIRST, _SECOND, _SMALL = 0.9, 0.999, 1e-8  # AdamW's β₁, β₂ and ε, torch's defaults
_LEAST = 1e-6  # which torch adds to a norm before it divides by it


class Optimiser(Protocol):
    """Moves some arrays, fp32 and maybe views, in place."""

    def step(self, gradients: Tensors) -> None:
        """One step. gradients: of all of the arrays, by name, of their shapes; they are left as they are."""
        ...


@dataclass(slots=True, eq=False)
class AdamW:
    """Adam with the weight decay beside it; its two running means are fp32.

    Source: Kingma and Ba, arXiv:1412.6980, alg. 1; Loshchilov and Hutter, arXiv:1711.05101, alg. 2.
    """

    values: Tensors
    lr: float
    weight_decay: float
    steps: int = 0
    means: Tensors = field(init=False)
    squares: Tensors = field(init=False)

    def __post_init__(self) -> None:
        self.means = {n: np.zeros_like(x) for n, x in self.values.items()}
        self.squares = {n: np.zeros_like(x) for n, x in self.values.items()}

    def step(self, gradients: Tensors) -> None:
        """One step; see ``Optimiser``."""
        self.steps += 1
        size = self.lr / (1 - _FIRST**self.steps)
        unbiased = sqrt(1 - _SECOND**self.steps)
        for name, x in self.values.items():
            slope, mean, square = gradients[name], self.means[name], self.squares[name]
            x *= 1 - self.lr * self.weight_decay
            mean += (1 - _FIRST) * (slope - mean)
            square *= _SECOND
            square += (1 - _SECOND) * slope * slope
            below = np.sqrt(square)
            below /= unbiased
            below += _SMALL
            np.divide(mean, below, out=below)
            below *= size
            x -= below


@dataclass(slots=True, eq=False)
class Sgd:
    """Gradient descent; its momentum, without dampening, begins with the first gradient."""

    values: Tensors
    lr: float
    momentum: float
    weight_decay: float
    moving: dict[str, Array] = field(init=False, default_factory=dict[str, Array])

    def step(self, gradients: Tensors) -> None:
        """One step; see ``Optimiser``."""
        for name, x in self.values.items():
            slope = gradients[name] + self.weight_decay * x
            if self.momentum:
                if name in self.moving:
                    slope += self.momentum * self.moving[name]
                self.moving[name] = slope
            x -= self.lr * slope


def optimiser(training: Training, values: Tensors) -> Optimiser:
    """A fresh one of the settings' kind, for these arrays."""
    if training.optimiser == "sgd":
        return Sgd(values, training.lr, training.momentum, training.weight_decay)
    return AdamW(values, training.lr, training.weight_decay)


def clip(gradients: Tensors, most: float) -> float:
    """Scale gradients in place so that their l2 norm together is at most ``most``; the norm that they had."""
    norm = sqrt(sum(float(np.sum(np.square(x), dtype=np.float64)) for x in gradients.values()))
    scale(gradients.values(), min(most / (norm + _LEAST), 1.0) if norm == norm else norm)
    return norm


def scale(arrays: Iterable[Array], by: float) -> None:
    """Multiply arrays by a number, in place."""
    for x in arrays:
        x *= np.float32(by)


def proximal(gradients: Tensors, now: Tensors, start: Mapping[str, Array], mu: float) -> None:
    """Add the gradient of FedProx's term, μ/2 · ‖w − w₀‖², in place.

    Source: Li et al., arXiv:1812.06127, eq. 2.
    """
    for name, x in gradients.items():
        x += np.float32(mu) * (now[name] - start[name])
