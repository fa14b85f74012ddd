"""A protocol that hides nothing: the messages and phases of a session, for tests of all that is around one.

One phase a pass, in which every client sends its vector in the clear. A real run refuses it by its label.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from typing_extensions import override

from fedpeft.errors import ProtocolError
from fedpeft.secagg import ring
from fedpeft.secagg.identity import ID_SIZE
from fedpeft.secagg.messages import SESSION, Envelope, Kind, enclose
from fedpeft.secagg.protocol import (
    ClientSide,
    Entropy,
    Phase,
    Protocol,
    Refused,
    Ring,
    SecurityLabel,
    ServerSide,
    Step,
    Vectors,
)

_SIZE = 8  # bytes of a length
_OVER = 255  # passes that are answered, once it is over


@dataclass(frozen=True, slots=True)
class Mock(Protocol):
    """Vectors in the clear. It hides nothing, and is for tests alone."""

    @override
    def threshold(self, cohort: int) -> int:
        _checked(cohort)
        return 1

    @override
    def degree(self, cohort: int) -> int:
        _checked(cohort)
        return 0

    @override
    def label(self, cohort: int) -> SecurityLabel:
        return SecurityLabel(
            name="mock",
            hides="nothing",
            trusts=("the server, with every client's vector",),
            corrupt=0.0,
            dropouts=1 - self.threshold(cohort) / cohort,
            misses=("it hides nothing: it is for tests, and a run that asks for secure aggregation refuses it",),
        )

    @override
    def client(self, me: Any, roster: Any, policy: Any, history: Any, expected: Any) -> ClientSide:
        """me: an identity, of which only ``id`` is read; the others are not looked at."""
        return MockClient(me.id)

    @override
    def server(self, params: Any, roster: Any) -> ServerSide:
        """params: ``session``, ``cohort``, ``t``, ``m`` and ``dims`` are read; roster is not looked at."""
        return MockServer(
            session=bytes.fromhex(params.session),
            cohort=tuple(sorted(x if isinstance(x, bytes) else bytes.fromhex(x) for x in params.cohort)),
            threshold=params.t,
            modulus=params.m,
            dims=tuple(params.dims),
        )


@dataclass(frozen=True, slots=True)
class MockClient(ClientSide):
    """Answers each pass once, with its vector. Its state is its last session, and how many passes it has answered."""

    id: bytes

    @override
    def answer(self, state: bytes, message: bytes, surroundings: Vectors, entropy: Entropy) -> Step:
        session = state[:SESSION] or bytes(SESSION)
        try:
            asked = Envelope.open(message)
            session = asked.session
            return self._answer(state, asked, surroundings)
        except ProtocolError as error:
            code = error.code if isinstance(error, Refused) else "message"
            answer = enclose(Kind.ABORT, session, 0, code.encode())
            return Step(session + bytes([_OVER]), answer, is_over=True, was_refused=True)

    def _answer(self, state: bytes, asked: Envelope, surroundings: Vectors) -> Step:
        modulus, sizes = asked.body[:1].tobytes(), asked.body[1:].tobytes()
        dims = [int.from_bytes(sizes[i : i + _SIZE]) for i in range(0, len(sizes), _SIZE)]
        if asked.kind != Kind.ASK_VECTOR or modulus not in map(_byte, ring.MODULI) or len(sizes) != _SIZE * len(dims):
            raise Refused("message", "no question of this protocol")
        wanted = state[SESSION] if state[:SESSION] == asked.session else 0
        if asked.pass_ != wanted or asked.pass_ >= len(dims):
            raise Refused("order", f"pass {asked.pass_} of a session that is not what I am waiting for")
        vector = surroundings.vector(asked.pass_)
        if vector.shape != (dims[asked.pass_],):
            raise Refused("length", f"I have {vector.shape} numbers for pass {asked.pass_}; {dims} are asked for")
        is_over = asked.pass_ + 1 == len(dims)
        answer = enclose(Kind.VECTOR, asked.session, asked.pass_, self.id, ring.pack(vector, modulus[0]))
        return Step(asked.session + bytes([_OVER if is_over else asked.pass_ + 1]), answer, is_over)


@dataclass(slots=True, eq=False)
class MockServer(ServerSide):
    """Adds up what the clients of a cohort send, pass by pass. dims: the length of each pass's vectors."""

    session: bytes
    cohort: tuple[bytes, ...]
    threshold: int
    modulus: int
    dims: tuple[int, ...]
    _pass: int = field(default=0, init=False)
    _is_over: bool = field(default=False, init=False)
    _waiting: set[bytes] = field(init=False)
    _answered: set[bytes] = field(default_factory=set, init=False)
    _out: set[bytes] = field(default_factory=set, init=False)
    _sum: Ring = field(init=False, repr=False)
    _survivors: tuple[bytes, ...] = field(default=(), init=False)
    _total: Ring | None = field(default=None, init=False, repr=False)
    _culprits: dict[bytes, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.dims:
            raise ValueError("no lengths of vectors: got dims = (); want one for each pass")
        self._begin(self.cohort)

    def _begin(self, asked: tuple[bytes, ...]) -> None:
        self._waiting, self._answered = set(asked), set()
        self._sum = np.zeros(self.dims[self._pass], np.uint32)

    @property
    @override
    def phase(self) -> Phase:
        if self._is_over:
            raise RuntimeError("the session is over: it has no phase")
        return Phase("vectors", self._pass, "pass" if self._pass else "model")

    @property
    @override
    def is_over(self) -> bool:
        return self._is_over

    @property
    @override
    def waiting(self) -> frozenset[bytes]:
        return frozenset(self._waiting)

    @override
    def begin(self, shared: bytes) -> None:
        """What is broadcast for the pass that begins, of which this protocol makes nothing."""

    @override
    def outbox(self) -> Mapping[bytes, bytes]:
        if self._is_over:
            return {}
        dims = [size.to_bytes(_SIZE) for size in self.dims]
        message = enclose(Kind.ASK_VECTOR, self.session, self._pass, _byte(self.modulus), *dims)
        return dict.fromkeys(sorted(self._waiting), message)

    @override
    def receive(self, id_: bytes, message: bytes) -> None:
        if id_ not in self._waiting:
            raise Refused("repeat" if id_ in self._answered else "stranger", f"{id_.hex()[:8]}: not waited for", id_)
        try:
            self._take(id_, message)
        except ProtocolError as error:
            self.drop(id_)
            code = error.code if isinstance(error, Refused) else "message"
            if code != "aborted":  # who refuses what was asked of it has not cheated
                self._culprits[id_] = str(error)
            raise Refused(code, f"{id_.hex()[:8]}: {error}", id_) from error

    def _take(self, id_: bytes, message: bytes) -> None:
        got = Envelope.open(message)
        if got.kind == Kind.ABORT and got.session == self.session:
            raise Refused("aborted", f"refused to answer: {got.body[:32].tobytes().decode(errors='replace')}")
        if (got.kind, got.session, got.pass_) != (Kind.VECTOR, self.session, self._pass) or got.body[:ID_SIZE] != id_:
            raise Refused("message", f"{len(message)} bytes that are no vector of its own for pass {self._pass}")
        ring.add_packed(self._sum, got.body[ID_SIZE:], self.modulus)
        self._waiting.discard(id_)
        self._answered.add(id_)

    @override
    def drop(self, id_: bytes) -> None:
        """Go on without this one: what it has sent stays in this pass's sum. ValueError for one not of the cohort."""
        if id_ not in self.cohort:
            raise ValueError(f"{id_.hex()[:8]} is not of this cohort of {len(self.cohort)}")
        self._waiting.discard(id_)
        self._out.add(id_)

    @override
    def close(self) -> None:
        if self._is_over:
            raise RuntimeError("the session is over: nothing to close")
        self._waiting.clear()
        if len(self._answered) < self.threshold:
            self._is_over = True
            raise ProtocolError(
                f"too few answers: got {len(self._answered)}; want {self.threshold} of {len(self.cohort)}"
            )
        self._survivors = tuple(sorted(self._answered))
        self._total = self._sum & np.uint32(2**self.modulus - 1)
        self._pass += 1
        if self._pass == len(self.dims):
            self._is_over = True
        else:
            self._begin(tuple(x for x in self._survivors if x not in self._out))

    @property
    @override
    def survivors(self) -> tuple[bytes, ...]:
        return self._survivors

    @property
    @override
    def total(self) -> Ring | None:
        return self._total

    @property
    @override
    def culprits(self) -> Mapping[bytes, str]:
        return dict(self._culprits)


def _byte(number: int) -> bytes:
    return bytes([number])


def _checked(cohort: int) -> None:
    if cohort < 1:
        raise ValueError(f"a cohort of {cohort}; want 1 client at least")
