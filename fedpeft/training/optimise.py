"""One optimiser for many clients: a row of numbers each, and each row with its own steps and moments."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpeft.training.settings import Training

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8  # torch's own defaults for AdamW
_NORM_EPSILON = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to a norm


@dataclass(slots=True, eq=False)
class RowOptimiser:
    """Values (clients, n) in fp32 and what it takes to train them; a step of some rows leaves the others alone.

    Each row's arithmetic is that of ``torch.optim.AdamW`` or ``SGD``, of ``clip_grad_norm_``, and of FedProx's
    term towards the row's first values, as for one client by itself. A row's shift is added to its gradients once they
    are clipped.
    """

    values: Tensor
    training: Training
    _start: Tensor | None = field(init=False)
    _first: Tensor | None = field(init=False)
    _second: Tensor | None = field(init=False)
    _shift: Tensor | None = field(init=False, default=None)
    _steps: Tensor = field(init=False)

    def __post_init__(self) -> None:
        adam, training = self.training.optimiser == "adamw", self.training
        self._start = self.values.clone() if training.prox else None
        self._first = torch.zeros_like(self.values) if adam or training.momentum else None
        self._second = torch.zeros_like(self.values) if adam else None
        self._steps = torch.zeros(len(self.values), 1, dtype=torch.float64)  # in main memory: not all devices have it

    def begin(self, row: int, values: Tensor, shift: Tensor | None = None) -> None:
        """Give a row to another client."""
        self.values[row] = values
        self._steps[row] = 0
        if self._start is not None:
            self._start[row] = values
        for x in (self._first, self._second):
            if x is not None:
                x[row] = 0
        if shift is not None and self._shift is None:
            self._shift = torch.zeros_like(self.values)
        if self._shift is not None:
            self._shift[row] = 0 if shift is None else shift

    def step(self, rows: Tensor, gradients: Tensor) -> None:
        """One step of the given rows (k,) along their gradients (k, n), which may be changed in place."""
        training = self.training
        values, g = self.values[rows], gradients
        if self._start is not None:
            g = g + training.prox * (values - self._start[rows])
        if training.clip is not None:
            norms = torch.linalg.vector_norm(g, dim=1, keepdim=True)
            g = g * (training.clip / (norms + _NORM_EPSILON)).clamp(max=1.0)
        if self._shift is not None:
            g = g + self._shift[rows]
        self._steps[rows.cpu()] += 1
        if training.optimiser == "adamw":
            self._adamw(rows, values, g)
        else:
            self._sgd(rows, values, g)

    def _adamw(self, rows: Tensor, values: Tensor, g: Tensor) -> None:
        assert self._first is not None
        assert self._second is not None
        lr, n = self.training.lr, self._steps[rows.cpu()]
        first = self._first[rows].lerp_(g, 1 - _BETA_1)
        second = self._second[rows].mul_(_BETA_2).addcmul_(g, g, value=1 - _BETA_2)
        size = (lr / (1 - _BETA_1**n)).to(values)
        root = (1 - _BETA_2**n).sqrt().to(values)
        values = values * (1 - lr * self.training.weight_decay)
        self.values[rows] = values - size * (first / (second.sqrt() / root + _EPSILON))
        self._first[rows], self._second[rows] = first, second

    def _sgd(self, rows: Tensor, values: Tensor, g: Tensor) -> None:
        training = self.training
        if training.weight_decay:
            g = g + training.weight_decay * values
        if self._first is not None:
            g = g + training.momentum * self._first[rows]  # which is zero at a row's first step
            self._first[rows] = g
        self.values[rows] = values - training.lr * g
