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

from dataclasses import dataclass, replace

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Array, Layout, Spec, Tensors, Update
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
        return FACTORS[task.round % 2]

    @override
    def layout(self, task: Task) -> Layout:
        return task.spec.factors(self.trains(task)) + task.spec.leaves

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        if not task.spec.layers:  # they all stay on the client
            return update.dense()
        part = self.trains(task)
        change = update.factors(part, task.spec)
        allowed = sum(min(int(task.shared["rank"][0]), x.rank) for x in task.spec.layers)
        scores = np.concatenate([_scores(update, x.name, part, change[f"{x.name}/{part}"]) for x in task.spec.layers])
        chosen = np.zeros(len(scores), bool)
        chosen[np.argsort(-scores)[:allowed]] = True
        for x, mine in zip(task.spec.layers, _split(chosen, task.spec), strict=True):
            name = f"{x.name}/{part}"
            change[name] = change[name] * (mine[:, None] if part == "a" else mine)
        return change | update.dense()

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        return state.next(state.adapter.moved(mean))

    @override
    def send(self, state: ServerState, rank: int) -> Broadcast:
        """The whole adapter, whatever the rank, which is told."""
        most = max((x.rank for x in state.task.spec.layers), default=0)
        kind = next((x.a.dtype for x in state.adapter.layers.values()), np.dtype(np.float32))
        shared = {"rank": np.array([min(rank, most)], kind)}
        return Broadcast(replace(state.task, shared=shared), state.adapter, state.tail)


def _scores(update: Update, name: str, part: str, change: Array) -> Array:
    """How far each direction of a layer has moved its ΔW, (r,), in Frobenius norm."""
    held = update.received.layers[name]
    other = np.linalg.norm(held.a, axis=1) if part == "b" else np.linalg.norm(held.b, axis=0)
    moved = np.linalg.norm(change, axis=0 if part == "b" else 1)
    return np.asarray(abs(held.scale) * moved * other)


def _split(chosen: Array, spec: Spec) -> list[Array]:
    return np.split(chosen, np.cumsum([x.rank for x in spec.layers])[:-1])
