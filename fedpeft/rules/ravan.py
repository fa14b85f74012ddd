"""RAVAN: several heads a layer, each a small core between frozen random directions, of which a client trains some.

Source: Raje et al., arXiv:2506.05568, section 3: ΔW is the sum of h products ``sᵢ Bᵢ Hᵢ Aᵢ``; bᵢ and aᵢ are drawn
once, orthogonal to those of the other heads, and stay; each client starts from the server's Hᵢ (zero at first) and
sᵢ = 1, trains both and sends ``sᵢ Hᵢ``; the server takes, head by head, the mean over those who trained it.
Exact, head by head, for those who trained it: where everybody trains every head it is the mean of the clients' ΔW.
Ranks may differ. A client of rank r_k trains ⌊r_k / r⌋ heads of r directions, at least one, in every layer, and runs
the others frozen. The paper lets each client choose at random, or by what it has trained; here they go round: with n
heads a client, the next n in the next round, so that none is left out where all clients are small, and the server
need not be told. A head whose clients weigh little moves as far as the others.
Sent: h(r² + 1) numbers a layer up, h·r² down, zeros included; the factors travel once. A server optimiser can't be
used, nor answers to older rounds: which heads have a mean changes from round to round.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from fedpeft.adapters import Array, Basis, Layer, Layout, Spec, Tensors, Update, bases, cored
from fedpeft.rules.base import Broadcast, MeanRule, ServerState, Task
from fedpeft.rules.factors import ROUNDING
from fedpeft.rules.fedsb import singular


@dataclass(frozen=True, slots=True)
class Ravan(MeanRule):
    """Average the change of each head's core over the clients that trained it.

    seed: of the frozen directions; heads: h, which divides a layer's rank into as many cores; where it is no divisor of
    the rank, the layer has their greatest common divisor of heads.
    An adapter that is not zero at the start, as LoRA's is, has its singular directions in place of random ones.
    """

    seed: int
    heads: int = 4

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ValueError(f"heads: got {self.heads}; want at least 1")

    @property
    @override
    def tells_factors(self) -> bool:
        return True

    @property
    @override
    def hides_ranks(self) -> bool:
        return self.heads == 1  # of which everybody trains all

    @override
    def trains(self, task: Task) -> str:
        return "heads"

    @override
    def layout(self, task: Task) -> Layout:
        sizes = {x.name: self.sizes(x) for x in task.spec.layers}
        cores = tuple((f"{n}/core", (h, r, r)) for n, (h, r) in sizes.items())
        return Layout(cores + tuple((f"{n}/lacks", (h,)) for n, (h, _) in sizes.items())) + task.spec.leaves

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        held, change = bases(update.received), update.factors("b", task.spec)
        out = update.dense()
        for layer in task.spec.layers:
            heads, width = self.sizes(layer)
            if layer.name not in held or held[layer.name].at.shape[1] != width:
                raise ValueError(
                    f"{layer.name}: got no heads of {width} directions; want them as the server sends them"
                )
            basis = held[layer.name]
            mine = basis.at.min(axis=1) // width
            cores, lacks = np.zeros((heads, width, width)), np.ones(heads)
            cores[mine] = basis.cores(change[f"{layer.name}/b"][:, : basis.at.size])
            lacks[mine] = 0
            out |= {f"{layer.name}/core": cores, f"{layer.name}/lacks": lacks}
        return out

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        state = _ready(state, self)
        change = {n: x for n, x in mean.items() if n in state.adapter.dense}
        for name, basis in bases(state.adapter).items():
            held = 1 - mean[f"{name}/lacks"]
            share = np.divide(1, held, out=np.zeros_like(held), where=held > ROUNDING)
            change[f"{name}/b"] = basis.b(share[:, None, None] * mean[f"{name}/core"])
        return state.next(state.adapter.moved(change))

    @override
    def send(self, state: ServerState, rank: int) -> Broadcast:
        state = _ready(state, self)
        tail, mine, blocks = dict(state.tail), dict[str, Basis](), dict[str, Array]()
        for name, basis in bases(state.adapter).items():
            layer, (heads, width) = state.adapter.layers[name], basis.at.shape
            count = _count(heads, width, rank)
            if count == heads:
                continue
            is_mine = np.isin(np.arange(heads), (state.task.round * count + np.arange(count)) % heads)
            cores = basis.cores(layer.b)
            mine[name], blocks[name] = basis.only(basis.at[is_mine]), cores[is_mine]
            if cores[~is_mine].any():
                other = basis.only(basis.at[~is_mine]).pair(cores[~is_mine], layer.scale)
                tail[name] = tail[name].join(other) if name in tail else other
        return Broadcast(state.task, cored(state.adapter, mine, blocks), tail)

    @override
    def is_for(self, sent: Broadcast, rank: int) -> bool:
        sizes = {x.name: self.sizes(x) for x in sent.task.spec.layers}
        return all(x.rank == _count(*sizes[n], rank) * sizes[n][1] for n, x in sent.adapter.layers.items())

    @override
    def is_nested(self, ranks: Collection[int], spec: Spec) -> bool:
        """Whether all who do not train every head train as many: then they train the same ones."""
        sizes = [self.sizes(x) for x in spec.layers]
        return all(len({_count(h, width, rank) for rank in ranks} - {h}) <= 1 for h, width in sizes)

    def sizes(self, layer: Layer) -> tuple[int, int]:
        """How many heads a layer has, and the directions of each."""
        heads = gcd(self.heads, layer.rank)
        return heads, layer.rank // heads


def _count(heads: int, width: int, rank: int) -> int:
    """How many heads of this width a client of this rank trains."""
    return min(heads, max(1, rank // width))


@lru_cache(maxsize=1)
def _ready(state: ServerState, rule: Ravan) -> ServerState:
    """The state with each layer in core form, if it is not yet; the same ΔW.

    On random directions where ΔW is zero, as LoRA begins; on its singular ones where it is not.
    """
    held, new, cores = bases(state.adapter), dict[str, Basis](), dict[str, Array]()
    for i, layer in enumerate(state.task.spec.layers):
        if layer.name in held:
            continue
        x, (heads, width) = state.adapter.layers[layer.name], rule.sizes(layer)
        at = np.arange(layer.rank).reshape(heads, width)
        if x.b.any():
            new[layer.name], cores[layer.name] = singular(x, at)
            continue
        rng = np.random.default_rng([rule.seed, i])
        left, right = (_directions(rng, size, at) for size in (layer.d, layer.k))
        new[layer.name] = Basis(left.astype(x.b.dtype), right.T.astype(x.a.dtype), at)
        cores[layer.name] = np.zeros((heads, width, width))
    return replace(state, adapter=cored(state.adapter, new, cores))


def _directions(rng: np.random.Generator, size: int, at: NDArray[np.integer[Any]]) -> Array:
    """Random orthonormal directions (size, R); where that is more than ``size``, those of each head by themselves."""
    if at.size <= size:
        return np.linalg.qr(rng.normal(size=(size, at.size)))[0]
    each = [np.linalg.qr(rng.normal(size=(size, at.shape[1])))[0] for _ in at]
    return np.hstack([np.pad(x, ((0, 0), (0, at.shape[1] - x.shape[1]))) for x in each])
