"""FLoRA: the stack of the clients' factors is their mean, and is folded into what the model runs beside the adapter.

Sources: Wang et al., arXiv:2409.05976, section 3 (stacking, and a fresh start each round); with ``energy`` below 1
FLoRIST (Ramesh et al., arXiv:2506.09199): an SVD of the stack keeps the largest directions.
Exact where energy is 1 and nothing limits the tail. Ranks and scales may differ. Unlike the paper's, the fold never
touches base weights, so a quantised base works: it is kept as factors, the tail, which every client runs and none
trains.
Sent: R(d + k) numbers a layer up, zeros included; down R·k for the fresh a (b is zero), and the tail, whose rank grows
by the sum of the clients' ranks each round until it is min(d, k), or ``largest``. The server sees each client. Its
starts over cost it: every round trains new directions, with new moments, from zero.
"""

from dataclasses import dataclass, replace

import numpy as np
from typing_extensions import override

from fedpeft.adapters import LowRank
from fedpeft.rules.base import ServerState
from fedpeft.rules.each import Encodings, FactorList, leaves, mean, mean_product
from fedpeft.rules.fold import as_kept, check_threshold, fold


@dataclass(frozen=True, slots=True)
class FLoRA(FactorList):
    """Fold the mean product into the tail; the next round starts from a fresh a and b = 0.

    seed: of the fresh a, uniform in ±1/√k; energy: the share of each round's energy that is kept; largest: the most
    directions that the tail may have.
    """

    seed: int
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
        tail, layers = dict(state.tail), dict[str, LowRank]()
        for i, layer in enumerate(state.task.spec.layers):
            held = state.adapter.layers[layer.name]
            left, right = mean_product(encodings, layer, held)
            folded = fold(tail.get(layer.name), left, right, self.energy, self.largest)
            tail[layer.name] = as_kept(folded, held)
            rng = np.random.default_rng([self.seed, state.task.round, i])
            a = rng.uniform(-1, 1, held.a.shape) / np.sqrt(layer.k)
            layers[layer.name] = as_kept(LowRank(a, np.zeros(held.b.shape), layer.scale), held)
        after = state.adapter.moved(mean(encodings, leaves(state)))
        tail = {n: x for n, x in tail.items() if x.rank}
        return replace(state, tail=tail).next(replace(after, layers=layers))
