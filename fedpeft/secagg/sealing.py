"""How a mask's seed reaches a second server, and what a client signs of it.

For every pass a client draws a fresh seed, masks its vector with it and seals it to the helper's key, which the roster
has. The server forwards what is sealed; only the helper can open it.
Source: suite FP-SA-1, two servers. X25519 is RFC 7748, ChaCha20-Poly1305 RFC 8439.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedpeft.errors import ProtocolError
from fedpeft.secagg.encoding import V, derive_key, digest, lp, parts
from fedpeft.secagg.identity import ID_SIZE, SIGNATURE_SIZE, Identity, verify
from fedpeft.secagg.masks import Mask
from fedpeft.secagg.messages import is_ascending
from fedpeft.secagg.params import MOST_CLIENTS
from fedpeft.secagg.protocol import Refused
from fedpeft.secagg.transcript import DIGEST, KEY, agree, of_pass, public_of, vector_text

NAME: Final = "twoserver"
SEED: Final = 32
SEALED: Final = KEY + SEED + 16
"""Bytes of a sealed seed: a public key made for it alone, the seed, a tag."""

_NONCE: Final = bytes(12)  # each key seals one seed
_VECTOR_TEXT: Final = len(vector_text(b"", 0, b""))
_REQUEST, _SUM, _REFUSED = b"2s/request", b"2s/sum", b"2s/refused"
_MOST_CODE: Final = 64


@dataclass(frozen=True, slots=True)
class Channel:
    """Which client and pass of which session a seed is for: what every key and signature of it names.

    ctx: the digest of the session's parameters; shared: the digest of what the server broadcast for a pass after the
    first.
    """

    ctx: bytes
    id: bytes
    pass_: int
    shared: bytes

    def mask(self, seed: bytes, sign: int) -> Mask:
        """The mask that this seed gives. Told another ``shared``, the helper's mask is another one."""
        return Mask(derive_key(seed, self.ctx, b"2s" + self.id + self._suffix), sign)

    def seal(self, seed: bytes, helper: bytes, secret: bytes) -> bytes:
        """The seed for the helper alone: ``SEALED`` bytes. helper: its public key; secret: 32 fresh bytes."""
        made = public_of(secret)
        key = self._key(agree(secret, helper, helper), made, helper)
        return made + ChaCha20Poly1305(key).encrypt(_NONCE, seed, self._about)

    def open(self, sealed: bytes, secret: bytes) -> bytes:
        """The seed, for the helper, whose private key this is. Refused, which names the client, for what it sealed for
        nobody, for another client, session or pass."""
        made, box = sealed[:KEY], sealed[KEY:]
        key = self._key(agree(secret, made, self.id), made, public_of(secret))
        try:
            return ChaCha20Poly1305(key).decrypt(_NONCE, box, self._about)
        except InvalidTag:
            raise Refused("seal", f"{self.id.hex()[:8]} sealed what can't be opened", self.id) from None

    def text(self, masked: bytes, sealed: bytes) -> bytes:
        """What the client signs. masked: ``vector_text`` of its masked vector."""
        return V + b"2s" + digest("2s", self.ctx, bytes([self.pass_]), self.shared, self.id, masked, sealed)

    @property
    def _suffix(self) -> bytes:
        return of_pass(self.pass_, self.shared)

    @property
    def _about(self) -> bytes:
        return self.ctx + self.id + self._suffix

    def _key(self, common: bytes, made: bytes, helper: bytes) -> bytes:
        return derive_key(common, self.ctx, b"2s-enc" + self.id + made + helper + self._suffix)


@dataclass(frozen=True, slots=True)
class Entry:
    """One client's sealed seed, with what it signed: masked is ``vector_text`` of its masked vector."""

    id: bytes
    masked: bytes
    sealed: bytes
    signature: bytes

    def check(self, channel: Channel) -> None:
        """Refused, which names the client, unless it has signed this."""
        if len(self.sealed) != SEALED or not verify(self.id, self.signature, channel.text(self.masked, self.sealed)):
            raise Refused("signature", f"{self.id.hex()[:8]} has not signed this seed and vector", self.id)


@dataclass(frozen=True, slots=True)
class Request:
    """What the server asks a helper for: the sum of the masks of these clients. params: the session's, as JSON."""

    params: bytes
    pass_: int
    shared: bytes
    entries: tuple[Entry, ...]

    def to_bytes(self) -> bytes:
        """The message."""
        rows = (part for x in self.entries for part in (x.id, x.masked, x.sealed, x.signature))
        return lp(_REQUEST, self.params, bytes([self.pass_]), self.shared, *rows)

    @classmethod
    def read(cls, message: bytes) -> Self:
        """The request of a message. ProtocolError for what is none; the entries' ids ascend, each once."""
        match parts(message, 4 + 4 * MOST_CLIENTS):
            case [tag, params, pass_, shared, *rows] if tag == _REQUEST and len(pass_) == 1 and len(rows) % 4 == 0:
                entries = tuple(Entry(*rows[i : i + 4]) for i in range(0, len(rows), 4))
            case _:
                raise ProtocolError(f"{len(message)} bytes that are no request for a sum of masks")
        sizes = (ID_SIZE, _VECTOR_TEXT, SEALED, SIGNATURE_SIZE)
        for x in entries:
            if (len(x.id), len(x.masked), len(x.sealed), len(x.signature)) != sizes:
                raise ProtocolError(f"an entry of other sizes than {sizes}")
        if not is_ascending([x.id for x in entries]):
            raise ProtocolError("ids that are not in order, or twice there; want each once, ascending")
        if len(shared) not in (0, DIGEST) or (shared and not pass_[0]):
            raise ProtocolError(f"a digest of {len(shared)} bytes for pass {pass_[0]}; want {DIGEST}, or none")
        return cls(params, pass_[0], shared, entries)


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """A helper's answer: the sum of the masks, for this very request, signed. packed: modulo 2^m."""

    about: bytes
    packed: bytes = field(repr=False)
    helper: bytes
    signature: bytes

    @classmethod
    def of(cls, me: Identity, about: bytes, packed: bytes) -> Self:
        """A signed one. about: the digest of the request, ``about(request)``."""
        return cls(about, packed, me.id, me.sign(_sum_text(about, packed)))

    def to_bytes(self) -> bytes:
        """The message."""
        return lp(_SUM, self.about, self.packed, self.helper, self.signature)

    @property
    def is_signed(self) -> bool:
        """Whether ``helper`` has signed it."""
        return verify(self.helper, self.signature, _sum_text(self.about, self.packed))


def about(request: bytes) -> bytes:
    """What an answer says it answers: a digest."""
    return digest("2s-request", request)


def refusal(request: bytes, error: Refused) -> bytes:
    """What a helper says in place of a sum: a code, and an id where one is to blame."""
    return lp(_REFUSED, about(request), error.code.encode(), error.culprit or b"")


def read_answer(message: bytes, request: bytes) -> Sum:
    """The sum of an answer to this request. Refused with the helper's code and culprit where it gives none;
    ProtocolError for what is no answer to it. Who has signed it is for the caller to check."""
    match parts(message, 5):
        case [tag, to, packed, helper, signature] if tag == _SUM and to == about(request):
            return Sum(to, packed, helper, signature)
        case [tag, to, code, culprit] if tag == _REFUSED and to == about(request):
            said = _word(code)
            named = f", because of {culprit.hex()[:8]}" if culprit else ""
            raise Refused("helper", f"the helper refuses: {said}{named}", culprit or None)
        case _:
            raise ProtocolError(f"{len(message)} bytes that are no answer to this request")


def ids_of(entries: Sequence[Entry]) -> tuple[bytes, ...]:
    """Whose entries they are."""
    return tuple(x.id for x in entries)


def _sum_text(about: bytes, packed: bytes) -> bytes:
    return V + b"2s-sum" + vector_text(about, 0, packed)


def _word(code: bytes) -> str:
    said = code[:_MOST_CODE].decode("ascii", "replace")
    return said if said.isalnum() else "unknown"
