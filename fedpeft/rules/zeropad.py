"""The mean of factors that are padded with zeros: what comes first to mind where clients differ in rank.

Source: Cho et al., arXiv:2401.06432, section 3 (as the baseline of HetLoRA).
Not exact, even between clients of one rank: it misses FedIT's covariance. And with ranks that differ it has a defect,
for which it is here: a zero is no opinion, but is averaged as one, so each direction shrinks every round by the weight
of the clients that lack it, whether anybody trains or not ("rank collapse"). ``fedit`` averages changes and has not.
Sent: r(d + k) + r numbers a layer up, r_k(d + k) down. It needs nothing but the mean.
"""

from dataclasses import dataclass

from typing_extensions import override

from fedpeft.adapters import Layout, Tensors, Update
from fedpeft.rules.base import MeanRule, ServerState, Task
from fedpeft.rules.factors import lacking, lacks


@dataclass(frozen=True, slots=True)
class ZeroPad(MeanRule):
    """Average each client's factors with zeros in place of the directions that it does not hold."""

    @property
    @override
    def tells_factors(self) -> bool:
        return True

    @override
    def layout(self, task: Task) -> Layout:
        return task.spec.factors("ab") + lacks(task.spec) + task.spec.leaves

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        return update.factors("ab", task.spec) | lacking(update, task.spec) | update.dense()

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        change = dict(mean)
        for name, layer in state.adapter.layers.items():
            # What lacks it would add −a, for its zero against the server's a.
            share = change.pop(f"{name}/lacks")
            change[f"{name}/a"] = change[f"{name}/a"] - share[:, None] * layer.a
            change[f"{name}/b"] = change[f"{name}/b"] - share * layer.b
        return state.next(state.adapter.moved(change))
