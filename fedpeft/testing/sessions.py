"""A session of any secure aggregation protocol in one process, with clients that can be lost and messages changed."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from typing_extensions import override

from fedpeft.errors import ProtocolError
from fedpeft.secagg.encoding import digest
from fedpeft.secagg.identity import Identity
from fedpeft.secagg.params import VERSION, Params, hash_models
from fedpeft.secagg.protocol import ClientSide, Phase, Protocol, Ring, ServerSide, Step, Vectors
from fedpeft.secagg.roster import Member, Roster
from fedpeft.secagg.terms import LEAST_COHORT, Expected, History, Policy

ADMIN = Identity.of(digest("testing", b"admin"))
"""Who signs the rosters of these sessions."""

MODEL, SHARED = digest("testing", b"model"), digest("testing", b"shared")
"""The digests of what a first pass and a later one carry."""

LAYOUT = digest("testing", b"layout").hex()
Change = Callable[[bytes, bytes], bytes]
"""Another message in place of one that a client sent: (id, message) -> message."""


def told(phase: Phase) -> bytes | None:
    """The digest of what comes with a message of this phase."""
    return {"model": MODEL, "pass": SHARED, "nothing": None}[phase.carries]


@dataclass(frozen=True, slots=True)
class Second:
    """A protocol's second server. key: what rosters name it by; start: given the roster of a session, it gives what is
    called with the first server's request and returns the answer."""

    key: bytes
    start: Callable[[Roster], Callable[[bytes], bytes]]


@dataclass(slots=True, eq=False)
class Drawn:
    """Entropy from a seed: the same bytes in the same order again. given: all of them."""

    seed: int
    given: list[bytes] = field(default_factory=list[bytes], repr=False)

    def __call__(self, size: int) -> bytes:
        self.given.append(np.random.default_rng((self.seed, len(self.given))).bytes(size))
        return self.given[-1]


@dataclass(slots=True, eq=False)
class Around(Vectors):
    """What surrounds a client. vectors: of each pass; told: what came with the message, or nothing; asked: passes whose
    vector was wanted."""

    vectors: Sequence[Ring]
    told: bytes | None = None
    has_model: bool = False
    asked: list[int] = field(default_factory=list[int])

    @override
    def model_hash(self) -> bytes:
        if self.told is None:
            raise RuntimeError("nothing came with this message")
        return self.told

    @override
    def vector(self, pass_: int) -> Ring:
        if not self.has_model:
            raise RuntimeError("a vector is wanted before the model came")
        self.asked.append(pass_)
        return self.vectors[pass_].copy()


@dataclass(slots=True, eq=False)
class Person:
    """One client. steps: all that it did; heard: all that it was sent."""

    id: bytes
    side: ClientSide
    around: Around
    entropy: Drawn
    state: bytes = field(default=b"", repr=False)
    steps: list[Step] = field(default_factory=list[Step])
    heard: list[tuple[Phase, bytes]] = field(default_factory=list[tuple[Phase, bytes]])

    def hear(self, phase: Phase, message: bytes) -> Step:
        """Its answer to a message of this phase, which comes with what the phase carries."""
        self.around.told = told(phase)
        self.around.has_model = self.around.has_model or phase.carries == "model"
        step = self.side.answer(self.state, message, self.around, self.entropy)
        self.state = step.state
        self.steps.append(step)
        self.heard.append((phase, message))
        return step


@dataclass(frozen=True, slots=True, eq=False)
class Summed:
    """The result of a pass."""

    survivors: tuple[bytes, ...]
    total: Ring


@dataclass(slots=True, eq=False)
class Session:
    """One session: drive it with ``phase`` or ``run``.

    may_refuse: whether a client may refuse what it's sent, since another client does as it likes; sums: of the passes
    that are done; gone: who never answers again; refused: who sent what the server did not take.
    """

    params: Params
    people: Mapping[bytes, Person]
    server: ServerSide
    second: Callable[[bytes], bytes] | None = None
    may_refuse: bool = False
    sums: list[Summed] = field(default_factory=list[Summed])
    gone: set[bytes] = field(default_factory=set[bytes])
    refused: set[bytes] = field(default_factory=set[bytes])

    def phase(self, change: Change | None = None) -> Phase:
        """One phase, in which all who are not gone answer."""
        phase, asked = self.server.phase, self.server.outbox()
        for id_ in sorted(asked.keys() - self.gone):
            step = self.people[id_].hear(phase, asked[id_])
            if step.was_refused:
                _check(
                    self.may_refuse, f"{phase.name} of pass {phase.pass_}: an honest client refuses: {step.answer!r}"
                )
                self.gone.add(id_)
            self.give(id_, step.answer if change is None else change(id_, step.answer))
        self.close(phase)
        return phase

    def give(self, id_: bytes, message: bytes) -> None:
        """One message to the server, which may refuse it, but only so."""
        try:
            self.server.receive(id_, message)
        except ProtocolError:
            self.refused.add(id_)

    def close(self, phase: Phase) -> None:
        """End the phase; ask the second server, where there is one; keep the sum if the pass is done."""
        self.server.close()
        while (request := self.server.to_helper()) is not None:
            if self.second is None:
                raise ValueError(
                    "second: got none; this protocol has a second server: want it in the suite's arguments"
                )
            self.server.from_helper(self.second(request))
        is_over = self.server.is_over
        if not is_over and self.server.phase.pass_ == phase.pass_:
            return
        _check(self.server.total is not None, f"pass {phase.pass_} is done, and there is no sum")
        assert self.server.total is not None
        self.sums.append(Summed(self.server.survivors, self.server.total.copy()))
        if not is_over:
            self.server.begin(SHARED)

    def run(self, lost: Mapping[int, Collection[bytes]] | None = None, change: Change | None = None) -> list[Phase]:
        """All phases that are left. lost: who is gone from a phase on, by its number; change: applied in each."""
        done: list[Phase] = []
        while not self.server.is_over:
            self.gone |= set((lost or {}).get(len(done), ()))
            done.append(self.phase(change))
        return done

    def plain(self, ids: Collection[bytes], pass_: int) -> Ring:
        """The sum of what these clients add in a pass."""
        total = np.zeros(self.params.dims[pass_], np.uint64)
        for id_ in ids:
            total += self.people[id_].around.vectors[pass_]
        return np.asarray(total % 2**self.params.m, np.uint32)


@dataclass(frozen=True, slots=True)
class Setting:
    """What sessions of a protocol are begun with. size: clients; consistency: as in its parameters."""

    protocol: Protocol
    size: int
    second: Second | None = None
    consistency: bool = True

    @property
    def may_lose(self) -> int:
        """How many clients may be lost, by the protocol's own word."""
        return int(self.protocol.label(self.size).dropouts * self.size + 1e-9)

    @property
    def hides(self) -> bool:
        """Whether the protocol says that it hides anything."""
        return self.protocol.label(self.size).hides != "nothing"

    def begin(self, dims: Sequence[int], m: int = 32, seed: int = 0, constant: int | None = None) -> Session:
        """A session that everyone agrees to. seed: of all secrets and vectors; constant: what vectors are made of
        instead of random numbers below 2^m."""
        people = sorted(
            (Identity.of(digest("testing", bytes([i, seed]))) for i in range(self.size)), key=lambda x: x.id
        )
        roster = Roster(
            tuple(Member(x.id) for x in people), helper=None if self.second is None else self.second.key
        ).signed(ADMIN)
        models = {"0": MODEL.hex()}
        suite, bits = self.protocol.label(self.size).name, _bits(self.size, m)
        params = Params(
            v=VERSION,
            suite=suite,
            consistency=self.consistency,
            run_id="testing",
            fl_round=1,
            attempt=0,
            session=digest("testing", b"session", bytes([seed])).hex()[:32],
            n=self.size,
            t=self.protocol.threshold(self.size),
            k=self.protocol.degree(self.size),
            m=m,
            bits=bits,
            range="4",
            clip="",
            dims=tuple(dims),
            layout_hash=LAYOUT,
            model_hash=hash_models(models).hex(),
            models=models,
            base="testing",
            weighting="1",
            cohort=tuple(x.id.hex() for x in people),
        )
        expected = Expected(LAYOUT, tuple(dims), "4", "", bits, "1", None, "testing", m)
        made = {}
        for i, one in enumerate(people):
            side = self.protocol.client(one, roster, _open(suite), History(), expected)
            rng = np.random.default_rng((seed, i, m))
            vectors = [
                np.full(size, constant, np.uint32)
                if constant is not None
                else rng.integers(0, 2**m, size, np.uint64).astype(np.uint32)
                for size in dims
            ]
            made[one.id] = Person(one.id, side, Around(vectors), Drawn(1000 * seed + i))
        second = None if self.second is None else self.second.start(roster)
        return Session(params, made, self.protocol.server(params, roster), second)


def _check(is_so: bool, what: str) -> None:
    if not is_so:
        raise AssertionError(what)


def _open(suite: str) -> Policy:
    """A policy that leaves it all to the protocol."""
    return Policy(LEAST_COHORT, 0.01, 0.9, 1, (suite,), consistency=False, min_degree=1)


def _bits(size: int, m: int) -> int:
    return next(b for b in range(m, 1, -1) if size * (2 ** (b - 1) - 1) <= 2 ** (m - 1) - 1)
