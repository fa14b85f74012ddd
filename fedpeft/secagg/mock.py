"""A protocol that hides nothing: the messages and phases of a session, for tests of all that is around one.

One phase a pass, in which every client sends its vector in the clear. A real run refuses it by its label.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import override

from fedpeft.errors import ProtocolError
from fedpeft.secagg import ring
from fedpeft.secagg.identity import ID_SIZE
from fedpeft.secagg.messages import SESSION, Envelope, Kind, enclose
from fedpeft.secagg.one_phase import OnePhase
from fedpeft.secagg.protocol import (
    ClientSide,
    Entropy,
    Protocol,
    Refused,
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


class MockServer(OnePhase):
    """Adds up what the clients of a cohort send, pass by pass. dims: the length of each pass's vectors."""

    def __init__(
        self, session: bytes, cohort: Collection[bytes], threshold: int, modulus: int, dims: tuple[int, ...]
    ) -> None:
        super().__init__(session, cohort, dims)
        self.threshold, self.modulus = threshold, modulus

    @override
    def _question(self) -> bytes:
        return b"".join([_byte(self.modulus), *(size.to_bytes(_SIZE) for size in self.dims)])

    @override
    def _refusal(self, id_: bytes, body: memoryview) -> str:
        return body[:32].tobytes().decode(errors="replace")

    @override
    def _take(self, id_: bytes, body: memoryview) -> None:
        if body[:ID_SIZE] != id_:
            raise ProtocolError("a vector that is another's")
        ring.add_packed(self._sum, body[ID_SIZE:], self.modulus)

    @override
    def close(self) -> None:
        super().close()
        if len(self._answered) < self.threshold:
            self._is_over = True
            raise ProtocolError(
                f"too few answers: got {len(self._answered)}; want {self.threshold} of {len(self.cohort)}"
            )
        self._summed(self._sum & np.uint32(2**self.modulus - 1))


def _byte(number: int) -> bytes:
    return bytes([number])


def _checked(cohort: int) -> None:
    if cohort < 1:
        raise ValueError(f"a cohort of {cohort}; want 1 client at least")
