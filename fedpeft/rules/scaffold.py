"""SCAFFOLD: clients with different data step towards one optimum, by the mean of all their gradients.

Source: Karimireddy et al., arXiv:1910.06378, algorithm 1, with option II.
The server keeps c, each client c_i, the mean of the gradients that it had in the rounds it was in; all begin at zero.
Each step is along g + c − c_i, so that where all c_i are right it is along the mean of all clients' gradients, and
many steps between two rounds lead to the joint optimum, and not to a mean of everybody's own.

- Up: twice what the rule below it sends: its changes, and the change of c_i for each of these tensors. Both in one
  vector, so a clip or a bound on norms is of the two together; a channel's clip that bites leaves c behind the c_i.
  Down: c for each, beside the adapter.
- The client's mean gradient is (x − y) / travel. For plain SGD travel is K · lr; with momentum m, which starts at zero
  in every round, the gradient of step j of K counts (1 − m^(K−j+1)) / (1 − m) times as much, and so it does in this
  mean. A step's gradient is clipped (``training.clip``) before c − c_i is added, and decay and FedProx's term are part
  of it: c_i is the mean of what the client itself would step along. AdamW's steps are along no gradient: refused.
- c moves by (S/N) times the mean of the S clients' changes, of N in all. The paper's mean is of clients that count the
  same, ``weighting.name = "uniform"``, and then c is the mean of all c_i. With weights, where all clients take part,
  c is their weighted mean, which is what the weighted sum of losses asks for; where some do, it is near that as far as
  those who are drawn weigh as much as the others.
- A client keeps its c_i once it has answered. If the answer is too late, c lacks that change for good.
- A client of a low rank has no gradient, and no say in c, for directions that it can't train.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Adapter, Array, Layout, Shape, Spec, Tensors, Update
from fedpeft.rules.base import Broadcast, MeanRule, ServerState, Task
from fedpeft.rules.factors import FactorMean
from fedpeft.rules.frozen import Rest
from fedpeft.rules.objective import Objective

_CYCLES: Mapping[str, tuple[str, ...]] = {"fedit": ("ab",), "ffa": ("b",), "rolora": ("b", "a")}


@dataclass(frozen=True, slots=True)
class Scaffold(MeanRule):
    """A mean of factors' changes, with control variates for what it trains.

    of: the rule whose changes are averaged; with rolora a round moves the variates of the factor that it trains.
    rest: as in ``FactorMean``.
    """

    of: Literal["fedit", "ffa", "rolora"] = "fedit"
    rest: Rest = "frozen"

    @property
    def below(self) -> FactorMean:
        """The rule on the factors."""
        return FactorMean(_CYCLES[self.of], rest=self.rest)

    @property
    @override
    def tells_factors(self) -> bool:
        return self.below.tells_factors

    @property
    @override
    def needs_sgd(self) -> bool:
        return True

    @override
    def trains(self, task: Task) -> str:
        return self.below.trains(task)

    @override
    def constant(self, spec: Spec) -> frozenset[str]:
        return self.below.constant(spec)

    @override
    def layout(self, task: Task) -> Layout:
        moved = self.below.layout(task)
        return moved + Layout(tuple((f"control/{n}", shape) for n, shape in moved.shapes))

    @override
    def objective(self, task: Task, start: Adapter, own: Tensors) -> Objective:
        shift: dict[str, Array] = {}
        for name, x in start.tensors(self.trains(task)).items():
            key = f"control/{name}"
            if key in task.shared or key in own:
                shift[name] = _of(task.shared, key, x.shape) - _of(own, key, x.shape)
        return Objective(shift=shift)

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        return {**self.below.encode(update, task), **self._moves(update, task)}

    @override
    def keep(self, update: Update, task: Task, own: Tensors) -> Tensors:
        dtypes = {f"control/{n}": x.dtype for n, x in update.received.tensors().items()}
        moves = self._moves(update, task)
        return {**own, **{n: (own.get(n, 0.0) + x).astype(dtypes[n]) for n, x in moves.items()}}

    def _moves(self, update: Update, task: Task) -> dict[str, Array]:
        """How c_i changes: (x − y) / travel − c, zero in directions that the client doesn't hold."""
        if not update.travel > 0:
            raise ValueError(
                f"the way is {update.travel:g} of the gradients' sum: SCAFFOLD needs steps along gradients; "
                f'use training.optimiser = "sgd", and a trainer that says how far it went'
            )
        held = {n: x.shape for n, x in update.received.tensors().items()}
        moves: dict[str, Array] = {}
        for name, change in self.below.encode(update, task).items():
            control = np.zeros(change.shape)
            mine = tuple(map(slice, held[name]))
            control[mine] = _of(task.shared, f"control/{name}", held[name])
            moves[f"control/{name}"] = -change / update.travel - control
        return moves

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        moved, memory = dict(mean), dict(state.memory)
        dtypes = {n: x.dtype for n, x in state.adapter.tensors().items()}
        for name, dtype in dtypes.items():
            key = f"control/{name}"
            if key in moved:
                memory[key] = (memory.get(key, 0.0) + state.share * moved.pop(key)).astype(dtype)
        return self.below.decode(moved, replace(state, memory=memory))

    @override
    def send(self, state: ServerState, rank: int) -> Broadcast:
        sent = self.below.send(state, rank)
        shared = {n: state.memory[n] for n, _ in self.layout(state.task).shapes if n in state.memory}
        return replace(sent, task=replace(sent.task, shared=shared))


def _of(tensors: Tensors, key: str, shape: Shape) -> Array:
    """The part that a client with tensors of this shape holds, in fp64; zeros if there is none."""
    if key not in tensors:
        return np.zeros(shape)
    x: Array = tensors[key][tuple(map(slice, shape))].astype(np.float64)
    return x
