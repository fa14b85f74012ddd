"""A cohort and a server in one process, with a network between them that a test can cut and change."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np

from fedpeft.errors import ProtocolError
from fedpeft.secagg import Expected, Full, History, Identity, KRegular, Member, Params, Policy, Roster, hash_models
from fedpeft.secagg.protocol import Entropy, Phase, Ring, Step, Vectors
from fedpeft.secagg.server import Session

MODEL = hashlib.sha256(b"the model").digest()
LAYOUT = hashlib.sha256(b"the layout").hexdigest()
BROADCAST = hashlib.sha256(b"what is broadcast for pass 1").digest()
OPEN = Policy(min_cohort=3, min_slice=2, min_degree=2)


def entropy(seed: str) -> Entropy:
    """Bytes that are the same in every run of a test."""
    numbers = count()
    return lambda size: hashlib.shake_256(f"{seed}/{next(numbers)}".encode()).digest(size)


def identity(name: str) -> Identity:
    return Identity.of(hashlib.sha256(name.encode()).digest())


@dataclass
class Inputs(Vectors):
    """What a client adds in each pass, and what it was sent."""

    vectors: Sequence[Ring]
    model: bytes | None = MODEL
    broadcast: bytes | None = BROADCAST
    pass_: int = 0

    def model_hash(self) -> bytes:
        found = self.broadcast if self.pass_ else self.model
        if found is None:
            raise RuntimeError("nothing came")
        return found

    def vector(self, pass_: int) -> Ring:
        return self.vectors[pass_]


@dataclass
class Party:
    """One client, with what it has kept."""

    identity: Identity
    inputs: Inputs
    side: object
    entropy: Entropy
    state: bytes = b""
    steps: list[Step] = field(default_factory=list)

    @property
    def id(self) -> bytes:
        return self.identity.id

    def answer(self, message: bytes, pass_: int = 0) -> Step:
        self.inputs.pass_ = pass_
        step = self.side.answer(self.state, message, self.inputs, self.entropy)
        self.state = step.state
        self.steps.append(step)
        return step


@dataclass
class Cohort:
    """n clients and the parameters of one session of theirs."""

    params: Params
    parties: dict[bytes, Party]
    roster: Roster
    server: Session

    @property
    def ids(self) -> list[bytes]:
        return sorted(self.parties)

    def __getitem__(self, place: int) -> Party:
        return self.parties[self.ids[place]]

    def ask(self, lost: Collection[bytes] = ()) -> dict[bytes, bytes]:
        """What everyone answers in this phase but those who are lost in it."""
        phase, asked = self.server.phase, self.server.outbox()
        return {i: self.parties[i].answer(asked[i], phase.pass_).answer for i in sorted(asked) if i not in lost}

    def phase(self, lost: Collection[bytes] = (), change: Callable[[bytes, bytes], bytes] | None = None) -> None:
        """One phase; ``change`` makes another message of what a client sends."""
        for id_, message in self.ask(lost).items():
            self.give(id_, change(id_, message) if change else message)
        self.close()

    def give(self, id_: bytes, message: bytes) -> str:
        """Why the server did not take it; nothing if it did."""
        try:
            self.server.receive(id_, message)
        except ProtocolError as error:
            return str(error)
        return ""

    def close(self) -> None:
        self.server.close()
        if not self.server.is_over and self.server.phase == Phase("vectors", self.server.phase.pass_, "pass"):
            self.server.begin(BROADCAST)

    def until(self, name: str, pass_: int = 0) -> None:
        """Go on without losses up to this phase."""
        while (self.server.phase.name, self.server.phase.pass_) != (name, pass_):
            self.phase()

    def finish(self) -> Ring:
        while not self.server.is_over:
            self.phase()
        assert self.server.total is not None
        return self.server.total

    def plain(self, survivors: Collection[bytes], pass_: int = 0) -> Ring:
        """The sum of what these clients added."""
        total = sum(self.parties[i].inputs.vectors[pass_].astype(np.uint64) for i in survivors)
        return (np.asarray(total) % 2**self.params.m).astype(np.uint32)


def cohort(
    n: int = 5,
    dims: Sequence[int] = (13,),
    m: int = 32,
    suite: str = "full",
    consistency: bool = True,
    t: int | None = None,
    k: int | None = None,
    policy: Policy | None = None,
    seed: str = "",
    ranks: Sequence[int] = (),
    **changes: object,
) -> Cohort:
    """A session that all agree to, unless ``changes`` to the parameters or the policy say otherwise."""
    protocol = Full() if suite == "full" else KRegular()
    k = n - 1 if k is None else k
    t = 2 * (n if suite == "full" else min(k, n)) // 3 + 1 if t is None else t
    people = sorted((identity(f"{seed}/{i}") for i in range(n)), key=lambda x: x.id)
    roster = Roster(tuple(Member(x.id) for x in people))
    models = {str(r): MODEL.hex() for r in sorted(set(ranks) or {0})}
    bits = next(b for b in range(m, 1, -1) if n * (2 ** (b - 1) - 1) <= 2 ** (m - 1) - 1)
    params = Params(
        v=1,
        suite=suite,
        consistency=consistency,
        run_id="run",
        fl_round=3,
        attempt=0,
        session=hashlib.sha256(seed.encode()).hexdigest()[:32],
        n=n,
        t=t,
        k=k,
        m=m,
        bits=bits,
        range="4",
        clip="",
        dims=tuple(dims),
        layout_hash=LAYOUT,
        model_hash=hash_models(models).hex(),
        models=models,
        base="tiny",
        weighting="1",
        cohort=tuple(x.id.hex() for x in people),
        ranks=tuple(ranks),
    )
    params = replace(params, **changes)
    policy = policy or replace(OPEN, consistency=consistency)
    numbers = np.random.default_rng([n, m, *hashlib.sha256(seed.encode()).digest()[:4]])
    parties = {}
    for i, person in enumerate(people):
        vectors = [numbers.integers(0, 2**m, size, np.uint64).astype(np.uint32) for size in dims]
        rank = ranks[i] if ranks else None
        expected = Expected(LAYOUT, tuple(dims), "4", "", bits, "1", rank, "tiny", m)
        side = protocol.client(person, roster, policy, History(last_round=2), expected)
        parties[person.id] = Party(person, Inputs(vectors), side, entropy(f"{seed}/{i}"))
    return Cohort(params, parties, roster, protocol.server(params, roster))


def losses(
    rng: np.random.Generator, ids: Sequence[bytes], most: int, passes: int
) -> Iterator[tuple[tuple[str, int], bytes]]:
    """Up to ``most`` clients, each lost for good at some phase."""
    phases = [("keys", 0), ("shares", 0)]
    phases += [(name, p) for p in range(passes) for name in ("vectors", "survivors", "unmask")]
    for i in rng.permutation(len(ids))[: rng.integers(0, most + 1)]:
        yield phases[int(rng.integers(len(phases)))], ids[int(i)]


def run(found: Cohort, lost: Mapping[bytes, tuple[str, int]]) -> list[tuple[tuple[bytes, ...], Ring]]:
    """Survivors and sum of each pass of a session in which some are lost, each from a phase on."""
    out, gone = [], set()
    while not found.server.is_over:
        phase = found.server.phase
        gone |= {i for i, when in lost.items() if when == (phase.name, phase.pass_)}
        found.phase(lost=gone)
        if phase.name == "unmask":
            assert found.server.total is not None
            out.append((found.server.survivors, found.server.total.copy()))
    return out
