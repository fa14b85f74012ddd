"""The coordinator's half of ``twoserver``: one sum of masked vectors, and a sealed seed of each client in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NoReturn

import numpy as np
from typing_extensions import override

from fedpeft.errors import ProtocolError
from fedpeft.secagg.identity import SIGNATURE_SIZE
from fedpeft.secagg.messages import Abort, Envelope, Kind, enclose
from fedpeft.secagg.params import Params
from fedpeft.secagg.protocol import Phase, Refused, Ring, ServerSide
from fedpeft.secagg.ring import add_packed, reduce, unpack
from fedpeft.secagg.sealing import SEALED, Channel, Entry, Request, ids_of, read_answer
from fedpeft.secagg.transcript import KEY, agree, vector_text

_HEAD: Final = SEALED + SIGNATURE_SIZE
_PROBE: Final = bytes(range(1, 33))  # a private key that everybody knows: it shows whether a public key gives a secret


@dataclass(slots=True, eq=False)
class Collector(ServerSide):
    """The server: one sum, and of each client in it a sealed seed. pinned: the helper's id, or none.

    A pass is summed once the helper has answered; until then its phase goes on, with nobody waited for.
    """

    params: Params
    pinned: bytes
    _ids: frozenset[bytes] = field(init=False)
    _pass: int = field(default=0, init=False)
    _is_over: bool = field(default=False, init=False)
    _waiting: set[bytes] = field(init=False)
    _out: set[bytes] = field(default_factory=set, init=False)
    _shared: bytes = field(default=b"", init=False)
    _entries: dict[bytes, Entry] = field(default_factory=dict, init=False, repr=False)
    _sum: Ring = field(init=False, repr=False)
    _request: bytes | None = field(default=None, init=False, repr=False)
    _survivors: tuple[bytes, ...] = field(default=(), init=False)
    _total: Ring | None = field(default=None, init=False, repr=False)
    _culprits: dict[bytes, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._ids = frozenset(self.params.ids)
        self._open(self._ids)

    def _open(self, asked: frozenset[bytes]) -> None:
        self._waiting, self._entries = set(asked), {}
        self._sum = np.zeros(self.params.dims[self._pass], np.uint32)

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
    def begin(self, shared: bytes) -> None:
        """Tell what is broadcast for the pass that begins: its digest, b"" for nothing. Before the pass's outbox.

        RuntimeError in the first pass, for which nothing is broadcast beside the model, or once vectors have come.
        """
        if self._is_over or not self._pass or self._entries:
            raise RuntimeError(f"pass {self._pass} is going on; want one after the first, and no vectors yet")
        self._shared = shared

    @override
    def outbox(self) -> Mapping[bytes, bytes]:
        session = bytes.fromhex(self.params.session)
        message = enclose(Kind.ASK_VECTOR, session, self._pass, self.params.to_json())
        return dict.fromkeys(sorted(self.waiting), message)

    @override
    def receive(self, id_: bytes, message: bytes) -> None:
        if id_ not in self.waiting:
            code = "repeat" if id_ in self._entries else "stranger"
            raise Refused(code, f"{id_.hex()[:8]} is not waited for, or has answered already", id_)
        try:
            self._entries[id_] = self._taken(id_, message)
            self._waiting.discard(id_)
        except ProtocolError as error:
            self.drop(id_)
            code = error.code if isinstance(error, Refused) else "malformed"
            if code != "aborted":  # who refuses what was asked of it has not cheated
                self._culprits[id_] = str(error)
            raise Refused(code, f"{id_.hex()[:8]}: {error}", id_) from error

    def _taken(self, id_: bytes, message: bytes) -> Entry:
        session = bytes.fromhex(self.params.session)
        got = Envelope.open(message)
        if got.kind == Kind.ABORT and got.session == session:
            said = Abort.read(got.body)
            raise Refused("aborted", f"refuses: {said.code if said.is_of(id_, session) else 'without a signature'}")
        if (got.kind, got.session, got.pass_) != (Kind.VECTOR, session, self._pass):
            raise Refused("phase", f"{got.kind.name.lower()} of pass {got.pass_}; want a vector of pass {self._pass}")
        size = self._sum.size * self.params.m // 8
        if got.body.nbytes != _HEAD + size:
            raise Refused("length", f"{got.body.nbytes} bytes; want {_HEAD + size}, for {self._sum.size} numbers")
        sealed, signature, packed = bytes(got.body[:SEALED]), bytes(got.body[SEALED:_HEAD]), got.body[_HEAD:]
        channel = Channel(self.params.ctx, id_, self._pass, self._shared)
        entry = Entry(id_, vector_text(channel.ctx, self._pass, packed), sealed, signature)
        entry.check(channel)
        agree(_PROBE, sealed[:KEY], id_)
        add_packed(self._sum, packed, self.params.m)
        return entry

    @override
    def drop(self, id_: bytes) -> None:
        """Go on without this one: what it has sent stays in this pass's sum. ValueError for one not of the cohort."""
        if id_ not in self._ids:
            raise ValueError(f"{id_.hex()[:8]} is not of this cohort of {len(self._ids)}")
        self._waiting.discard(id_)
        self._out.add(id_)

    @override
    def close(self) -> None:
        """No more answers: from now on ``to_helper`` has a request. Called once more, it gives the helper up."""
        if self._is_over:
            raise RuntimeError("the session is over: nothing to close")
        self._waiting.clear()
        if self._request is not None:
            self._fail(ProtocolError("the helper has not answered: the session is lost"))
        if len(self._entries) < self.params.t:
            self._fail(ProtocolError(f"too few: got {len(self._entries)} of {self.params.n}; want {self.params.t}"))
        entries = tuple(x for _, x in sorted(self._entries.items()))
        self._request = Request(self.params.to_json(), self._pass, self._shared, entries).to_bytes()

    def _fail(self, error: ProtocolError) -> NoReturn:
        self._is_over, self._request = True, None
        raise error

    @override
    def to_helper(self) -> bytes | None:
        return self._request

    @override
    def from_helper(self, answer: bytes) -> None:
        """Take the sum of the masks. ProtocolError, and the session is over, for an answer to anything else, one that
        the pinned helper has not signed, or a refusal; a ``Refused`` names the client because of whom."""
        if self._request is None:
            raise RuntimeError("nothing was asked of the helper")
        try:
            masks = self._checked(answer, self._request)
        except ProtocolError as error:
            if isinstance(error, Refused) and error.culprit in self._entries:
                self._culprits[error.culprit] = str(error)
            self._fail(error)
        np.subtract(self._sum, masks, out=self._sum)
        reduce(self._sum, self.params.m)
        self._total, self._survivors = self._sum, ids_of(sorted(self._entries.values(), key=lambda x: x.id))
        self._request, self._shared = None, b""
        self._pass += 1
        self._is_over = self._pass == len(self.params.dims)
        if not self._is_over:
            self._open(frozenset(self._survivors) - self._out)

    def _checked(self, answer: bytes, request: bytes) -> Ring:
        found = read_answer(answer, request)
        if not found.is_signed or (self.pinned and found.helper != self.pinned):
            raise ProtocolError(f"the helper's sum is not signed by {self.pinned.hex()[:8] or 'who sent it'}")
        return unpack(found.packed, self._sum.size, self.params.m)

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
