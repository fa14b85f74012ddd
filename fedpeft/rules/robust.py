"""Rules that some broken or hostile clients can't move far: trimmed mean, Krum, multi-Krum.

Sources: Yin et al., arXiv:1803.01498, algorithm 1 (trimmed mean); Blanchard et al., NeurIPS 2017, arXiv:1703.02757,
section 3 (Krum) and section 6 (multi-Krum).
None is exact, nor meant to be; all count each client once, since a hostile one could claim any weight. Changes of both
factors are compared and averaged as numbers, so a client must hold the server's factors: it runs frozen what it can't
train, where its change is zero. Sent: R(d + k) numbers a layer up, as many down. The server sees each client.
Where data differ much between clients, they throw out the unusual with the hostile. So they do where ranks differ: to
a trimmed mean those zeros are the middle, and Krum finds the clients of the lowest rank nearest to one another, so that
directions which few clients train hardly move, or not at all. Give all clients one rank where these rules are to learn.
"""

from dataclasses import dataclass
from math import ceil, floor

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Array
from fedpeft.errors import ProtocolError
from fedpeft.rules.base import ServerState
from fedpeft.rules.each import Encodings, FactorList

ALMOST = 1e-9
"""What a share of a count of clients may be beside a whole number and be taken for it: 0.07 of 100 is 7, and not 8."""


def _check_share(share: float) -> None:
    if not 0 <= share < 0.5:
        raise ValueError(f"share: got {share}; want at least 0 and less than 0.5: no rule holds against a majority")


@dataclass(frozen=True, slots=True)
class TrimmedMean(FactorList):
    """Each number is the mean of what is left without this share of the smallest and of the largest, rounded up.

    share: of clients that may be hostile. With one or two clients nothing is left out.
    """

    share: float = 0.3

    def __post_init__(self) -> None:
        _check_share(self.share)

    @override
    def decode(self, encodings: Encodings, state: ServerState) -> ServerState:
        count = len(encodings)
        out = min(ceil(self.share * count - ALMOST), (count - 1) // 2)
        change = {}
        for name, _ in self.layout(state.task).shapes:
            ordered = np.sort([x[name] for x, _ in encodings], axis=0)
            change[name] = ordered[out : count - out].mean(axis=0)
        return state.next(state.adapter.moved(change))


@dataclass(frozen=True, slots=True)
class Krum(FactorList):
    """The change, or the mean of several, that is nearest to those around it.

    share: of clients that may be hostile, f of n rounded down. A client's score is the sum of its n − f − 2 smallest
    squared distances to others. many: average the n − f clients of the lowest scores (multi-Krum), and not take the
    lowest alone. Raises ProtocolError, which leaves the round out, where f is above 0 and n is not more than 2f + 2.
    """

    share: float = 0.3
    many: bool = False

    def __post_init__(self) -> None:
        _check_share(self.share)

    def hostile(self, count: int) -> int:
        """f: how many of so many clients may be hostile."""
        return floor(self.share * count + ALMOST)

    @override
    def decode(self, encodings: Encodings, state: ServerState) -> ServerState:
        layout = self.layout(state.task)
        count = len(encodings)
        hostile = self.hostile(count)
        if hostile and count <= 2 * hostile + 2:
            raise ProtocolError(
                f"too few answers for Krum: got {count}, of which {hostile} may be hostile (rule.share); "
                f"want more than {2 * hostile + 2}"
            )
        vectors = [layout.flatten(x) for x, _ in encodings]
        scores = _scores(vectors, count - hostile - 2)
        best = sorted(range(count), key=scores.__getitem__)[: count - hostile if self.many else 1]
        return state.next(state.adapter.moved(layout.unflatten(np.mean([vectors[i] for i in best], axis=0))))


def _scores(vectors: list[Array], neighbours: int) -> list[float]:
    distances = [[np.sum((x - y) ** 2) for y in vectors] for x in vectors]
    return [sum(sorted(row[:i] + row[i + 1 :])[:neighbours]) for i, row in enumerate(distances)]
