"""The server's half of ``full`` and ``kregular``: one session, phase by phase.

A masked vector goes into the sum when it comes and is forgotten; what is kept besides are keys, sealed shares and
commitments. Who is in each set is fixed when its phase is closed, and whoever was refused, or has not answered by then,
is out for good. Source: Bonawitz et al., CCS 2017, figure 4; shares checked against commitments: suite FP-SA-1.
"""

from collections.abc import Collection, Mapping
from typing import Final, Literal, NoReturn, TypeAlias

import numpy as np
from typing_extensions import override

from fedpeft.errors import ProtocolError
from fedpeft.secagg import accept, transcript
from fedpeft.secagg.blame import Blame
from fedpeft.secagg.dealing import Dealing
from fedpeft.secagg.finish import Unmasking
from fedpeft.secagg.messages import Abort, Advert, Envelope, Kind, enclose, read_shares
from fedpeft.secagg.params import Params
from fedpeft.secagg.protocol import Carries, Phase, Refused, Ring, ServerSide
from fedpeft.secagg.ring import add_packed
from fedpeft.secagg.roster import Roster

Name: TypeAlias = Literal["keys", "shares", "vectors", "survivors", "unmask"]

_KINDS: Final[Mapping[Name, tuple[Kind, Kind]]] = {  # what asks for an answer, and what the answer is
    "keys": (Kind.ASK_KEYS, Kind.KEYS),
    "shares": (Kind.ASK_SHARES, Kind.SHARES),
    "vectors": (Kind.ASK_VECTOR, Kind.VECTOR),
    "survivors": (Kind.ASK_SURVIVORS, Kind.SURVIVORS),
    "unmask": (Kind.ASK_UNMASK, Kind.UNMASK),
}
_OVER_WHAT_WAS_DEALT: Final = ("sealed", "share")


class Session(ServerSide):
    """One session with the cohort that its parameters name. ValueError where the roster doesn't have them all."""

    def __init__(self, params: Params, roster: Roster) -> None:
        if strangers := set(params.ids) - roster.ids:
            raise ValueError(f"{len(strangers)} of the cohort are not in the roster; want members of it only")
        self.params = params
        self._id = bytes.fromhex(params.session)
        self._name: Name = "keys"
        self._pass = 0
        self._is_over = False
        self._waiting: set[bytes] = set(params.ids)
        self._answered: set[bytes] = set()
        self._blame = Blame()
        self._adverts: dict[bytes, Advert] = {}
        self._known: set[bytes] = set()
        self._dealing: Dealing | None = None
        self._members: tuple[bytes, ...] = ()
        self._shared = b""
        self._sum: Ring | None = None
        self._summed: set[bytes] = set()
        self._alive: tuple[bytes, ...] = ()
        self._signatures: dict[bytes, bytes] = {}
        self._unmasking: Unmasking | None = None
        self._survivors: tuple[bytes, ...] = ()
        self._total: Ring | None = None

    @property
    @override
    def phase(self) -> Phase:
        if self._is_over:
            raise RuntimeError("the session is over: it has no phase")
        carries: Carries = "model" if self._name == "shares" else "nothing"
        if self._name == "vectors" and self._pass:
            carries = "pass"
        return Phase(self._name, self._pass, carries)

    @property
    @override
    def is_over(self) -> bool:
        return self._is_over

    @property
    @override
    def waiting(self) -> frozenset[bytes]:
        return frozenset(self._waiting)

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
        return self._blame.culprits

    @override
    def begin(self, shared: bytes) -> None:
        """Tell what is broadcast for the pass that begins: its digest, b"" for nothing. Before the pass's outbox.

        RuntimeError in the first pass, whose broadcast is the model, or once vectors have come."""
        if self._is_over or self._name != "vectors" or not self._pass or self._answered:
            raise RuntimeError(f"{self._name} of pass {self._pass}; want vectors of a later pass, before any came")
        self._shared = shared

    @override
    def outbox(self) -> Mapping[bytes, bytes]:
        """The message of this phase for each id that is waited for."""
        if self._is_over:
            return {}
        match self._name:
            case "keys":
                return self._to_all(self.params.to_json())
            case "shares":
                return self._to_all(b"".join(x.to_bytes() for x in self._fixed.adverts.values()))
            case "vectors" if self._pass == 0:
                members = set(self._members)
                return {v: self._message(self._fixed.parcels(v, members)) for v in sorted(self._waiting)}
            case "vectors":
                return self._to_all(b"")
            case "unmask" if self.params.consistency:
                return {v: self._message(self._signed_for(v)) for v in sorted(self._waiting)}
            case _:
                return self._to_all(b"".join(self._alive))

    @override
    def receive(self, id_: bytes, message: bytes) -> None:
        """Take one answer. Refused for one that nobody waits for, which changes nothing; and for one that can't be
        taken, whose sender is then out."""
        if not isinstance(id_, bytes) or id_ not in self._waiting:
            raise Refused("unasked", "an answer from somebody who was not asked, has answered, or is too late")
        try:
            self._take(id_, Envelope.open(message))
        except ProtocolError as error:
            self.drop(id_)
            was = error if isinstance(error, Refused) else Refused("malformed", str(error), id_)
            if was.culprit is not None:
                self._blame.find(was.culprit, str(was))
            raise was from error
        self._waiting.discard(id_)
        self._answered.add(id_)

    @override
    def drop(self, id_: bytes) -> None:
        """Go on without this one: it's asked nothing more. A vector of its own that is in the sum stays there."""
        self._waiting.discard(id_)
        self._answered.discard(id_)

    @override
    def close(self) -> None:
        """Fix who is in this phase, and begin the next. ProtocolError, and the session is over, for too few."""
        if self._is_over:
            raise RuntimeError("the session is over: nothing to close")
        try:
            asked = self._closed()
        except ProtocolError as error:
            if isinstance(error, Refused) and error.culprit is not None:
                self._blame.find(error.culprit, str(error))
            self._end()
            raise
        self._waiting, self._answered = set(asked), set()
        if not asked:  # after the last pass
            self._end()

    def _closed(self) -> Collection[bytes]:
        """What follows from this phase's answers; who is asked in the next, nobody after the last."""
        match self._name:
            case "keys":
                return self._fix_keys()
            case "shares":
                return self._fix_shares()
            case "vectors":
                return self._fix_survivors()
            case "survivors":
                return self._fix_signers()
            case "unmask":
                return self._finish()

    def _fix_keys(self) -> Collection[bytes]:
        """U1."""
        self._enough(self._adverts.keys() & self._answered)
        self._dealing = Dealing.of(self.params, (self._adverts[x] for x in self._answered))
        self._adverts, self._known = {}, set()
        self._name = "shares"
        return self._answered

    def _fix_shares(self) -> Collection[bytes]:
        """U2."""
        self._enough(self._answered)
        self._members = self._fixed.core(tuple(self._answered))
        self._enough(self._members)
        self._name = "vectors"
        return self._members

    def _fix_survivors(self) -> Collection[bytes]:
        """U3."""
        self._enough(self._answered)
        self._held_by(self._answered)
        self._alive = tuple(sorted(self._summed))
        self._signatures = {}
        self._name = "survivors" if self.params.consistency else "unmask"
        self._unmasking = Unmasking(self._fixed, self._pass, self._shared, self._members, self._alive)
        return self._answered

    def _fix_signers(self) -> Collection[bytes]:
        """Of U3, those who are told enough signatures to go on."""
        signers = self._signatures.keys() & self._answered
        asked = signers - set(self._fixed.lacking(signers, self._signatures))
        self._held_by(asked)
        self._name = "unmask"
        return asked

    def _finish(self) -> Collection[bytes]:
        """The pass's sum. Who is asked in the next one: who has answered to the end of this."""
        assert self._unmasking is not None and self._sum is not None  # noqa: PT018
        self._unmasking.finish(self._sum)
        self._total, self._survivors = self._sum, self._alive
        self._sum, self._unmasking, self._summed = None, None, set()
        self._pass += 1
        if self._pass == len(self.params.dims):
            return ()
        self._name, self._members, self._shared = "vectors", self._alive, b""
        self._enough(self._answered)
        return self._answered

    def _enough(self, ids: Collection[bytes]) -> None:
        if len(ids) < self.params.t:
            left = f"{len(ids)} of {self.params.n} clients are left"
            raise ProtocolError(f"{self._name} of pass {self._pass}: {left}; want at least {self.params.t}")

    def _held_by(self, answering: Collection[bytes]) -> None:
        if lacking := self._fixed.lacking(self._members, answering):
            raise ProtocolError(
                f"{self._name} of pass {self._pass}: fewer than {self.params.t} are left who hold shares of "
                f"{len(lacking)} clients' secrets, so that the masks can't come off"
            )

    def _end(self) -> None:
        self._is_over = True
        self._waiting, self._answered = set(), set()
        self._dealing, self._unmasking, self._sum = None, None, None
        self._adverts, self._known, self._signatures = {}, set(), {}

    @property
    def _fixed(self) -> Dealing:
        """Once the keys are."""
        assert self._dealing is not None
        return self._dealing

    def _message(self, body: bytes) -> bytes:
        return enclose(_KINDS[self._name][0], self._id, self._pass, body)

    def _to_all(self, body: bytes) -> Mapping[bytes, bytes]:
        return dict.fromkeys(sorted(self._waiting), self._message(body))

    def _signed_for(self, id_: bytes) -> bytes:
        signers = [x for x in self._fixed.holders[id_] if x in self._signatures]
        return b"".join(x + self._signatures[x] for x in signers[: self.params.t])

    def _take(self, id_: bytes, envelope: Envelope) -> None:
        body = envelope.body
        if envelope.session != self._id:
            raise ProtocolError("a message of another session")
        if envelope.kind == Kind.ABORT:
            self._aborted(id_, accept.abort(id_, body, self._id))
        if envelope.kind != _KINDS[self._name][1] or envelope.pass_ != self._pass:
            raise ProtocolError(f"{envelope.kind.name.lower()} of pass {envelope.pass_} came for {self._name}")
        match self._name:
            case "keys":
                found = accept.advert(id_, body, self.params, self._known)
                self._adverts[id_] = found
                self._known.update(found.keys)
            case "shares":
                self._fixed.dealt[id_] = accept.dealt(id_, body, self._fixed)
            case "vectors":
                packed = accept.vector(id_, body, self._fixed, self._pass)
                if self._sum is None:
                    self._sum = np.zeros(self.params.dims[self._pass], np.uint32)
                add_packed(self._sum, packed, self.params.m)
                self._summed.add(id_)
            case "survivors":
                text = transcript.survivors_text(self._fixed.th1, self._pass, self._shared, self._alive)
                self._signatures[id_] = accept.survivors(id_, body, text)
            case "unmask":
                assert self._unmasking is not None
                count = len(self._fixed.owners(id_, set(self._members)))
                self._unmasking.take(id_, read_shares(body, count))

    def _aborted(self, id_: bytes, abort: Abort) -> NoReturn:
        # Keys and signatures were checked before they were passed on: only what is sealed can be at issue.
        if (
            (self._name, self._pass) == ("vectors", 0)
            and abort.code in _OVER_WHAT_WAS_DEALT
            and abort.culprit in self._fixed.owners(id_, set(self._members) - {id_})
        ):
            self._blame.accuse(id_, abort.culprit)
        raise Refused("aborted", f"{id_.hex()[:8]} goes no further: {abort.code}")
