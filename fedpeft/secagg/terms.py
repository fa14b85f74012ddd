"""What a client agrees to, and what it knows when it is asked."""

import math
from collections.abc import Container
from dataclasses import dataclass

from fedpeft.secagg.params import is_decimal

SUITES = ("full", "kregular", "twoserver")
LEAST_COHORT = 3  # of two, each knows the other's from the sum
_SLACK = 1e-9  # 0.3 · 10 is a little less than 3 in floats, and 3 is meant


@dataclass(frozen=True, slots=True)
class Policy:
    """What a client agrees to. It is in the client's own configuration and never comes from the server.

    min_cohort: clients that are asked, and that are in the sum at the end; min_threshold: of those who hold shares of a
    secret, more than this part must be left to the end; max_dropout: the part of a cohort that may be lost; min_slice:
    contributors to every coordinate that this client adds to; suites: protocols, by name; consistency: whether
    survivors must be agreed on, without which a server that tells each client another set learns single updates;
    max_rounds: of one run; bases, layouts: the frozen models and the digests of what is summed that are agreed to
    (where there are none, whatever the run's settings ask for); largest_range: of a coordinate; min_noise: the least
    noise multiplier that the server has to promise, as a decimal string; min_degree: others that each client shares
    masks with where the graph isn't full (6 is the least that the specification lists); min_alike: clients, this one
    among them, that are sent the same model. With 1, clients of another rank may be sent another model, since what is
    sent depends on the rank: a server that uses this to send the others one on which they learn nothing sees the sum
    of those of one rank (Pasquini et al., CCS 2022).
    """

    min_cohort: int = 5
    min_threshold: float = 2 / 3
    max_dropout: float = 0.4
    min_slice: int = 3
    suites: tuple[str, ...] = SUITES
    consistency: bool = True
    max_rounds: int | None = None
    bases: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    largest_range: float | None = None
    min_noise: str = "0"
    min_degree: int = 6
    min_alike: int = 1

    def __post_init__(self) -> None:
        for key, is_good, want in (
            ("min_cohort", self.min_cohort >= LEAST_COHORT, f"{LEAST_COHORT} or more: of two, each learns the other's"),
            ("min_threshold", 0 < self.min_threshold < 1, "more than 0 and less than 1"),
            ("max_dropout", 0 <= self.max_dropout < 1, "0 or more and less than 1"),
            ("min_slice", self.min_slice >= 1, "1 or more"),
            ("suites", len(self.suites) > 0, f"at least one, of {', '.join(SUITES)} or another package's"),
            ("max_rounds", self.max_rounds is None or self.max_rounds >= 1, "1 or more"),
            ("largest_range", self.largest_range is None or 0 < self.largest_range < math.inf, "more than 0"),
            ("min_noise", is_decimal(self.min_noise), 'a decimal string that is not negative, such as "0.8"'),
            ("min_degree", self.min_degree >= 1, "1 or more"),
            ("min_alike", self.min_alike >= 1, "1 or more"),
        ):
            if not is_good:
                raise ValueError(f"{key}: got {getattr(self, key)!r}; want {want}")

    def fewest(self, cohort: int) -> int:
        """How many of a cohort must be left, in each phase and in the sum."""
        return max(self.min_cohort, cohort - math.floor(self.max_dropout * cohort + _SLACK))

    def least_threshold(self, holders: int) -> int:
        """How many of those who hold shares of a secret it must take to rebuild it."""
        return math.floor(self.min_threshold * holders + _SLACK) + 1


@dataclass(frozen=True, slots=True)
class History:
    """What a client has done before in this run.

    sessions: those it has ever taken part in, in hex; last_round: the last that was completed (-1 for none); rounds:
    how many it has taken part in.
    """

    sessions: Container[str] = frozenset()
    last_round: int = -1
    rounds: int = 0


@dataclass(frozen=True, slots=True)
class Expected:
    """What a client works out for itself from the run's settings, in the words of ``Params``.

    range, clip, weighting are compared as numbers; bits, m: None where the settings leave them open; rank: the largest
    that this client trains (the server may ask for a lower one), None where the rule hides ranks; leaves: tensors of
    each pass that may have a range of their own, none where all share one.
    """

    layout_hash: str
    dims: tuple[int, ...]
    range: str
    clip: str
    bits: int | None
    weighting: str
    rank: int | None
    base: str
    m: int | None = None
    leaves: tuple[int, ...] = ()
