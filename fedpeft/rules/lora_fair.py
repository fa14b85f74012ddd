"""LoRA-FAIR in closed form: the mean of the factors, with b corrected towards the mean product.

Source: Bian et al., arXiv:2411.14961, section 4: the server seeks a correction ΔB of mean b, such that (mean b + ΔB)
mean a is like the mean product, with a penalty on ΔB. The paper descends by steps on a cosine; its least-squares form
has the solution ``ΔB = (M/scale − mean b · mean a) aᵀ (a aᵀ + λI)⁻¹`` with a the mean, which is used here. Not exact,
since only what mean a reaches is corrected, but never further from the mean product than FedIT with λ = 0.
Sent: R(d + k) numbers a layer up, as many down. The server sees each client; no d × k matrix is formed.
"""

from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from fedpeft.rules.base import ServerState
from fedpeft.rules.each import Encodings, FactorList, mean
from fedpeft.rules.fedex import covariance


@dataclass(frozen=True, slots=True)
class LoRAFair(FactorList):
    """Average both factors, then add to b what of FedIT's error the mean a reaches.

    ridge: λ, the penalty on the correction, relative to the mean of the squared norms of a's rows.
    """

    ridge: float = 0.01

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError(f"ridge: got {self.ridge}; want more than 0")

    @property
    @override
    def tells_factors(self) -> bool:
        return True

    @override
    def decode(self, encodings: Encodings, state: ServerState) -> ServerState:
        change = mean(encodings, [name for name, _ in self.layout(state.task).shapes])
        missed = {x.name: covariance(encodings, x, change) for x in state.task.spec.layers}
        for layer in state.task.spec.layers:
            left, right = missed[layer.name]
            a = state.adapter.layers[layer.name].a + change[f"{layer.name}/a"]
            gram = a @ a.T
            penalty = self.ridge * np.trace(gram) / layer.rank * np.eye(layer.rank)
            reached = left @ (right @ a.T) / layer.scale
            change[f"{layer.name}/b"] = change[f"{layer.name}/b"] + np.linalg.solve(gram + penalty, reached.T).T
        return state.next(state.adapter.moved(change))
