"""FedEx-LoRA: the mean of the factors, and what that misses folded into the tail.

Source: Singhal et al., arXiv:2410.09432, equations 6 to 8.
Exact where energy is 1 and nothing limits the tail: adapter and tail together are the mean of the clients' products.
The residual is kept as factors that every client runs beside the adapter, and base weights are never touched.
The paper's clients have one rank. Here ranks may differ, and it stays exact, since clients run frozen what they can't
train: all hold the server's factors, and each has moved some of them.
Sent: R(d + k) numbers a layer up, as many down, and the tail, whose rank grows by at most (clients − 1)·R each round
until it is min(d, k), or ``largest``. The server sees each client.
"""

from dataclasses import dataclass, replace

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Array, Layer, Tensors
from fedpeft.rules.base import ServerState
from fedpeft.rules.each import Encodings, FactorList, mean
from fedpeft.rules.fold import as_kept, check_threshold, fold


@dataclass(frozen=True, slots=True)
class FedEx(FactorList):
    """Average both factors; the tail takes ``scale · Σ p (b − mean b)(a − mean a)``.

    energy: the share of each round's residual energy that is kept; largest: the most directions that the tail may have.
    """

    energy: float = 1.0
    largest: int | None = None

    def __post_init__(self) -> None:
        check_threshold(self.energy, self.largest)

    @property
    @override
    def tells_factors(self) -> bool:
        return True

    @override
    def decode(self, encodings: Encodings, state: ServerState) -> ServerState:
        middle = mean(encodings, [name for name, _ in self.layout(state.task).shapes])
        tail = dict(state.tail)
        for layer in state.task.spec.layers:
            left, right = covariance(encodings, layer, middle)
            folded = fold(tail.get(layer.name), left, right, self.energy, self.largest)
            tail[layer.name] = as_kept(folded, state.adapter.layers[layer.name])
        tail = {n: x for n, x in tail.items() if x.rank}
        return replace(state, tail=tail).next(state.adapter.moved(middle))


def covariance(encodings: Encodings, layer: Layer, middle: Tensors) -> tuple[Array, Array]:
    """Factors of ``scale · Σ p (b − mean b)(a − mean a)``: what the mean factors miss of the mean product.

    It is also ``scale · Σ p b (a − mean a)``, since the latter sum to zero.
    """
    total = sum(weight for _, weight in encodings)
    a, b = f"{layer.name}/a", f"{layer.name}/b"
    lefts = [layer.scale * weight / total * x[b] for x, weight in encodings]
    return np.hstack(lefts), np.vstack([x[a] - middle[a] for x, _ in encodings])
