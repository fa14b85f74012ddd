"""Rules on the mean of factors: FedIT, FFA-LoRA, RoLoRA, FedSA-LoRA, RBLA.

Sources: Zhang et al., arXiv:2305.05644, section 3 (FedIT); Sun et al., arXiv:2403.12313, section 4
(FFA-LoRA: a stays at its start); Chen et al., arXiv:2409.02346, algorithm 1 (RoLoRA: turn by turn,
b first); Guo et al., arXiv:2410.01463, section 4 (FedSA-LoRA: b stays on the client); Chen et al.,
arXiv:2408.08699 (RBLA: each direction's mean is over those who hold it).
Exact, that is, the mean of the clients' ΔW, when one factor is trained and all clients hold the
same other one. With both trained, mean(b) @ mean(a) is not mean(b @ a): the error is the
covariance ``scale · Σ p (b − mean b)(a − mean a)``.
Sent: r(d + k) numbers a layer for both factors, r·d for b, r·k for a, with r the server's rank, both up and, for what
changes, down. With ranks that differ a client's change is zero where it holds no direction.
"""

from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Array, Layout, Spec, Tensors, Update
from fedpeft.rules.base import Broadcast, MeanRule, Rule, ServerState, Task
from fedpeft.rules.frozen import Rest, frozen


@dataclass(frozen=True, slots=True)
class FactorMean(MeanRule):
    """Average the change of the factors ``cycle[round % len(cycle)]``, and of the dense leaves.

    ("ab",) is FedIT, ("b",) FFA-LoRA, ("b", "a") RoLoRA; ("a",) with ``personalised`` is FedSA-LoRA.
    personalised: what is not averaged is trained too, and stays on the client, as do the dense leaves.
    owners: divide each direction's sum by the weight of the clients that hold it, and not by that of all: so the
    directions that few hold move as far as the others, and the mean is no longer exact. RBLA is this with
    ("ab",) and the rest dropped. rest: what clients of a lower rank do with the directions behind theirs;
    a personalised rule drops them.
    """

    cycle: tuple[str, ...] = ("ab",)
    personalised: bool = False
    owners: bool = False
    rest: Rest = "frozen"

    def __post_init__(self) -> None:
        if not self.cycle or not set(self.cycle) <= {"a", "b", "ab"}:
            raise ValueError(f"cycle: got {self.cycle}; want one or more of 'a', 'b', 'ab'")
        if self.personalised and len(self.cycle) != 1:
            raise ValueError(f"cycle: got {self.cycle}; want one entry where the other factor stays on the client")

    def sent(self, task: Task) -> str:
        """The factors that are averaged in this round."""
        return self.cycle[task.round % len(self.cycle)]

    @property
    @override
    def tells_factors(self) -> bool:
        return self.cycle != ("ab",) or self.owners

    @property
    @override
    def is_change(self) -> bool:
        return not self.owners

    @override
    def trains(self, task: Task) -> str:
        return "ab" if self.personalised else self.sent(task)

    @override
    def personal(self, spec: Spec) -> frozenset[str]:
        if not self.personalised:
            return frozenset()
        return self.constant(spec)

    @override
    def constant(self, spec: Spec) -> frozenset[str]:
        changing = set().union(*self.cycle)
        factors = {f"{layer.name}/{part}" for layer in spec.layers for part in "ab" if part not in changing}
        return frozenset(factors | {name for name, _ in spec.dense if self.personalised})

    @override
    def layout(self, task: Task) -> Layout:
        factors = task.spec.factors(self.sent(task))
        if self.owners:
            factors = factors + lacks(task.spec)
        return factors if self.personalised else factors + task.spec.leaves

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        factors = update.factors(self.sent(task), task.spec)
        if self.owners:
            factors |= lacking(update, task.spec)
        return factors if self.personalised else factors | update.dense()

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        change = dict(mean)
        for layer in state.task.spec.layers if self.owners else ():
            held = 1 - change.pop(f"{layer.name}/lacks")
            share = np.divide(1, held, out=np.zeros_like(held), where=held > ROUNDING)
            for part in self.sent(state.task):
                name = f"{layer.name}/{part}"
                change[name] = change[name] * (share[:, None] if part == "a" else share)
        return state.next(state.adapter.moved(change))

    @override
    def send(self, state: ServerState, rank: int) -> Broadcast:
        if self.rest == "dropped" or self.personalised:
            return Rule.send(self, state, rank)
        return frozen(state, rank)


ROUNDING = 2**-30
"""A share of holders up to this is a sum's rounding: nobody holds the direction."""


def lacks(spec: Spec) -> Layout:
    """Layout of what says which directions a client does not hold, one number each: "layer/lacks"."""
    return Layout(tuple((f"{x.name}/lacks", (x.rank,)) for x in spec.layers))


def lacking(update: Update, spec: Spec) -> dict[str, Array]:
    """1 for each direction of the server's that the client does not hold, so that one of full rank adds nothing."""
    held = {x.name: update.received.layers[x.name].rank for x in spec.layers}
    return {f"{x.name}/lacks": (np.arange(x.rank) >= held[x.name]).astype(np.float64) for x in spec.layers}
