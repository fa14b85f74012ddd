"""The coordinate-wise median of the factors.  Source: Yin et al., arXiv:1803.01498, algorithm 1."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Layout, Tensors, Update
from fedpeft.rules.base import ListRule, ServerState, Task


@dataclass(frozen=True, slots=True)
class Median(ListRule):
    """Each number is the median over the clients, whatever their weights.

    The server holds every client's encoding at once, so its memory grows with the cohort.
    """

    @override
    def layout(self, task: Task) -> Layout:
        return task.spec.factors("ab") + task.spec.leaves

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        return update.factors("ab", task.spec) | update.dense()

    @override
    def decode(self, encodings: Sequence[tuple[Tensors, float]], state: ServerState) -> ServerState:
        names = [name for name, _ in self.layout(state.task).shapes]
        return state.next(state.adapter.moved({n: np.median([x[n] for x, _ in encodings], axis=0) for n in names}))
