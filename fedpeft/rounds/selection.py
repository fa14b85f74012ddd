"""Who takes part in a round, and when enough of them have answered."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from fedpeft.rounds.seeds import derive


@dataclass(frozen=True, slots=True)
class Selection:
    """A cohort is ``count`` clients, or else a ``fraction`` of all, drawn anew each round without replacement.

    over: the share asked on top, so that a round can close once the wanted number has answered;
    quorum: the share of the wanted number without whose answers the round fails; deadline: seconds
    after which a pass closes with what it has; rest: for how many rounds a client is not asked again. A
    fraction is rounded to the nearest whole client, the shares are rounded up.
    """

    fraction: float = 1.0
    count: int | None = None
    over: float = 0.0
    quorum: float = 0.5
    deadline: float = 3600.0
    rest: int = 0

    def __post_init__(self) -> None:
        for key, good, want in (
            ("fraction", 0 < self.fraction <= 1, "more than 0 and at most 1"),
            ("count", self.count is None or self.count >= 1, "at least 1"),
            ("over", self.over >= 0, "0 or more"),
            ("quorum", 0 < self.quorum <= 1, "more than 0 and at most 1"),
            ("deadline", self.deadline > 0, "more than 0 seconds"),
            ("rest", self.rest >= 0, "0 or more rounds"),
        ):
            if not good:
                raise ValueError(f"{key}: got {getattr(self, key)}; want {want}")

    def wanted(self, clients: int) -> int:
        """How many answers a round wants, of this many clients."""
        return min(clients, self.count) if self.count is not None else max(1, round(self.fraction * clients))

    def least(self, clients: int) -> int:
        """How many answers a round can't do without."""
        return max(1, _up(self.quorum * self.wanted(clients)))

    def choose(
        self,
        clients: Sequence[int],
        seed: int,
        round: int,
        known: int | None = None,
        resting: Collection[int] = (),
    ) -> tuple[int, ...]:
        """The cohort of a round, ascending: it depends on the clients' numbers, the seed and the round alone.

        clients: who can be asked now; known: how many clients there are in all, of whom a fraction is meant (as many
        as can be asked, if not given); resting: who is not to be asked, so that fewer are asked where too few others
        are left. Memory and time don't grow with the clients where they are an ascending range.
        """
        wanted = _up(self.wanted(len(clients) if known is None else known) * (1 + self.over))
        return draw(clients, wanted, derive(seed, "select", round), resting)


def draw(clients: Sequence[int], size: int, seed: int, without: Collection[int] = ()) -> tuple[int, ...]:
    """``size`` of the clients but for those ``without``, or all if they are fewer; ascending.

    They are drawn uniformly without replacement. Where the clients are an ascending range, this takes no more than a
    few times the memory of what is drawn.
    """
    pool = clients if isinstance(clients, range) and clients.step > 0 else sorted(clients)
    places = ((bisect_left(pool, x), x) for x in sorted(set(without)))
    taken = [place for place, x in places if place < len(pool) and pool[place] == x]
    left = len(pool) - len(taken)
    drawn = np.random.default_rng(seed).choice(left, size=min(left, size), replace=False)
    return tuple(sorted(int(pool[_past(int(place), taken)]) for place in drawn))


def _past(place: int, taken: Sequence[int]) -> int:
    """The place among all of what has this place among those that aren't taken. taken: places among all, ascending."""
    # taken[i] - i counts the places before it that are free: it never falls.
    return place + bisect_right(range(len(taken)), place, key=lambda i: taken[i] - i)


def _up(x: float) -> int:
    """x rounded up, where 10 · (1 + 0.1) is 11 and not the 12 that its last bit would make of it."""
    return ceil(x - 1e-9)
