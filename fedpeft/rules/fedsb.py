"""Fed-SB: a small square core between frozen factors, which an SVD of the first federated gradient has chosen.

Sources: Singhal et al., arXiv:2502.15436, section 3 (the core, and its mean); Ponkshe et al., arXiv:2411.19557,
section 3 (LoRA-SB: the start from the SVD of the first step of full fine-tuning).
The paper takes that first step's gradient in one place. Here no d × k matrix leaves a client or is formed: two rounds
of sums find its directions, as a randomised SVD does. In round 0 clients train b against the random a that all share,
and the mean product's left directions become the next b; in round 1 they train a against it; the SVD of what comes
out, ``scale · b a = U S Vᵀ``, leaves b₀ = U and a₀ = Vᵀ frozen, and the core S/scale. What has been learnt stays.
From round 2 on only the core is trained.
Exact in every round, with any ranks: in each, clients train one factor of a product whose others all share.
Sent: R·d numbers a layer up in round 0, R·k in round 1, then R², and R² down: the factors travel once. A client of
rank r trains the first r rows and columns of the core and runs the rest of it frozen, so that all run the same model.
A server optimiser can't be used, nor answers to older rounds: the first rounds' means stand for something else.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from fedpeft.adapters import Array, Basis, Layer, Layout, LowRank, Tensors, Update, bases, cored, factored_svd, stack
from fedpeft.rules.base import Broadcast, MeanRule, ServerState, Task
from fedpeft.rules.fold import as_kept
from fedpeft.rules.frozen import frozen

START = ("b", "a")
"""What is trained in the rounds that find the directions of the first gradient."""


@dataclass(frozen=True, slots=True)
class FedSB(MeanRule):
    """Average the change of b, once; of a, once; and then that of the cores alone."""

    @property
    @override
    def tells_factors(self) -> bool:
        return True

    @property
    @override
    def fewest_rounds(self) -> int:
        return len(START) + 1

    @override
    def trains(self, task: Task) -> str:
        return START[task.round] if task.round < len(START) else "core"

    @override
    def layout(self, task: Task) -> Layout:
        if task.round < len(START):
            return task.spec.factors(self.trains(task)) + task.spec.leaves
        return Layout(tuple((f"{x.name}/core", (x.rank, x.rank)) for x in task.spec.layers)) + task.spec.leaves

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        if task.round < len(START):
            return update.factors(self.trains(task), task.spec) | update.dense()
        return {f"{n}/core": x for n, x in core_changes(update, task).items()} | update.dense()

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        if state.task.round == 0:
            after = state.adapter.moved(mean)
            layers = {x.name: _facing(after.layers[x.name], x) for x in state.task.spec.layers}
            return state.next(replace(after, layers=layers))
        if state.task.round < len(START):
            return _ready(state.next(state.adapter.moved(mean)))
        state = _ready(state)
        whole = bases(state.adapter)
        change = {n: x for n, x in mean.items() if n in state.adapter.dense}
        change |= {f"{n}/b": x.b(mean[f"{n}/core"][None]) for n, x in whole.items()}
        return state.next(state.adapter.moved(change))

    @override
    def send(self, state: ServerState, rank: int) -> Broadcast:
        if state.task.round < len(START):
            return frozen(state, rank)
        state = _ready(state)
        tail, mine, blocks = dict(state.tail), dict[str, Basis](), dict[str, Array]()
        for name, basis in bases(state.adapter).items():
            layer = state.adapter.layers[name]
            if rank >= layer.rank:
                continue
            [core] = basis.cores(layer.b)
            mine[name], blocks[name] = basis.only(np.arange(rank)[None]), core[None, :rank, :rank]
            rest = core.copy()
            rest[:rank, :rank] = 0
            if rest.any():
                other = basis.pair(rest[None], layer.scale)
                tail[name] = tail[name].join(other) if name in tail else other
        return Broadcast(state.task, cored(state.adapter, mine, blocks), tail)


def core_changes(update: Update, task: Task) -> dict[str, Array]:
    """What a client changed in the core (R, R) of each layer, in fp64; zero in what it has not trained."""
    held, change = bases(update.received), update.factors("b", task.spec)
    out: dict[str, Array] = {}
    for layer in task.spec.layers:
        if layer.name not in held:
            raise ValueError(
                f"{layer.name}: got a pair of factors; want a core, as the server sends it in round {task.round}"
            )
        basis = held[layer.name]
        whole = np.zeros((layer.rank, layer.rank))
        [at], [core] = basis.at, basis.cores(change[f"{layer.name}/b"][:, : basis.at.size])
        whole[np.ix_(at, at)] = core
        out[layer.name] = whole
    return out


def _facing(x: LowRank, layer: Layer) -> LowRank:
    """The same ΔW with orthonormal columns of b, those that it reaches first, and all singular values in a."""
    u, s, vt = factored_svd(*stack([(1.0, x)]))
    return as_kept(LowRank((s / layer.scale)[:, None] * vt, u, layer.scale).pad(layer.rank), x)


def singular(x: LowRank, at: NDArray[np.integer[Any]]) -> tuple[Basis, Array]:
    """A layer's singular directions, (h, r) of them at each core, and its cores (h, r, r): they are diagonal."""
    u, s, vt = factored_svd(*stack([(1.0, x)]))
    pair = as_kept(LowRank(vt, u, x.scale).pad(x.rank), x)
    values = np.zeros(x.rank)
    values[: len(s)] = s / x.scale
    return Basis(pair.b, pair.a, at), values[at][:, :, None] * np.eye(at.shape[1])


@lru_cache(maxsize=1)
def _ready(state: ServerState) -> ServerState:
    """The state with each layer in core form, on the directions of its SVD, if it is not yet; the same ΔW."""
    held, new, cores = bases(state.adapter), dict[str, Basis](), dict[str, Array]()
    for layer in state.task.spec.layers:
        if layer.name not in held:
            at = np.arange(layer.rank)[None]
            new[layer.name], cores[layer.name] = singular(state.adapter.layers[layer.name], at)
    return replace(state, adapter=cored(state.adapter, new, cores))
