"""A client's states as bytes and back: secret, for a store that nobody else reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from fedpeft.errors import ProtocolError
from fedpeft.secagg.encoding import lp, parts
from fedpeft.secagg.identity import ID_SIZE
from fedpeft.secagg.params import Params
from fedpeft.secagg.shamir import SIZE as SHARE
from fedpeft.secagg.states import Advertised, Agreed, Both, Masked, Ongoing, Ready, Shared
from fedpeft.secagg.transcript import KEY

_MOST: Final = 16


@dataclass(frozen=True, slots=True)
class Closed:
    """A session that is over for this client, for ever. It holds nothing secret."""

    session: bytes
    was_refused: bool


State: TypeAlias = Advertised | Shared | Ready | Masked | Agreed | Closed


def session_of_state(state: State) -> bytes:
    """The session that a client is in, or was in last."""
    match state:
        case Closed(session=session):
            return session
        case Advertised(params=params) | Shared(params=params):
            return bytes.fromhex(params.session)
        case Ready(now=now) | Masked(now=now) | Agreed(now=now):
            return bytes.fromhex(now.params.session)


def dump(state: State) -> bytes:
    """The state as bytes."""
    match state:
        case Closed():
            return lp(b"closed", state.session, bytes([state.was_refused]))
        case Advertised():
            return lp(b"advertised", state.params.to_json(), state.box, b"".join(state.masks))
        case Shared():
            ids, peers = b"".join(state.ids), _table(state.peers)
            secrets, own = _flat(state.secrets), _flat(state.own)
            return lp(b"shared", state.params.to_json(), state.th1, ids, peers, state.box, secrets, own)
        case Ready():
            return lp(b"ready", *_ongoing(state.now))
        case Masked():
            return lp(b"masked", *_ongoing(state.now), state.shared)
        case Agreed():
            return lp(b"agreed", *_ongoing(state.now), state.shared, b"".join(state.survivors))


def load(data: bytes) -> State:
    """The state that ``dump`` wrote. ValueError for other bytes."""
    try:
        return _load(*parts(data, _MOST))
    except (ProtocolError, ValueError, TypeError, IndexError):
        raise ValueError("these bytes are no state of a session; want what the last step kept") from None


def _load(name: bytes, *rest: bytes) -> State:
    match name:
        case b"closed":
            session, was_refused = rest
            return Closed(session, was_refused == b"\1")
        case b"advertised":
            json, box, masks = rest
            return Advertised(Params.from_json(json), box, tuple(_rows(masks, KEY)))
        case b"shared":
            json, th1, ids, peers, box, secrets, own = rest
            params = Params.from_json(json)
            keys = {row[0]: row[1:] for row in _split(peers, 2 + len(params.dims), ID_SIZE, KEY)}
            return Shared(params, th1, tuple(_rows(ids, ID_SIZE)), keys, box, _pairs(secrets, KEY), _pairs(own, SHARE))
        case b"ready":
            return Ready(_read(rest))
        case b"masked":
            return Masked(_read(rest[:-1]), rest[-1])
        case b"agreed":
            return Agreed(_read(rest[:-2]), rest[-2], tuple(_rows(rest[-1], ID_SIZE)))
    raise ValueError(name)


def _ongoing(now: Ongoing) -> tuple[bytes, ...]:
    held = b"".join(u + _flat(both) for u, both in now.held.items())
    header = bytes([now.pass_, len(now.secrets)])
    members = b"".join(now.members)
    return now.params.to_json(), now.th1, header, members, held, _table(now.keys), _flat(now.secrets)


def _read(fields: Sequence[bytes]) -> Ongoing:
    json, th1, (pass_, left), members, held, keys, secrets = fields
    params = Params.from_json(json)
    shares = _split(held, 1 + 2 * (len(params.dims) - pass_), ID_SIZE, SHARE)
    return Ongoing(
        params=params,
        th1=th1,
        pass_=pass_,
        members=tuple(_rows(members, ID_SIZE)),
        held={row[0]: _twos(row[1:]) for row in shares},
        keys={row[0]: row[1:] for row in _split(keys, 1 + left, ID_SIZE, KEY)},
        secrets=_pairs(secrets, KEY),
    )


def _table(rows: Mapping[bytes, tuple[bytes, ...]]) -> bytes:
    return b"".join(id_ + b"".join(keys) for id_, keys in rows.items())


def _split(data: bytes, columns: int, first: int, other: int) -> list[tuple[bytes, ...]]:
    size = first + (columns - 1) * other
    return [(row[:first], *_rows(row[first:], other)) for row in _rows(data, size)]


def _flat(pairs: Sequence[Both]) -> bytes:
    return b"".join(one for both in pairs for one in both)


def _pairs(data: bytes, size: int) -> tuple[Both, ...]:
    return _twos(_rows(data, size))


def _twos(flat: Sequence[bytes]) -> tuple[Both, ...]:
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _rows(data: bytes, size: int) -> list[bytes]:
    if len(data) % size:
        raise ValueError(size)
    return [data[i : i + size] for i in range(0, len(data), size)]
