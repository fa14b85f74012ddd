"""Who takes part in a round, and when enough of them have answered."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from fedpeft.rounds.seeds import derive


@dataclass(frozen=True, slots=True)
class Selection:
    """A cohort is ``count`` clients, or else a ``fraction`` of all, drawn anew each round without replacement.

    over: the share asked on top, so that a round can close once the wanted number has answered;
    quorum: the share of the wanted number without whose answers the round fails; deadline: seconds
    after which a pass closes with what it has. A fraction is rounded to the nearest whole client,
    the shares are rounded up.
    """

    fraction: float = 1.0
    count: int | None = None
    over: float = 0.0
    quorum: float = 0.5
    deadline: float = 3600.0

    def __post_init__(self) -> None:
        for key, good, want in (
            ("fraction", 0 < self.fraction <= 1, "more than 0 and at most 1"),
            ("count", self.count is None or self.count >= 1, "at least 1"),
            ("over", self.over >= 0, "0 or more"),
            ("quorum", 0 < self.quorum <= 1, "more than 0 and at most 1"),
            ("deadline", self.deadline > 0, "more than 0 seconds"),
        ):
            if not good:
                raise ValueError(f"{key}: got {getattr(self, key)}; want {want}")

    def wanted(self, clients: int) -> int:
        """How many answers a round wants, of this many clients."""
        return min(clients, self.count) if self.count is not None else max(1, round(self.fraction * clients))

    def least(self, clients: int) -> int:
        """How many answers a round can't do without."""
        return max(1, _up(self.quorum * self.wanted(clients)))

    def choose(self, clients: Sequence[int], seed: int, round: int) -> tuple[int, ...]:
        """The cohort of a round, ascending: it depends on the clients' numbers, the seed and the round alone."""
        asked = min(len(clients), _up(self.wanted(len(clients)) * (1 + self.over)))
        rng = np.random.default_rng(derive(seed, "select", round))
        return tuple(sorted(int(x) for x in rng.choice(sorted(clients), size=asked, replace=False)))


def _up(x: float) -> int:
    """x rounded up, where 10 · (1 + 0.1) is 11 and not the 12 that its last bit would make of it."""
    return ceil(x - 1e-9)
