"""LoRA-A²: the factors turn by turn, and each client sends the directions that matter most to it.

Source: Koo et al., arXiv:2410.22815 (ACL 2025), sections 4.1 and 4.2, equations 4 to 6. b is trained in even rounds
and a in odd ones, against the other that all share. Of all directions of all layers a client of rank r sends as many as
r in each layer would be, wherever they are: those of the largest ``scale·‖Δb_i‖·‖a_i‖``, or ``scale·‖b_i‖·‖Δa_i‖``,
which is how far each moves ΔW. The others' changes are zero.
Exact for what is sent: all hold the same other factor, and the mean is over all clients. Every client runs the whole
model, so small ones choose with the others, and not only among the first directions.
Unlike the paper, a client does not train one epoch to choose, start over and train what it chose: it chooses from the
change that it has made, in one training. So it trains all directions, whatever its rank: a rank is a limit of what is
sent, not of memory. The paper's learning rates, five times as high for b as for a, are not set here.
Sent: R·d or R·k numbers a layer up, of which a client's share is not zero, so that only compression makes it less and
no position tells the server who chose what; as many down. It needs nothing but the mean.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import DTypeLike
from typing_extensions import override

from fedpeft.adapters import Array, Layout, LowRank, Spec, Tensors, Update
from fedpeft.rules.base import Broadcast, MeanRule, ServerState, Task

FACTORS = "ba"
"""What is trained in even rounds, and in odd ones."""


@dataclass(frozen=True, slots=True)
class LoRAA2(MeanRule):
    """Average the change of b, then of a, each client's in as many directions as its rank allows."""

    @property
    @override
    def tells_factors(self) -> bool:
        return True

    @property
    @override
    def is_change(self) -> bool:
        return True

    @override
    def trains(self, task: Task) -> str:
        return FACTORS[task.round % len(FACTORS)]

    @override
    def layout(self, task: Task) -> Layout:
        return task.spec.factors(self.trains(task)) + task.spec.leaves

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        part = self.trains(task)
        change = update.factors(part, task.spec)
        [rank] = task.shared["rank"]
        allowed = sum(min(int(rank), x.rank) for x in task.spec.layers)
        each = Layout(tuple((x.name, (x.rank,)) for x in task.spec.layers))
        held = update.received.layers
        scores = each.flatten({n: _scores(held[n], part, change[f"{n}/{part}"]) for n, _ in each.shapes})
        chosen = np.zeros(len(scores))
        chosen[np.argsort(-scores)[:allowed]] = 1
        for n, mine in each.unflatten(chosen).items():
            name = f"{n}/{part}"
            change[name] = change[name] * (mine[:, None] if part == "a" else mine)
        return change | update.dense()

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        return state.next(state.adapter.moved(mean))

    @override
    def send(self, state: ServerState, rank: int) -> Broadcast:
        """The whole adapter, whatever the rank, which is told."""
        kind: DTypeLike = next((x.a.dtype for x in state.adapter.layers.values()), np.float32)
        shared = {"rank": np.array([min(rank, _most(state.task.spec))], kind)}
        return Broadcast(replace(state.task, shared=shared), state.adapter, state.tail)

    @override
    def is_for(self, sent: Broadcast, rank: int) -> bool:
        return np.array_equal(sent.task.shared["rank"], [min(rank, _most(sent.task.spec))])

    @override
    def is_nested(self, ranks: Collection[int], spec: Spec) -> bool:
        """Whether none has to leave directions out: each leaves out its own."""
        return min(ranks) >= _most(spec)


def _most(spec: Spec) -> int:
    return max((x.rank for x in spec.layers), default=0)


def _scores(held: LowRank, part: str, change: Array) -> Array:
    """How far each direction of a layer has moved its ΔW, (r,), in Frobenius norm."""
    other = np.linalg.norm(held.a, axis=1) if part == "b" else np.linalg.norm(held.b, axis=0)
    moved = np.linalg.norm(change, axis=0 if part == "b" else 1)
    scores: Array = abs(held.scale) * moved * other
    return scores
