"""What a secure aggregation protocol is: two halves without I/O, and what must be believed for it to hide anything.

The client's half is a function of what it kept and what it is sent, since a deployed client may be a new process for
every message. The server's half is a state machine, driven like a round in the clear: ``outbox``, ``receive``,
``close``, phase by phase. Neither knows a network or a clock, and randomness is an argument.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import ProtocolError

Ring: TypeAlias = NDArray[np.uint32]
Entropy: TypeAlias = Callable[[int], bytes]
"""So many bytes that nobody can guess, such as ``os.urandom``."""

Carries: TypeAlias = Literal["nothing", "model", "pass"]


class Refused(ProtocolError):  # noqa: N818
    """A check that failed: the session is over for whoever made it.

    code: a short fixed word, which is all that the other side is told; culprit: the id of the party whose message
    failed, where one can be named.
    """

    def __init__(self, code: str, text: str, culprit: bytes | None = None) -> None:
        super().__init__(text)
        self.code, self.culprit = code, culprit


@dataclass(frozen=True, slots=True)
class SecurityLabel:
    """What a protocol hides, from whom, and what it does not.

    hides: what the server does not learn; trusts: who must be believed, and for what, a line each; corrupt, dropouts:
    the shares of a cohort of this size that may be corrupt, or lost; misses: what is not covered, a line each.
    """

    name: str
    hides: str
    trusts: tuple[str, ...]
    corrupt: float
    dropouts: float
    misses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Phase:
    """A step of a session.

    name: such as "keys"; pass_: which of the round's sums it belongs to; carries: what the server must send beside the
    protocol's own message: the "model" to train on, the "pass" whose encoding is wanted, or "nothing".
    """

    name: str
    pass_: int
    carries: Carries


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What a client does with a message.

    state: what it keeps for the next one, secret; answer: what it sends; is_over: the session is done for it;
    was_refused: the answer only says why there is none.
    """

    state: bytes = field(repr=False)
    answer: bytes = field(repr=False)
    is_over: bool = False
    was_refused: bool = False


class Vectors(ABC):
    """What the client's half asks of its surroundings, when it needs it."""

    @abstractmethod
    def model_hash(self) -> bytes:
        """The digest of the model that came with this message, and for a pass after the first, of what was broadcast
        for it. RuntimeError where nothing came."""

    @abstractmethod
    def vector(self, pass_: int) -> Ring:
        """What this client adds to the sum of a pass, encoded: shape (dims[pass_],), every number below 2^m."""


class ClientSide(ABC):
    """One client's half of a protocol, for any number of sessions."""

    @abstractmethod
    def answer(self, state: bytes, message: bytes, surroundings: Vectors, entropy: Entropy) -> Step:
        """The answer to one message of a session. state: what the last step kept, empty at first.

        Never raises for what the server sent: a refusal is a step as well.
        """


class ServerSide(ABC):
    """The server's half of one session: never holds two clients' vectors."""

    @property
    @abstractmethod
    def phase(self) -> Phase:
        """What is going on. RuntimeError once the session is over."""

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether the last pass is done, or the session has failed."""

    @property
    @abstractmethod
    def waiting(self) -> frozenset[bytes]:
        """Ids that were asked in this phase and have not answered."""

    @abstractmethod
    def outbox(self) -> Mapping[bytes, bytes]:
        """The message of this phase for each id that is waited for."""

    @abstractmethod
    def receive(self, id_: bytes, message: bytes) -> None:
        """Take one answer; nothing but sums is kept of a vector. ProtocolError (``Refused``, with a culprit) for one
        that can't be taken: that client is then out, and the others go on."""

    @abstractmethod
    def drop(self, id_: bytes) -> None:
        """Go on without this one."""

    @abstractmethod
    def close(self) -> None:
        """No more answers in this phase. ProtocolError, and the session is over, where too few are left."""

    @property
    @abstractmethod
    def survivors(self) -> tuple[bytes, ...]:
        """Whose vectors are in the pass that was summed last, ascending."""

    @property
    @abstractmethod
    def total(self) -> Ring | None:
        """The sum of the survivors' vectors in the pass that was summed last, in Z_2^m; None until there is one."""

    def begin(self, shared: bytes) -> None:  # noqa: B027  # a protocol may have no use for it
        """Told once for each pass after the first, before its outbox: the digest of what is broadcast for it."""

    @property
    @abstractmethod
    def culprits(self) -> Mapping[bytes, str]:
        """Who was found to cheat, or was named by others, and for what."""

    def to_helper(self) -> bytes | None:
        """What a second server has to be told before ``total`` is there; None where there is no second server, or no
        need."""
        return None

    def from_helper(self, answer: bytes) -> None:
        """What it answered. ProtocolError."""
        raise RuntimeError(f"{type(self).__name__} has no second server")


class Protocol(ABC):
    """A protocol by name: what ``secagg.name`` chooses.

    A frozen dataclass whose fields are the options of ``[secagg]``.
    """

    @property
    def is_consistent(self) -> bool:
        """Whether clients agree on who survived before anything is told that belongs to one of them."""
        return True

    def questions(self, passes: int) -> tuple[str, ...]:
        """What a client of a round with so many sums is asked, message by message, with the names that ``full`` has."""
        return ("vectors",) * passes

    @abstractmethod
    def threshold(self, cohort: int) -> int:
        """How many clients must stay to the end. ValueError for a cohort that is too small for it."""

    @abstractmethod
    def degree(self, cohort: int) -> int:
        """How many others each client shares masks with."""

    @abstractmethod
    def label(self, cohort: int) -> SecurityLabel:
        """What a session with so many clients hides."""

    @abstractmethod
    def client(self, me: Any, roster: Any, policy: Any, history: Any, expected: Any) -> ClientSide:
        """The client's half, for one who knows itself, the roster, its own policy and what it has done before."""

    @abstractmethod
    def server(self, params: Any, roster: Any) -> ServerSide:
        """The server's half of one session."""
