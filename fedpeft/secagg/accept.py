"""What the server takes from a client: read to the byte, and checked for who signed it. Refused, naming the client."""

from collections.abc import Collection

from fedpeft.secagg import transcript
from fedpeft.secagg.dealing import Dealing
from fedpeft.secagg.identity import verify
from fedpeft.secagg.messages import Abort, Advert, Dealt, Vector, cut
from fedpeft.secagg.params import Params
from fedpeft.secagg.protocol import Refused


def advert(id_: bytes, body: memoryview, params: Params, known: Collection[bytes]) -> Advert:
    """A client's keys. known: those that others have sent, none of which may be there again."""
    found = Advert.read(body, len(params.dims))
    if found.id != id_:
        raise Refused("id", f"{id_.hex()[:8]} sent the keys of somebody else", id_)
    for key in found.keys:
        transcript.check_key(key, id_)
    if len(set(found.keys)) < len(found.keys) or any(key in known for key in found.keys):
        raise Refused("key-twice", f"{id_.hex()[:8]} sent a key that is there already", id_)
    _check(id_, found.signature, transcript.advert_text(params.ctx, found.keys), "keys")
    return found


def dealt(id_: bytes, body: memoryview, dealing: Dealing) -> Dealt:
    """What a client has dealt to its neighbours."""
    found = Dealt.read(body, len(dealing.around[id_]), len(dealing.params.dims))
    _check(id_, found.signature, transcript.shares_text(dealing.th1, found.commitments), "shares")
    return found


def vector(id_: bytes, body: memoryview, dealing: Dealing, pass_: int) -> memoryview:
    """A masked vector, packed."""
    params = dealing.params
    found = Vector.read(body, params.dims[pass_] * params.m // 8)
    _check(id_, found.signature, transcript.vector_text(dealing.th1, pass_, found.packed), "a vector")
    return found.packed


def survivors(id_: bytes, body: memoryview, text: bytes) -> bytes:
    """A signature on who survived."""
    (found,) = cut(body, [transcript.SIGNATURE], "a signature")
    _check(id_, found, text, "survivors")
    return found


def abort(id_: bytes, body: memoryview, session: bytes) -> Abort:
    """A client's word that it goes no further."""
    found = Abort.read(body)
    if not found.is_of(id_, session):
        raise Refused("signature", f"{id_.hex()[:8]} sent a refusal that it has not signed", id_)
    return found


def _check(id_: bytes, signature: bytes, text: bytes, what: str) -> None:
    if not verify(id_, signature, text):
        raise Refused("signature", f"{id_.hex()[:8]} sent {what} that it has not signed for this session", id_)
