"""Which clients' next batches go into one pass: those of like length, and nobody left behind."""

from collections.abc import Sequence
from typing import NamedTuple


class Turn(NamedTuple):
    """What a client would bring to a pass: tokens of its longest row, rows, and how many passes it still needs."""

    length: int
    rows: int
    left: int


def choose(turns: Sequence[Turn], most: int) -> list[int]:
    """The indices of the clients that go into the next pass: all, or ``most`` of them.

    Clients are independent, so one may be steps ahead of another. The one with the most passes left is always
    among the chosen, so that no client is left to train alone at the end; the others are those around it in order
    of length and rows, where the padding is least. The same turns give the same choice.
    """
    if most < 1:
        raise ValueError(f"most: got {most}; want at least 1")
    order = sorted(range(len(turns)), key=lambda i: (turns[i].length, turns[i].rows, -turns[i].left, i))
    if len(order) <= most:
        return order
    behind = max(turns[i].left for i in order)
    here = next(at for at, i in enumerate(order) if turns[i].left == behind)
    starts = range(max(0, here - most + 1), min(here, len(order) - most) + 1)
    best = min(starts, key=lambda s: (_cost([turns[i] for i in order[s : s + most]]), s))
    return order[best : best + most]


def _cost(some: Sequence[Turn]) -> int:
    """Tokens that the pass computes, beyond those that its rows have."""
    area = len(some) * max(x.length for x in some) * max(x.rows for x in some)
    return area - sum(x.length * x.rows for x in some)
