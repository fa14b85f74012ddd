"""HetLoRA: zero-padded factors, weighted by the size of each client's ΔW.

Source: Cho et al., arXiv:2401.06432, section 4 and algorithm 1.
Not exact, and directions that few clients hold shrink as in ``zeropad``, though more slowly: who holds many directions
has a larger ΔW. Sent: r(d + k) + r numbers a layer up, r_k(d + k) down. It needs nothing but the mean: a client
multiplies its change by its own norm, and sends the norm beside each direction that it holds. So a clip on what
it sends makes it count less, and does not bound what it does.
A client may claim any norm: only ``channel.largest_norm`` bounds what it makes of it.
The paper weighs by these norms alone, which is ``weighting.name = "uniform"`` here; others multiply them.
Self-pruning: a client of rank r adds λ · Σ ‖b[:, cut:]‖ · ‖a[cut:]‖ over the layers to its loss, with cut = ⌊gamma·r⌋.
Where training has made this term of a layer smaller it leaves the tail out, keeps the rank that is left, and begins
with that one whenever it is asked again, so that its rank never grows. The server is not told, and sends the full rank
all the same. In the first round b is zero, and the term with it: nothing is cut.
"""

from dataclasses import dataclass, replace
from math import floor, isfinite
from typing import Any

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Adapter, Layout, LowRank, Tensors, Update
from fedpeft.rules.base import MeanRule, ServerState, Task
from fedpeft.rules.objective import Objective
from fedpeft.rules.robust import ALMOST


@dataclass(frozen=True, slots=True)
class HetLoRA(MeanRule):
    """Average factors with weights ‖ΔW‖, layer by layer; no client that lacks a direction has a say but zero.

    gamma: a client of rank r leaves out all but the first ⌊gamma · r⌋ directions (and at least one) of a layer whose
    last ones, measured by ‖b‖·‖a‖, have shrunk in training; 1 never does. penalty: λ; 0 leaves the loss as it is.
    """

    gamma: float = 0.99
    penalty: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma: got {self.gamma}; want more than 0 and at most 1")
        if not (isfinite(self.penalty) and self.penalty >= 0):
            raise ValueError(f"penalty: got {self.penalty}; want 0 or more")

    @property
    @override
    def tells_factors(self) -> bool:
        return True

    @override
    def objective(self, task: Task, start: Adapter, own: Tensors) -> Objective:
        cuts = {n: self._cut(x.rank) for n, x in start.layers.items()}
        return Objective(self.penalty, {n: cut for n, cut in cuts.items() if cut < start.layers[n].rank})

    @override
    def begin(self, received: Adapter, own: Tensors) -> Adapter:
        ranks = {n: int(own.get(f"{n}/rank", x.rank)) for n, x in received.layers.items()}
        return replace(received, layers={n: x.cut(ranks[n]) for n, x in received.layers.items()})

    @override
    def keep(self, update: Update, task: Task, own: Tensors) -> Tensors:
        left = {x.name: self._kept(update, x.name) for x in task.spec.layers}
        cut = {f"{n}/rank": np.array(r, np.float64) for n, r in left.items() if r < update.received.layers[n].rank}
        return {**own, **cut}

    @override
    def layout(self, task: Task) -> Layout:
        norms = Layout(tuple((f"{x.name}/norm", (x.rank,)) for x in task.spec.layers))
        return task.spec.factors("ab") + norms + task.spec.leaves

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        out = update.factors("ab", task.spec)
        for x in task.spec.layers:
            rank = self._kept(update, x.name)
            norm = update.trained.layers[x.name].cut(rank).norm
            weights = np.where(np.arange(x.rank) < rank, norm, 0.0)
            out[f"{x.name}/a"] = out[f"{x.name}/a"] * weights[:, None]
            out[f"{x.name}/b"] = out[f"{x.name}/b"] * weights
            out[f"{x.name}/norm"] = weights
        return out | update.dense()

    def _kept(self, update: Update, name: str) -> int:
        new, old = update.trained.layers[name], update.received.layers[name]
        rank = self._cut(new.rank)
        return rank if _size(new.rest(rank)) < _size(old.rest(rank)) else new.rank

    def _cut(self, rank: int) -> int:
        """Where the tail of a layer of this rank begins."""
        return max(1, floor(self.gamma * rank + ALMOST))

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        change = dict(mean)
        for name, layer in state.adapter.layers.items():
            norms = change.pop(f"{name}/norm")
            total = norms[0]  # every client holds the first direction
            if not total > 0:  # nobody's ΔW is more than zero: nothing says what counts
                change[f"{name}/a"], change[f"{name}/b"] = np.zeros(layer.a.shape), np.zeros(layer.b.shape)
                continue
            lacked = 1 - norms / total
            change[f"{name}/a"] = change[f"{name}/a"] / total - lacked[:, None] * layer.a
            change[f"{name}/b"] = change[f"{name}/b"] / total - lacked * layer.b
        return state.next(state.adapter.moved(change))


def _size(last: LowRank) -> np.floating[Any]:
    a, b = last.a.astype(np.float64), last.b.astype(np.float64)
    return np.linalg.norm(b) * np.linalg.norm(a)
