"""FedRot-LoRA: each client turns its factors towards the server's before they are averaged.

Source: Zhang et al., arXiv:2602.23638 (ICML 2026). ``b a = (b Q)(Qᵀ a)`` for every rotation Q, so clients that have
learned the same may hold other factors, and their mean loses both. Here a client sends b Q and Qᵀ a with the Q that
brings one factor nearest to what it received: ``min ‖Qᵀ a − a₀‖`` in odd rounds, ``min ‖b Q − b₀‖`` in even ones, by
the SVD of ``a a₀ᵀ`` or ``bᵀ b₀`` (orthogonal Procrustes) without reflections; softened, it is the rotation nearest to
``(1 − strength)·I + strength·Q``. The first round turns nothing: b₀ is zero, and all start from one a.
Not exact: FedIT's covariance is smaller, and not zero. Sent: r(d + k) numbers a layer up and down, as by ``fedit``, and
the server sees nothing but the mean. A client of a lower rank turns the directions that it has, and runs
the rest frozen.
"""

from dataclasses import dataclass, replace

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Array, Layout, LowRank, Tensors, Update
from fedpeft.rules.base import Broadcast, MeanRule, ServerState, Task
from fedpeft.rules.frozen import frozen

TIE = 1e-9
"""A share of the identity that goes into each cross product, so that directions that say nothing aren't turned."""


@dataclass(frozen=True, slots=True)
class FedRot(MeanRule):
    """Average the change of both factors, each client's turned towards what it received.

    strength: λ, from 0, which is ``fedit``, to 1, all the way.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength: got {self.strength}; want at least 0 and at most 1")

    @property
    @override
    def tells_factors(self) -> bool:
        return True

    @property
    @override
    def is_change(self) -> bool:
        return True

    @override
    def layout(self, task: Task) -> Layout:
        return task.spec.factors("ab") + task.spec.leaves

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        turned = {n: self._turned(x, update.received.layers[n], task.round) for n, x in update.trained.layers.items()}
        update = replace(update, trained=replace(update.trained, layers=turned))
        return update.factors("ab", task.spec) | update.dense()

    def _turned(self, new: LowRank, old: LowRank, round: int) -> LowRank:
        if round == 0 or ((new.a == old.a).all() and (new.b == old.b).all()):
            return new
        a, b = new.a.astype(np.float64), new.b.astype(np.float64)
        turn = _rotation(a @ old.a.T if round % 2 else b.T @ old.b)
        if self.strength < 1:
            turn = _rotation((1 - self.strength) * np.eye(len(turn)) + self.strength * turn)
        return replace(new, a=turn.T @ a, b=b @ turn)

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        return state.next(state.adapter.moved(mean))

    @override
    def send(self, state: ServerState, rank: int) -> Broadcast:
        return frozen(state, rank)


def _rotation(x: Array) -> Array:
    """The rotation nearest to x (r, r): orthogonal, and of determinant 1."""
    u, _, vt = np.linalg.svd(x + TIE * np.linalg.norm(x) * np.eye(len(x)))
    nearest = u @ vt
    turn: Array = nearest - (1 - np.linalg.det(nearest)) * np.outer(u[:, -1], vt[-1])  # what a reflection has too much
    return turn
