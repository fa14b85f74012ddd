"""Secure aggregation by masks that cancel: among everyone (``full``), or among neighbours on a ring (``kregular``)."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from typing_extensions import override

from fedpeft.secagg.client import Client
from fedpeft.secagg.degrees import Degrees, degrees
from fedpeft.secagg.identity import Identity
from fedpeft.secagg.params import Params
from fedpeft.secagg.protocol import Protocol, SecurityLabel
from fedpeft.secagg.roster import Roster
from fedpeft.secagg.server import Session
from fedpeft.secagg.terms import LEAST_COHORT, Expected, History, Policy

_SMALLEST_RING: Final = 50
_LEAST_HONEST: Final = 2  # of t who stay: what t - 1 conspire about is the one vector they lack
_FINEST: Final = 10_000  # so that 2/3 as a float is two thirds
_HIDES: Final = "each client's vector, weight and metrics: the server learns their sum over those who stay"
_TRUSTS: Final = (
    "the roster's admins, not to sign for clients that somebody made up",
    "each client's own machine, with its keys",
)
_MISSES: Final = (
    "what the sum itself says of each client: only noise hides that",
    "clients that send false vectors, or stop a round by dealing bad shares (they are named)",
    "who takes part, and when",
    "a server that picks its cohort to have more corrupt clients in it: that takes clients' policies (min_cohort)",
    "a model, or settings, the same for all and made so that hardly anyone but one client learns something",
)


class _Masked(Protocol):
    """What the protocols with pairwise masks share. consistency: whether survivors are agreed on before shares are
    given out."""

    consistency: bool

    @property
    @override
    def is_consistent(self) -> bool:
        return self.consistency

    @override
    def questions(self, passes: int) -> tuple[str, ...]:
        each = ("vectors", "survivors", "unmask") if self.consistency else ("vectors", "unmask")
        return ("keys", "shares", *each * passes)


@dataclass(frozen=True, slots=True)
class Full(_Masked):
    """Everyone shares masks with everyone, against a server that may do anything. Bonawitz et al., CCS 2017.

    fraction: more than this share of a cohort must stay to the end, at least 1/2. consistency: whether survivors are
    agreed on before shares are given out. With it, and a threshold of t in a cohort of n, 2t - n - 1 clients may
    conspire with the server; without it the server must keep to the protocol, and t - 1 may tell it all they know. In
    either case two honest ones must be among the t that may be all who stay.
    """

    fraction: float = 2 / 3
    consistency: bool = True

    def __post_init__(self) -> None:
        if not 0.5 <= self.fraction < 1:
            raise ValueError(f"fraction: got {self.fraction}; want at least 1/2 and less than 1")

    @override
    def threshold(self, cohort: int) -> int:
        if cohort < LEAST_COHORT:
            raise ValueError(f"cohort: got {cohort} clients; want at least {LEAST_COHORT}")
        return math.floor(Fraction(self.fraction).limit_denominator(_FINEST) * cohort) + 1

    @override
    def degree(self, cohort: int) -> int:
        return cohort - 1

    @override
    def label(self, cohort: int) -> SecurityLabel:
        t = self.threshold(cohort)
        corrupt = min(2 * t - cohort - 1 if self.consistency else t - 1, t - _LEAST_HONEST)
        return _label("full", self.consistency, corrupt / cohort, 1 - t / cohort)

    @override
    def client(self, me: Identity, roster: Roster, policy: Policy, history: History, expected: Expected) -> Client:
        return Client("full", me, roster, policy, history, expected)

    @override
    def server(self, params: Params, roster: Roster) -> Session:
        return _session("full", params, roster)


@dataclass(frozen=True, slots=True)
class KRegular(_Masked):
    """Each shares masks with some neighbours, for cohorts so large that masks with everyone take too long.

    The server is trusted to keep to the protocol: one that leaves out clients until the ring suits it could isolate
    one. corrupt, dropouts: the shares of a cohort that may be corrupt, or lost; but for 2^-sigma it is safe then, and
    but for 2^-eta it finishes. consistency: whether survivors are agreed on before shares are given out, which takes
    more neighbours, so that a server which tells clients different things does not get both kinds of shares of one.
    Source: Bell et al., CCS 2020.
    """

    corrupt: float = 0.1
    dropouts: float = 0.1
    sigma: int = 40
    eta: int = 30
    consistency: bool = True

    def __post_init__(self) -> None:
        for key, got in (("corrupt", self.corrupt), ("dropouts", self.dropouts)):
            if not 0 <= got < 1:
                raise ValueError(f"{key}: got {got}; want at least 0 and less than 1")
        for key, bits in (("sigma", self.sigma), ("eta", self.eta)):
            if bits < 1:
                raise ValueError(f"{key}: got {bits}; want at least 1")

    @override
    def threshold(self, cohort: int) -> int:
        return self._degrees(cohort).largest_threshold

    @override
    def degree(self, cohort: int) -> int:
        return self._degrees(cohort).k

    @override
    def label(self, cohort: int) -> SecurityLabel:
        return _label("kregular", False, self.corrupt, self.dropouts)

    @override
    def client(self, me: Identity, roster: Roster, policy: Policy, history: History, expected: Expected) -> Client:
        return Client("kregular", me, roster, policy, history, expected)

    @override
    def server(self, params: Params, roster: Roster) -> Session:
        return _session("kregular", params, roster)

    def _degrees(self, cohort: int) -> Degrees:
        if cohort < _SMALLEST_RING:
            raise ValueError(
                f"cohort: got {cohort} clients; kregular wants at least {_SMALLEST_RING}, as it counts on few of a "
                f"client's neighbours being corrupt: use full"
            )
        return degrees(cohort, self.corrupt, self.dropouts, self.consistency, self.sigma, self.eta)


def _label(name: str, is_malicious: bool, corrupt: float, dropouts: float) -> SecurityLabel:
    server = (
        "nobody with the server: it may do anything"
        if is_malicious
        else "the server, to keep to the protocol: one that lies about who stayed, or leaves clients out to suit it, "
        "can learn single vectors"
    )
    others = f"all but {corrupt:.0%} of the clients, not to conspire with the server"
    return SecurityLabel(name, _HIDES, (server, others, *_TRUSTS), corrupt, dropouts, _MISSES)


def _session(suite: str, params: Params, roster: Roster) -> Session:
    if params.suite != suite:
        raise ValueError(f"params.suite: got {params.suite!r}; want {suite!r}")
    return Session(params, roster)
