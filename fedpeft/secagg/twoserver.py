"""One message a pass, for two servers that must not be in league: ``twoserver``.

A client masks its vector with the stream of a fresh seed, and seals the seed to a helper. The server adds up the masked
vectors, the helper the masks of the same clients; the difference is the sum. So any number of clients may be lost at
any time, and none is asked twice in a pass.
Source: suite FP-SA-1, two servers; the pattern is that of Prio (Corrigan-Gibbs, Boneh, NSDI 2017) for plain sums.
"""

from dataclasses import dataclass
from typing import Final

from typing_extensions import override

from fedpeft.secagg.collector import Collector
from fedpeft.secagg.identity import Identity, is_id
from fedpeft.secagg.params import Params
from fedpeft.secagg.protocol import Protocol, SecurityLabel
from fedpeft.secagg.roster import Roster
from fedpeft.secagg.sealing import NAME
from fedpeft.secagg.sender import Sender
from fedpeft.secagg.terms import Expected, History, Policy

_LEAST_HONEST: Final = 2  # a sum of one is a vector


@dataclass(frozen=True, slots=True)
class TwoServer(Protocol):
    """One-time masks and a helper that another operator runs.

    min_cohort, max_dropout: what a sum needs at least, which clients and helper hold against policies of their own, by
    default the same; helper_id: the id in hex whose signature on a sum of masks the coordinator asks for; where there
    is none, it relies on the connection to the helper.
    """

    min_cohort: int = 5
    max_dropout: float = 0.4
    helper_id: str = ""

    def __post_init__(self) -> None:
        self._least  # noqa: B018  # a ValueError for numbers that no policy can have
        if self.helper_id and not (_is_hex(self.helper_id) and is_id(bytes.fromhex(self.helper_id))):
            raise ValueError(f"helper_id: got {self.helper_id!r}; want the id that `fedpeft helper` shows, or none")

    @property
    def _least(self) -> Policy:
        return Policy(min_cohort=self.min_cohort, max_dropout=self.max_dropout)

    @override
    def threshold(self, cohort: int) -> int:
        if cohort < self.min_cohort:
            raise ValueError(f"a cohort of {cohort}; want {self.min_cohort} clients at least, or a smaller min_cohort")
        return self._least.fewest(cohort)

    @override
    def degree(self, cohort: int) -> int:
        return 0

    @override
    def label(self, cohort: int) -> SecurityLabel:
        least = self.threshold(cohort)
        signed = "its signature" if self.helper_id else "the TLS connection to it"
        return SecurityLabel(
            name=NAME,
            hides=f"each client's vector from either server: the coordinator learns sums of {least} or more, "
            "the helper who is in them",
            trusts=(
                "that coordinator and helper are not in league: together they can open every vector",
                f"the helper, to be there (without it the round is lost) and to add up rightly, as {signed} vouches",
                "the helper, to answer a pass once, and for no fewer clients than the parameters say",
                "the admins who sign the roster, not to fill it with clients of one hand",
            ),
            corrupt=max(0, least - _LEAST_HONEST) / cohort,
            dropouts=1 - least / cohort,
            misses=(
                "a client may add anything: its vector is not checked",
                "a client that seals what the helper can't open is named, but the round is lost",
                "the sum itself is not hidden, and what it tells of a client: that takes noise",
            ),
        )

    @override
    def client(self, me: Identity, roster: Roster, policy: Policy, history: History, expected: Expected) -> Sender:
        return Sender(me, roster, policy, history, expected)

    @override
    def server(self, params: Params, roster: Roster) -> Collector:
        if params.suite != NAME:
            raise ValueError(f"params.suite: got {params.suite!r}; want {NAME!r}")
        if strangers := set(params.ids) - roster.ids:
            raise ValueError(f"{len(strangers)} of the cohort are not in the roster; want members of it only")
        if roster.helper is None:
            raise ValueError("roster.helper: there is none; want a helper's key: `fedpeft keys roster --helper`")
        return Collector(params, bytes.fromhex(self.helper_id))


def _is_hex(said: str) -> bool:
    return set(said) <= set("0123456789abcdef") and len(said) % 2 == 0
