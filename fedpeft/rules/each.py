"""What rules that see each client share: a client's factors and leaves, as changes, and sums of them."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import reduce
from typing import TypeAlias

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Array, Layer, Layout, LowRank, Tensors, Update
from fedpeft.rules.base import Broadcast, ListRule, ServerState, Task
from fedpeft.rules.frozen import frozen

Encodings: TypeAlias = Sequence[tuple[Tensors, float]]


class FactorList(ListRule):
    """A rule on the list of the clients' changes of both factors, zero-padded, and of the dense leaves.

    Up: R(d + k) a layer, zeros included; the server's memory grows with the cohort. Every client runs the same
    model: what it can't train, it runs frozen. So the server, which knows what was sent, can tell each
    client's change of ΔW from its factors. A client with another scale is converted to the server's.
    """

    @override
    def layout(self, task: Task) -> Layout:
        return task.spec.factors("ab") + task.spec.leaves

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        return update.at(task.spec).factors("ab", task.spec) | update.dense()

    @override
    def send(self, state: ServerState, rank: int) -> Broadcast:
        return frozen(state, rank)

    @abstractmethod
    @override
    def decode(self, encodings: Encodings, state: ServerState) -> ServerState: ...


def mean(encodings: Encodings, names: Sequence[str]) -> dict[str, Array]:
    """The weighted mean of these tensors."""
    total = sum(weight for _, weight in encodings)
    return {n: reduce(np.add, (w / total * x[n] for x, w in encodings)) for n in names}


def leaves(state: ServerState) -> list[str]:
    """The names of the dense leaves."""
    return [name for name, _ in state.task.spec.dense]


def mean_product(encodings: Encodings, layer: Layer, held: LowRank) -> tuple[Array, Array]:
    """Factors of the server's ΔW plus the weighted mean of the clients' changes of it: left (d, S), right (S, k), fp64.

    held: what the server has of this layer, b₀ and a₀. By ``ba − b₀a₀ = (b − b₀)a + b₀(a − a₀)``, S is the rank of
    ``held`` and the number of columns of b that the clients have moved; no digit is lost where little has changed.
    """
    total = sum(weight for _, weight in encodings)
    lefts, rights = [held.b], [held.a]
    for x, weight in encodings:
        a, b = x[f"{layer.name}/a"], x[f"{layer.name}/b"]
        moved = b.any(axis=0)
        lefts.append(weight / total * b[:, moved])
        rights.append((held.a + a)[moved])
        rights[0] = rights[0] + weight / total * a
    return layer.scale * np.hstack(lefts), np.vstack(rights)
