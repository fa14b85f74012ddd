"""Which clients stand for all where there are many."""

from collections.abc import Sequence

from fedpeft.config import Experiment
from fedpeft.rounds import derive, draw


def panel(found: Experiment, clients: Sequence[int], round: int | None = None) -> tuple[int, ...]:
    """The clients to evaluate, ascending: all, or ``evaluation.sample`` of them, drawn by the run's seed.

    A draw is a round's own; without one, it is that of the end, which the baselines and the report share, so that they
    speak of the same clients.
    """
    path = () if round is None else (round,)
    if len(clients) <= found.evaluation.sample:
        return tuple(clients)
    return draw(clients, found.evaluation.sample, derive(found.seed, "evaluate", *path))
