"""The server's half of a protocol whose passes have one phase: each client sends one message, its vector in it."""

from abc import abstractmethod
from collections.abc import Collection, Mapping

import numpy as np
from typing_extensions import override

from fedpeft.errors import ProtocolError
from fedpeft.secagg.messages import Envelope, Kind, enclose
from fedpeft.secagg.protocol import Phase, Refused, Ring, ServerSide


class OnePhase(ServerSide):
    """Who is asked, who has answered and who is out, and one sum. What is asked, and what a vector is, a protocol says.

    session: 16 bytes; dims: the length of each pass's vectors.
    """

    def __init__(self, session: bytes, cohort: Collection[bytes], dims: tuple[int, ...]) -> None:
        if not dims:
            raise ValueError("no lengths of vectors: got dims = (); want one for each pass")
        self.session, self.cohort, self.dims = session, frozenset(cohort), dims
        self._pass, self._is_over = 0, False
        self._out: set[bytes] = set()
        self._survivors: tuple[bytes, ...] = ()
        self._total: Ring | None = None
        self._culprits: dict[bytes, str] = {}
        self._open(self.cohort)

    @abstractmethod
    def _question(self) -> bytes:
        """What is asked in this pass, of all alike."""

    @abstractmethod
    def _refusal(self, id_: bytes, body: memoryview) -> str:
        """Why a client says that it goes no further. ProtocolError for what no client says."""

    @abstractmethod
    def _take(self, id_: bytes, body: memoryview) -> None:
        """Add a client's vector to the sum. ProtocolError, and nothing is added, for one that can't be."""

    def _open(self, asked: Collection[bytes]) -> None:
        self._waiting, self._answered = set(asked), set[bytes]()
        self._sum: Ring = np.zeros(self.dims[self._pass], np.uint32)

    def _summed(self, total: Ring) -> None:
        """A pass has its sum: the next one begins with those who are in it, without who was dropped."""
        self._total, self._survivors = total, tuple(sorted(self._answered))
        self._pass += 1
        self._is_over = self._pass == len(self.dims)
        if not self._is_over:
            self._open(self._answered - self._out)

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
        return frozenset() if self._is_over else frozenset(self._waiting)

    @override
    def outbox(self) -> Mapping[bytes, bytes]:
        if not self.waiting:
            return {}
        message = enclose(Kind.ASK_VECTOR, self.session, self._pass, self._question())
        return dict.fromkeys(sorted(self.waiting), message)

    @override
    def receive(self, id_: bytes, message: bytes) -> None:
        if id_ not in self.waiting:
            code = "repeat" if id_ in self._answered else "stranger"
            raise Refused(code, f"{id_.hex()[:8]} is not waited for, or has answered already", id_)
        try:
            self._take(id_, self._body(id_, Envelope.open(message)))
        except ProtocolError as error:
            self.drop(id_)
            code = error.code if isinstance(error, Refused) else "malformed"
            if code != "aborted":  # who refuses what was asked of it has not cheated
                self._culprits[id_] = str(error)
            raise Refused(code, f"{id_.hex()[:8]}: {error}", id_) from error
        self._waiting.discard(id_)
        self._answered.add(id_)

    def _body(self, id_: bytes, got: Envelope) -> memoryview:
        if got.kind == Kind.ABORT and got.session == self.session:
            raise Refused("aborted", f"refuses: {self._refusal(id_, got.body)}")
        if (got.kind, got.session, got.pass_) != (Kind.VECTOR, self.session, self._pass):
            raise Refused("phase", f"{got.kind.name.lower()} of pass {got.pass_}; want a vector of pass {self._pass}")
        return got.body

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
