"""A client's half of ``twoserver``: a masked vector, and the seed of its mask sealed to the helper."""

from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from fedpeft.errors import ProtocolError
from fedpeft.secagg.encoding import lp, parts
from fedpeft.secagg.identity import Identity
from fedpeft.secagg.masks import add_masks
from fedpeft.secagg.messages import SESSION, Abort, Envelope, Kind, enclose
from fedpeft.secagg.params import Params
from fedpeft.secagg.policy import check
from fedpeft.secagg.protocol import ClientSide, Entropy, Refused, Ring, Step, Vectors
from fedpeft.secagg.ring import pack
from fedpeft.secagg.roster import Roster
from fedpeft.secagg.sealing import NAME, SEED, Channel
from fedpeft.secagg.terms import Expected, History, Policy
from fedpeft.secagg.transcript import KEY, vector_text


@dataclass(frozen=True, slots=True)
class Sender(ClientSide):
    """One client. It keeps the session and which pass comes next, and nothing that is secret."""

    me: Identity
    roster: Roster
    policy: Policy
    history: History
    expected: Expected

    @override
    def answer(self, state: bytes, message: bytes, surroundings: Vectors, entropy: Entropy) -> Step:
        """The answer to one message. A new session ends the one before; a message of another session, that begins none,
        is refused and leaves this one as it is.

        The history must know each session from before its first answer is sent.
        """
        session, ctx, next_ = _opened(state)
        try:
            asked = Envelope.open(message)
            if asked.session != session:
                if asked.kind != Kind.ASK_VECTOR or asked.pass_:
                    return Step(state, self._abort(asked.session, "session"), was_refused=True)
                session, ctx, next_ = asked.session, b"", 0
            return self._vector(asked, ctx, next_, surroundings, entropy)
        except ProtocolError as error:
            code = error.code if isinstance(error, Refused) else "malformed"
            return Step(lp(session, b"", b""), self._abort(session, code), is_over=True, was_refused=True)

    def _abort(self, session: bytes, code: str) -> bytes:
        return enclose(Kind.ABORT, session, 0, Abort.of(self.me, session, code, None).to_bytes())

    def _vector(self, asked: Envelope, ctx: bytes, next_: int | None, surroundings: Vectors, entropy: Entropy) -> Step:
        if next_ is None:
            raise Refused("closed", "this session is over for this client")
        if asked.kind != Kind.ASK_VECTOR or asked.pass_ != next_:
            raise Refused("phase", f"{asked.kind.name.lower()} of pass {asked.pass_}; want a question for pass {next_}")
        params = Params.from_json(bytes(asked.body))
        if bytes.fromhex(params.session) != asked.session or (next_ and params.ctx != ctx):
            raise Refused("session", "the parameters are not those of this session")
        if not next_:
            check(params, self.me.id, self.roster, self.policy, self.history, self.expected)
            if params.suite != NAME:
                raise Refused("suite", f"got suite {params.suite!r}; this client speaks {NAME!r}")
        shared = self._received(params, next_, surroundings)
        channel = Channel(params.ctx, self.me.id, next_, shared)
        answer = self._masked(channel, _own(surroundings, params, next_), params.m, entropy)
        is_over = next_ + 1 == len(params.dims)
        after = lp(asked.session, params.ctx, b"" if is_over else bytes([next_ + 1]))
        return Step(after, enclose(Kind.VECTOR, asked.session, next_, *answer), is_over)

    def _received(self, params: Params, pass_: int, surroundings: Vectors) -> bytes:
        """The digest of what was broadcast for a pass after the first. Refused where the first brought another model
        than the parameters say."""
        try:
            got = surroundings.model_hash()
        except RuntimeError as error:
            raise Refused("model", "nothing to train on, or of this pass, came with the message") from error
        if pass_:
            return got
        rank = params.rank_by_id.get(self.me.id)
        if got.hex() not in (params.models.values() if rank is None else (params.models[str(rank)],)):
            raise Refused("model", "the model that came is not the one that all were told of")
        return b""

    def _masked(self, channel: Channel, vector: Ring, m: int, entropy: Entropy) -> tuple[bytes, ...]:
        """The body of an answer. The seed is nowhere else but in it, sealed; vector: masked in place."""
        seed, secret = entropy(SEED), entropy(KEY)
        assert self.roster.helper is not None  # checked with the parameters
        sealed = channel.seal(seed, self.roster.helper, secret)
        add_masks(vector, [channel.mask(seed, 1)])
        packed = pack(vector, m)
        signature = self.me.sign(channel.text(vector_text(channel.ctx, channel.pass_, packed), sealed))
        return sealed, signature, packed


def _opened(state: bytes) -> tuple[bytes, bytes, int | None]:
    """The session, what it is about, and the pass that comes next; None where it is over."""
    if not state:
        return bytes(SESSION), b"", 0
    session, ctx, next_ = parts(state, 3)
    return session, ctx, next_[0] if next_ else None


def _own(surroundings: Vectors, params: Params, pass_: int) -> Ring:
    """A copy of this client's vector. Refused where it has none that fits."""
    try:
        vector = np.array(surroundings.vector(pass_))
    except ValueError as error:
        raise Refused("vector", f"there is no vector of mine to add: {error}") from error
    if vector.dtype != np.uint32 or vector.shape != (params.dims[pass_],):
        raise Refused("vector", f"mine is {vector.dtype} {vector.shape}; want uint32 ({params.dims[pass_]},)")
    return vector
