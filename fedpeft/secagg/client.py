"""The client's half of ``full`` and ``kregular``: from what it kept and a message, to what it keeps and an answer."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from typing_extensions import override

from fedpeft.errors import ProtocolError
from fedpeft.secagg import kept, policy
from fedpeft.secagg.identity import Identity
from fedpeft.secagg.kept import Closed, State
from fedpeft.secagg.messages import (
    SESSION,
    Abort,
    Advert,
    Envelope,
    Kind,
    Parcel,
    enclose,
    read_ids,
    read_signatures,
    rows,
)
from fedpeft.secagg.params import Params
from fedpeft.secagg.protocol import ClientSide, Entropy, Refused, Ring, Step, Vectors
from fedpeft.secagg.roster import Roster
from fedpeft.secagg.states import Advertised, Agreed, Masked, Ready, Shared
from fedpeft.secagg.terms import Expected, History, Policy

_NO_SESSION: Final = bytes(SESSION)


@dataclass(frozen=True, slots=True)
class Client(ClientSide):
    """One client of a suite, whose policy decides. It has one session at a time: a new one ends the one before.

    A step's state must be stored before its answer is sent, and the history know each session by then: a step from a
    state that was kept for too long, or a session whose state was lost, could be answered a second time.
    """

    suite: str
    me: Identity
    roster: Roster
    policy: Policy
    history: History
    expected: Expected

    @override
    def answer(self, state: bytes, message: bytes, surroundings: Vectors, entropy: Entropy) -> Step:
        """The answer to one message of a session. state: what the last step kept, empty at first.

        Never raises for what the server sent: a refusal is a step as well, whose answer is signed and a fixed word.
        A message of another session is refused, and leaves this one as it is.
        """
        before = kept.load(state) if state else None
        session = _NO_SESSION if before is None else kept.session_of_state(before)
        try:
            envelope = Envelope.open(message)
            if envelope.kind == Kind.ASK_KEYS:
                if before is not None and envelope.session == session:
                    raise Refused("replay", "this session has begun already; want a fresh one")
                session = envelope.session
                after, answer = self._keys(envelope, entropy)
            elif before is None or envelope.session != session:
                return Step(state, self._abort(envelope.session, Refused("session", "")), was_refused=True)
            else:
                after, answer = self._next(before, envelope, surroundings, entropy)
        except ProtocolError as error:
            was = error if isinstance(error, Refused) else Refused("malformed", str(error))
            finished = isinstance(before, Closed) and before.session == session and not before.was_refused
            over = Closed(session, was_refused=not finished)
            return Step(kept.dump(over), self._abort(session, was), is_over=True, was_refused=True)
        return Step(kept.dump(after), answer, is_over=isinstance(after, Closed))

    def _abort(self, session: bytes, why: Refused) -> bytes:
        return enclose(Kind.ABORT, session, 0, Abort.of(self.me, session, why.code, why.culprit).to_bytes())

    def _keys(self, envelope: Envelope, entropy: Entropy) -> tuple[State, bytes]:
        params = Params.from_json(bytes(envelope.body))
        if bytes.fromhex(params.session) != envelope.session or envelope.pass_ != 0:
            raise Refused("session", "the parameters are of another session than the message")
        policy.check(params, self.me.id, self.roster, self.policy, self.history, self.expected)
        if params.suite != self.suite:
            raise Refused("suite", f"got suite {params.suite!r}; this client speaks {self.suite!r}")
        after, advert = Advertised.begin(params, self.me, entropy)
        return after, enclose(Kind.KEYS, envelope.session, 0, advert.to_bytes())

    def _next(self, before: State, envelope: Envelope, surroundings: Vectors, entropy: Entropy) -> tuple[State, bytes]:
        session, body, at = envelope.session, envelope.body, envelope.pass_
        match before, envelope.kind:
            case Advertised(params=params), Kind.ASK_SHARES if at == 0:
                adverts = rows(body, Advert.size(len(params.dims)), params.n, "keys")
                self._check_model(params, surroundings)
                shared, dealt = before.share(
                    [Advert.read(row, len(params.dims)) for row in adverts], self.me, self.policy, entropy
                )
                return shared, enclose(Kind.SHARES, session, 0, dealt.to_bytes())
            case Shared(params=params), Kind.ASK_VECTOR if at == 0:
                parcels = rows(body, Parcel.size(len(params.dims)), params.n, "sealed shares")
                ready = before.open([Parcel.read(row, len(params.dims)) for row in parcels], self.me.id)
                return self._vector(ready, session, b"", surroundings)
            case Ready(now=now), Kind.ASK_VECTOR if at == now.pass_:
                if body.nbytes:
                    raise Refused("malformed", f"{body.nbytes} bytes beside what was broadcast; want none")
                return self._vector(before, session, _broadcast(surroundings), surroundings)
            case Masked(now=now), Kind.ASK_SURVIVORS if at == now.pass_ and now.params.consistency:
                agreed = before.agree(read_ids(body, now.params.n), self.me.id, self.policy)
                return agreed, enclose(Kind.SURVIVORS, session, at, self.me.sign(agreed.text))
            case Agreed(now=now), Kind.ASK_UNMASK if at == now.pass_:
                before.check(read_signatures(body, now.params.n))
                return _unmasked(before, session)
            case Masked(now=now), Kind.ASK_UNMASK if at == now.pass_ and not now.params.consistency:
                return _unmasked(before.agree(read_ids(body, now.params.n), self.me.id, self.policy), session)
            case Closed(), _:
                raise Refused("closed", "this session is over for this client")
        raise Refused("phase", f"{envelope.kind.name.lower()} of pass {at} is not what comes after {_name(before)}")

    def _check_model(self, params: Params, surroundings: Vectors) -> None:
        rank = params.rank_by_id.get(self.me.id)
        wanted = set(params.models.values()) if rank is None else {params.models[str(rank)]}
        if _broadcast(surroundings).hex() not in wanted:
            raise Refused("model", "the model that came is not the one that all were told of")

    def _vector(self, ready: Ready, session: bytes, shared: bytes, surroundings: Vectors) -> tuple[State, bytes]:
        pass_, params = ready.now.pass_, ready.now.params
        try:
            vector = surroundings.vector(pass_)
            _check_vector(vector, params.dims[pass_], params.m)
        except ValueError as error:
            raise Refused("vector", f"there is no vector of mine to add: {error}") from error
        masked, packed, signature = ready.mask(vector, shared, self.me)
        return masked, enclose(Kind.VECTOR, session, pass_, signature, packed)


def _unmasked(agreed: Agreed, session: bytes) -> tuple[State, bytes]:
    later, shares = agreed.unmask()
    after = Closed(session, was_refused=False) if later is None else later
    return after, enclose(Kind.UNMASK, session, agreed.now.pass_, *shares)


def _broadcast(surroundings: Vectors) -> bytes:
    try:
        return surroundings.model_hash()
    except RuntimeError as error:
        raise Refused("model", "nothing to train on, or of this pass, came with the message") from error


def _check_vector(vector: Ring, size: int, m: int) -> None:
    if vector.dtype != np.uint32 or vector.shape != (size,):
        raise ValueError(f"a vector of {vector.dtype} and shape {vector.shape}; want uint32, ({size},)")
    if m < 32 and size and int(vector.max()) >> m:
        raise ValueError(f"a vector with numbers from 2^{m} on; want them below it")


def _name(state: State) -> str:
    return type(state).__name__.lower()
