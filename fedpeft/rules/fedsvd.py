"""FedSVD: FFA-LoRA whose shared a follows the data, by an SVD of the product after each round.

Source: Lee et al., arXiv:2505.12805, section 3 and algorithm 1.
Exact: clients train b against one a, so the mean of b gives the mean of ΔW; the SVD changes the factors and not the
product. It is computed from the mean alone, so noise on the mean protects it too.
Sent: r·d numbers a layer up, r(d + k) down. Ranks may differ: a client trains its first directions, those of the
largest singular values, and runs the rest frozen. A server optimiser can't be used, nor answers to older rounds:
each round's b belongs to its own a.
"""

from dataclasses import dataclass, replace

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Array, Layout, LowRank, Tensors, Update, orthogonal, orthonormal, stack
from fedpeft.rules.base import Broadcast, MeanRule, ServerState, Task
from fedpeft.rules.fold import as_kept
from fedpeft.rules.frozen import frozen


@dataclass(frozen=True, slots=True)
class FedSVD(MeanRule):
    """Average the change of b; then a ← Vᵀ and b ← US/scale, from the SVD of the product ``scale · b a``."""

    @property
    @override
    def tells_factors(self) -> bool:
        return True

    @override
    def trains(self, task: Task) -> str:
        return "b"

    @override
    def layout(self, task: Task) -> Layout:
        return task.spec.factors("b") + task.spec.leaves

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        return update.factors("b", task.spec) | update.dense()

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        after = state.adapter.moved(mean)
        layers: dict[str, LowRank] = {}
        for name, x in after.layers.items():
            left, right = stack([(1.0, x)])
            layers[name] = as_kept(_completed(orthogonal(left, right, x.rank, x.scale, length=1.0), x.a), x)
        return state.next(replace(after, layers=layers))

    @override
    def send(self, state: ServerState, rank: int) -> Broadcast:
        return frozen(state, rank)


def _completed(x: LowRank, a: Array) -> LowRank:
    """The same ΔW, and every direction of ``a`` (R, k) in its own a: above rank d the product has fewer than it had."""
    d = len(x.b)
    more = orthonormal(a.T.astype(np.float64), x.a.T).T
    return replace(x, a=np.vstack([x.a[:d], more, x.a[d + len(more) :]]))
