"""The second server's half of ``twoserver``: opens sealed seeds, and tells nothing but the sum of their masks, once.

It is run by another operator than the coordinator, with its own copies of the roster and of a policy. Without I/O: time
is an argument, and what it has answered before is in a store that is given to it.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NoReturn, Self

import numpy as np
from typing_extensions import override

from fedpeft.errors import ProtocolError
from fedpeft.secagg.encoding import derive_key
from fedpeft.secagg.identity import SEED_SIZE, Identity
from fedpeft.secagg.masks import Mask, add_masks
from fedpeft.secagg.params import VERSION, Params
from fedpeft.secagg.policy import slice_is_safe
from fedpeft.secagg.protocol import Refused
from fedpeft.secagg.ring import MODULI, pack
from fedpeft.secagg.roster import Roster
from fedpeft.secagg.sealing import NAME, Channel, Request, Sum, about, ids_of, refusal
from fedpeft.secagg.terms import Policy
from fedpeft.secagg.transcript import public_of

LARGEST = 1 << 28
"""Numbers of a vector that a helper adds masks of, unless told otherwise: 1 GiB of memory."""


@dataclass(frozen=True, slots=True, eq=False)
class HelperKey:
    """A helper's keys: one that seeds are sealed to, and one that signs its sums.

    public: the X25519 key, 32 bytes, which the roster names; identity: whose id coordinators may pin. Both private keys
    come from the 32 bytes of the helper's key file, and are in no text and no pickle.
    """

    public: bytes
    identity: Identity
    _secret: bytes = field(repr=False)

    @classmethod
    def of(cls, seed: bytes) -> Self:
        """The keys that these 32 secret bytes give: an identity's own, so that its file serves a helper."""
        identity = Identity.of(seed)
        secret = derive_key(seed, bytes(SEED_SIZE), b"helper")
        return cls(public_of(secret), identity, secret)

    def open(self, channel: Channel, sealed: bytes) -> bytes:
        """The seed that a client has sealed to this key. Refused, naming the client."""
        return channel.open(sealed, self._secret)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a helper's key is not pickled, since its private part would be in the pickle")


class Answered(ABC):
    """Which passes of which sessions a helper has answered. Nothing is ever taken from it."""

    @abstractmethod
    def use(self, session: bytes, pass_: int) -> bool:
        """Write down that this pass is answered, and say whether that is new. Only one of several calls, at whatever
        time and in whatever process, is told True; and once it's told, the note outlives a loss of power."""


@dataclass(frozen=True, slots=True)
class InMemory(Answered):
    """Notes that are gone with the process: for tests."""

    seen: set[tuple[bytes, int]] = field(default_factory=set)

    @override
    def use(self, session: bytes, pass_: int) -> bool:
        if (session, pass_) in self.seen:
            return False
        self.seen.add((session, pass_))
        return True


@dataclass(frozen=True, slots=True)
class Reply:
    """What a helper sends back. refusal: why it gives no sum, for its own operator; None where it does."""

    answer: bytes = field(repr=False)
    refusal: Refused | None = None


@dataclass(frozen=True, slots=True)
class Helper:
    """A helper with its own word on who may take part, and how few may be summed.

    admins: ids of whom it believes a roster; policy: ``min_cohort``, ``max_dropout``, ``min_slice`` and ``suites`` are
    what it looks at; largest: numbers of the longest vector.
    """

    key: HelperKey
    roster: Roster
    admins: Collection[bytes]
    policy: Policy
    answered: Answered
    largest: int = LARGEST

    def answer(self, request: bytes, now: float) -> Reply:
        """The sum of the masks of those in the request, or a refusal with its code. now: unix seconds.

        A pass of a session is answered once. All else is checked before that is written down, so that nobody but the
        cohort itself can use a session up. Cost: the longest vector, once, and the key stream of each client's mask.
        """
        try:
            return Reply(self._sum(request, now))
        except ProtocolError as error:
            why = error if isinstance(error, Refused) else Refused("request", str(error))
            return Reply(refusal(request, why), why)

    def _sum(self, request: bytes, now: float) -> bytes:
        asked = Request.read(request)
        params = Params.from_json(asked.params)
        self._check(params, asked, now)
        masks = self._masks(asked, params.ctx)
        if not self.answered.use(bytes.fromhex(params.session), asked.pass_):
            raise Refused("used", f"pass {asked.pass_} of session {params.session} was answered before")
        total = np.zeros(params.dims[asked.pass_], np.uint32)
        add_masks(total, masks)
        return Sum.of(self.key.identity, about(request), pack(total, params.m)).to_bytes()

    def _masks(self, asked: Request, ctx: bytes) -> list[Mask]:
        channels = [Channel(ctx, x.id, asked.pass_, asked.shared) for x in asked.entries]
        for entry, channel in zip(asked.entries, channels, strict=True):
            entry.check(channel)
        seeds = [self.key.open(c, x.sealed) for x, c in zip(asked.entries, channels, strict=True)]
        return [c.mask(seed, 1) for c, seed in zip(channels, seeds, strict=True)]

    def _check(self, params: Params, asked: Request, now: float) -> None:
        """Refused unless this helper may open what these clients have sealed."""
        try:
            self.roster.check(self.admins, now)
        except ProtocolError as error:
            raise Refused("roster", str(error)) from error
        if self.roster.helper != self.key.public:
            raise Refused("helper", "the roster names another helper, or none: this one's key is not the roster's")
        if params.v != VERSION or params.suite != NAME or params.suite not in self.policy.suites:
            raise Refused("suite", f"version {params.v} of {params.suite!r}; want {VERSION} of {NAME!r}")
        if params.m not in MODULI or asked.pass_ >= len(params.dims) or params.dims[asked.pass_] > self.largest:
            raise Refused("size", f"pass {asked.pass_} of {params.dims}, of {params.m} bits; at most {self.largest:,}")
        self._check_people(params, ids_of(asked.entries))

    def _check_people(self, params: Params, ids: tuple[bytes, ...]) -> None:
        cohort = set(params.ids)
        if params.n != len(params.ids) or len(cohort) != params.n or not cohort <= self.roster.ids:
            raise Refused("cohort", f"a cohort of {len(cohort)} ids, of {params.n}; want each once, all in the roster")
        strangers = [x for x in ids if x not in cohort]
        if strangers:
            raise Refused("stranger", f"{strangers[0].hex()[:8]} is not of the cohort", strangers[0])
        least = max(params.t, self.policy.fewest(params.n))
        if len(ids) < least:
            raise Refused("few", f"{len(ids)} of {params.n} clients; want at least {least}, or a sum shows too much")
        if len(params.ranks) not in (0, params.n) or not {str(x) for x in params.ranks} <= set(params.models):
            raise Refused(
                "slice", f"{len(params.ranks)} ranks for {params.n} clients; want one for each, with its model"
            )
        ranks = params.rank_by_id
        for one in {ranks.get(x): x for x in ids}.values():
            if not slice_is_safe(params, ids, one, self.policy):
                raise Refused("slice", f"fewer than {self.policy.min_slice} are left of one client's rank or model")
