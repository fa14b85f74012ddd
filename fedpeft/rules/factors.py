"""Rules on the mean of factors: FedIT, FFA-LoRA, RoLoRA, FedSA-LoRA.

Sources: Zhang et al., arXiv:2305.05644, section 3 (FedIT); Sun et al., arXiv:2403.12313, section 4
(FFA-LoRA: a stays at its start); Chen et al., arXiv:2409.02346, algorithm 1 (RoLoRA: turn by turn,
b first); Guo et al., arXiv:2410.01463, section 4 (FedSA-LoRA: b stays on the client).
Exact, that is, the mean of the clients' ΔW, when one factor is trained and all clients hold the
same other one. With both trained, mean(b) @ mean(a) is not mean(b @ a): the error is the
covariance ``scale · Σ p (b − mean b)(a − mean a)``.
"""

from dataclasses import dataclass

from typing_extensions import override

from fedpeft.adapters import Layout, Spec, Tensors, Update
from fedpeft.rules.base import MeanRule, ServerState, Task


@dataclass(frozen=True, slots=True)
class FactorMean(MeanRule):
    """Average the change of the factors ``cycle[round % len(cycle)]``, and of the dense leaves.

    ("ab",) is FedIT, ("b",) FFA-LoRA, ("b", "a") RoLoRA; ("a",) with ``personalised`` is FedSA-LoRA.
    personalised: what is not averaged is trained too, and stays on the client, as do the dense leaves.
    """

    cycle: tuple[str, ...] = ("ab",)
    personalised: bool = False

    def __post_init__(self) -> None:
        if not self.cycle or not set(self.cycle) <= {"a", "b", "ab"}:
            raise ValueError(f"cycle: got {self.cycle}; want one or more of 'a', 'b', 'ab'")
        if self.personalised and len(self.cycle) != 1:
            raise ValueError(f"cycle: got {self.cycle}; want one entry where the other factor stays on the client")

    def sent(self, task: Task) -> str:
        """The factors that are averaged in this round."""
        return self.cycle[task.round % len(self.cycle)]

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
        return factors if self.personalised else factors + task.spec.leaves

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        factors = update.factors(self.sent(task), task.spec)
        return factors if self.personalised else factors | update.dense()

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        return state.next(state.adapter.moved(mean))
