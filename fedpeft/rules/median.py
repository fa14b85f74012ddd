"""The coordinate-wise median of the factors.

Source: Yin et al., arXiv:1803.01498, algorithm 1. Not exact, nor meant to be. Sent: R(d + k) numbers a layer up, as
many down; the server sees each client. A client runs frozen what it can't train, and its change there is zero: a
direction that less than half of the clients train has the median zero, and never moves.
"""

from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from fedpeft.rules.base import ServerState
from fedpeft.rules.each import Encodings, FactorList


@dataclass(frozen=True, slots=True)
class Median(FactorList):
    """Each number is the median over the clients, whatever their weights.

    The server holds every client's encoding at once, so its memory grows with the cohort.
    """

    @override
    def decode(self, encodings: Encodings, state: ServerState) -> ServerState:
        names = [name for name, _ in self.layout(state.task).shapes]
        return state.next(state.adapter.moved({n: np.median([x[n] for x, _ in encodings], axis=0) for n in names}))
