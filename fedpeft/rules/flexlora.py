"""FlexLoRA: the mean of the clients' products, cut to the server's rank by an SVD.

Source: Bai et al., arXiv:2402.11505, section 3.
Exact but for the cut, which is the best of its rank. Ranks and scales may differ.
Sent: R(d + k) numbers a layer up, zeros included, as many down; the server stacks the clients' factors, so it sees
each of them, and never forms a d × k matrix: O((d + k)·S·R) for a stack of S columns in all.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Array, Layer, Layout, LowRank, Tensors, Update, top_svd
from fedpeft.rules.base import Broadcast, Rule, ServerState, Task
from fedpeft.rules.each import Encodings, FactorList, leaves, mean, mean_product
from fedpeft.rules.factors import lacking, lacks
from fedpeft.rules.fold import as_kept

SHORTEST = 1e-3
"""The least norm of a row of a: an even split would make a direction without energy zero in both factors for good."""


@dataclass(frozen=True, slots=True)
class FlexLoRA(FactorList):
    """The rank-R update nearest to the mean product, split evenly between the factors.

    form: "drift" adds the mean change of ΔW to what the server holds, and clients run frozen what they can't train;
    "full" is the paper's: clients go without the rest, and the mean of what they have trained replaces
    what the server held, so that energy in directions that only some clients hold fades, round after round.
    """

    form: Literal["drift", "full"] = "drift"

    @property
    @override
    def tells_factors(self) -> bool:
        return True

    @override
    def layout(self, task: Task) -> Layout:
        return task.spec.factors("ab") + task.spec.leaves + (lacks(task.spec) if self.form == "full" else Layout(()))

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        sent = update.at(task.spec).factors("ab", task.spec) | update.dense()
        return sent | lacking(update, task.spec) if self.form == "full" else sent

    @override
    def decode(self, encodings: Encodings, state: ServerState) -> ServerState:
        layers: dict[str, LowRank] = {}
        for i, layer in enumerate(state.task.spec.layers):
            held = state.adapter.layers[layer.name]
            product = _owned_product if self.form == "full" else mean_product
            left, right = product(encodings, layer, held)
            rng = np.random.default_rng([state.task.round, i])  # where the search begins; it ends in the same place
            layers[layer.name] = as_kept(_even(*top_svd(left, right, layer.rank, rng), layer), held)
        after = state.adapter.moved(mean(encodings, leaves(state)))
        return state.next(replace(after, layers=layers))

    @override
    def send(self, state: ServerState, rank: int) -> Broadcast:
        return (Rule if self.form == "full" else FactorList).send(self, state, rank)


def _owned_product(encodings: Encodings, layer: Layer, held: LowRank) -> tuple[Array, Array]:
    """Factors of the weighted mean of the clients' products, of the directions that each holds.

    With zeros times what the server held, so that the stack is never of a lower rank than its.
    """
    total = sum(weight for _, weight in encodings)
    lefts, rights = [np.zeros_like(held.b)], [held.a]
    for x, weight in encodings:
        owned = x[f"{layer.name}/lacks"] == 0
        lefts.append(weight / total * layer.scale * (held.b + x[f"{layer.name}/b"])[:, owned])
        rights.append((held.a + x[f"{layer.name}/a"])[owned])
    return np.hstack(lefts), np.vstack(rights)


def _even(u: Array, s: Array, vt: Array, layer: Layer) -> LowRank:
    length = np.sqrt(s / layer.scale).clip(SHORTEST)
    return LowRank(length[:, None] * vt, u * (s / (length * layer.scale)), layer.scale).pad(layer.rank)
