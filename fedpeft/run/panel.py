"""Which clients stand for all where there are many."""

from collections.abc import Sequence

from fedpeft.config import Experiment
from fedpeft.rounds import derive, draw
from fedpeft.run.hostile import is_hostile


def panel(found: Experiment, clients: Sequence[int], round: int | None = None) -> tuple[int, ...]:
    """The clients to evaluate, ascending: those of the ``sample`` that are not hostile."""
    return tuple(x for x in sample(found, clients, round) if not is_hostile(found, x, len(clients)))


def sample(found: Experiment, clients: Sequence[int], round: int | None = None) -> tuple[int, ...]:
    """The clients that stand for all, ascending: all, or ``evaluation.sample`` of them, drawn by the run's seed.

    A draw is a round's own; without one, it is that of the end, which the baselines and the report share, so that they
    speak of the same clients.
    """
    path = () if round is None else (round,)
    if len(clients) <= found.evaluation.sample:
        return tuple(clients)
    return draw(clients, found.evaluation.sample, derive(found.seed, "evaluate", *path))
