"""Server optimisers: one function on the mean change, which is a pseudo-gradient.

Sources: Reddi et al., arXiv:2003.00295, algorithm 2 (FedAdagrad, FedYogi, FedAdam; no bias
correction; second moments start at tau²); Hsu et al., arXiv:1909.06335, section 3 (FedAvgM).
On LoRA factors all of these have been seen to lose accuracy; the default is ``Averaging``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Array, Tensors


def _refuse(key: str, got: float, good: bool, want: str) -> None:
    if not good:
        raise ValueError(f"{key}: got {got}; want {want}")


class ServerOptimiser(ABC):
    """Turns the mean change into the step that the server takes."""

    @abstractmethod
    def step(self, mean: Tensors, moments: Tensors) -> tuple[dict[str, Array], dict[str, Array]]:
        """The change to apply, and the moments to keep: those of tensors not in ``mean`` stay as they are."""


@dataclass(frozen=True, slots=True)
class Averaging(ServerOptimiser):
    """The mean itself, times ``lr``: FedAvg at 1."""

    lr: float = 1.0

    def __post_init__(self) -> None:
        _refuse("lr", self.lr, self.lr > 0, "more than 0")

    @override
    def step(self, mean: Tensors, moments: Tensors) -> tuple[dict[str, Array], dict[str, Array]]:
        return {n: self.lr * x for n, x in mean.items()}, dict(moments)


@dataclass(frozen=True, slots=True)
class Momentum(ServerOptimiser):
    """FedAvgM: ``v ← beta · v + mean``, and a step of ``lr · v``."""

    lr: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        _refuse("lr", self.lr, self.lr > 0, "more than 0")
        _refuse("beta", self.beta, 0 <= self.beta < 1, "at least 0 and less than 1")

    @override
    def step(self, mean: Tensors, moments: Tensors) -> tuple[dict[str, Array], dict[str, Array]]:
        v = {n: self.beta * moments.get(f"v/{n}", np.zeros_like(x)) + x for n, x in mean.items()}
        return {n: self.lr * x for n, x in v.items()}, {**moments, **{f"v/{n}": x for n, x in v.items()}}


@dataclass(frozen=True, slots=True)
class Adaptive(ServerOptimiser):
    """FedAdam, FedYogi and FedAdagrad: ``m ← beta1·m + (1−beta1)·mean``, and a step of ``lr · m / (√v + tau)``."""

    lr: float = 0.01
    beta1: float = 0.9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _refuse("lr", self.lr, self.lr > 0, "more than 0")
        _refuse("beta1", self.beta1, 0 <= self.beta1 < 1, "at least 0 and less than 1")
        _refuse("tau", self.tau, self.tau > 0, "more than 0")

    @abstractmethod
    def second(self, v: Array, square: Array) -> Array:
        """The next second moment, from the last one and the squared mean."""

    @override
    def step(self, mean: Tensors, moments: Tensors) -> tuple[dict[str, Array], dict[str, Array]]:
        change: dict[str, Array] = {}
        kept = dict(moments)
        for n, x in mean.items():
            m = self.beta1 * moments.get(f"m/{n}", np.zeros_like(x)) + (1 - self.beta1) * x
            v = self.second(moments.get(f"v/{n}", np.full_like(x, self.tau**2)), x**2)
            change[n] = self.lr * m / (np.sqrt(v) + self.tau)
            kept |= {f"m/{n}": m, f"v/{n}": v}
        return change, kept


@dataclass(frozen=True, slots=True)
class Adagrad(Adaptive):
    """``v ← v + mean²``, with no first moment unless ``beta1`` is set."""

    beta1: float = 0.0

    @override
    def second(self, v: Array, square: Array) -> Array:
        return v + square


@dataclass(frozen=True, slots=True)
class Adam(Adaptive):
    """``v ← beta2·v + (1−beta2)·mean²``."""

    beta2: float = 0.99

    def __post_init__(self) -> None:
        Adaptive.__post_init__(self)
        _refuse("beta2", self.beta2, 0 <= self.beta2 < 1, "at least 0 and less than 1")

    @override
    def second(self, v: Array, square: Array) -> Array:
        return self.beta2 * v + (1 - self.beta2) * square


@dataclass(frozen=True, slots=True)
class Yogi(Adaptive):
    """``v ← v − (1−beta2)·mean²·sign(v − mean²)``."""

    beta2: float = 0.99

    def __post_init__(self) -> None:
        Adaptive.__post_init__(self)
        _refuse("beta2", self.beta2, 0 <= self.beta2 < 1, "at least 0 and less than 1")

    @override
    def second(self, v: Array, square: Array) -> Array:
        return v - (1 - self.beta2) * square * np.sign(v - square)
