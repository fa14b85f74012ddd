"""The frozen tail: clients of every rank run the same model, and each moves as many directions as it can."""

from typing import Literal, TypeAlias

from fedpeft.rules.base import Broadcast, ServerState

Rest: TypeAlias = Literal["frozen", "dropped"]
"""What a client of a low rank does with the directions that it can't train: run them as they are, or go without."""


def frozen(state: ServerState, rank: int) -> Broadcast:
    """The first ``rank`` directions of each layer to train, and the rest in the tail.

    Down: all R(d + k) numbers of a layer whatever the client's rank, but for a rest that is zero, which does not
    travel. What a client can't train is not lost on it, and does not fade: with clients that drop the rest, a mean of
    what they hold shrinks each direction by the share of those who lack it, every round ("rank collapse").
    """
    tail = dict(state.tail)
    for name, layer in state.adapter.layers.items():
        rest = layer.rest(rank)
        if rest.b.any():
            tail[name] = tail[name].join(rest) if name in tail else rest
    return Broadcast(state.task, state.adapter.cut(rank), tail)
