"""What a session of secure aggregation is about: public, and the same for everyone who takes part."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from decimal import Decimal
from typing import Any, Self

from fedpeft.errors import ProtocolError
from fedpeft.secagg.encoding import canonical, digest
from fedpeft.secagg.identity import ID_SIZE
from fedpeft.secagg.strict import Fields, array, hexed, parse, shown, text, whole

VERSION = 1
MOST_CLIENTS = (1 << 16) - 1  # a holder's number is written in 2 bytes
MOST_PASSES = 255  # a pass is written in 1 byte, and 0 is the first
_MOST_BYTES = 16 << 20
_MOST_TEXT = 512
_MOST_COUNT = (1 << 31) - 1
_MOST_ENTRIES = 1024
_MOST_TENSORS = 1 << 16
_DIGEST = 32
_SESSION = 16
_DECIMAL = re.compile(r"(0|[1-9][0-9]{0,29})(\.[0-9]{1,60})?")


@dataclass(frozen=True, slots=True)
class Params:
    """What a session is about. The values are those of its JSON; its digest ``ctx`` goes into all keys and signatures.

    v: of the protocol; suite: its name; consistency: whether survivors are agreed on before shares are given out;
    run_id, fl_round, attempt: what it is for; session: 16 random bytes in hex; n: clients asked; t: shares that rebuild
    a secret; k: others that each shares masks with; m: of the ring Z_2^m; bits: of one client's number; range: the
    largest coordinate, clip: the L2 bound ("" for none), weighting: the largest weight, all as decimal strings; dims:
    ring elements of each pass; layout_hash: digest of what is summed; model_hash: ``hash_models(models)`` in hex;
    models: by rank as text, the digest of what a client of this rank receives; base: the frozen model; cohort: ids in
    hex, ascending; ranks: along the cohort, or none where the rule hides them; dp: what is promised of noise
    ("noise_multiplier", a decimal string); deadlines: seconds, by phase; halvings: pass by pass, how often the range
    is halved for each tensor, or none at all, where all numbers have the whole range.
    """

    v: int
    suite: str
    consistency: bool
    run_id: str
    fl_round: int
    attempt: int
    session: str
    n: int
    t: int
    k: int
    m: int
    bits: int
    range: str
    clip: str
    dims: tuple[int, ...]
    layout_hash: str
    model_hash: str
    models: Mapping[str, str]
    base: str
    weighting: str
    cohort: tuple[str, ...]
    ranks: tuple[int, ...] = ()
    dp: Mapping[str, str | int] = field(default_factory=dict)
    deadlines: Mapping[str, int] = field(default_factory=dict)
    halvings: tuple[tuple[int, ...], ...] = ()

    def to_json(self) -> bytes:
        """Canonical JSON: what is sent, and what ``ctx`` is the digest of."""
        return canonical({x: _plain(getattr(self, x)) for x in _KEYS})

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """The parameters that ``to_json`` wrote. ProtocolError, naming the key, for anything else.

        Whether they are agreeable is for a policy to say: ``fedpeft.secagg.policy.check``.
        """
        found = Fields.of(parse(data, _MOST_BYTES, "params"), "params", _KEYS)
        made = cls(
            v=found.whole("v", 0, _MOST_COUNT),
            suite=found.text("suite", _MOST_TEXT),
            consistency=found.flag("consistency"),
            run_id=found.text("run_id", _MOST_TEXT),
            fl_round=found.whole("fl_round", 0, _MOST_COUNT),
            attempt=found.whole("attempt", 0, _MOST_COUNT),
            session=found.hexed("session", _SESSION),
            n=found.whole("n", 1, MOST_CLIENTS),
            t=found.whole("t", 1, MOST_CLIENTS),
            k=found.whole("k", 0, MOST_CLIENTS),
            m=found.whole("m", 1, 32),
            bits=found.whole("bits", 2, 32),
            range=_decimal(found.found["range"], "params.range"),
            clip=_decimal(found.found["clip"], "params.clip") if found.found["clip"] != "" else "",
            dims=found.array("dims", MOST_PASSES, lambda x, name: whole(x, 1, _MOST_COUNT, name)),
            layout_hash=found.hexed("layout_hash", _DIGEST),
            model_hash=found.hexed("model_hash", _DIGEST),
            models=found.table("models", _MOST_ENTRIES, _model),
            base=found.text("base", _MOST_TEXT),
            weighting=_decimal(found.found["weighting"], "params.weighting"),
            cohort=found.array("cohort", MOST_CLIENTS, lambda x, name: hexed(x, ID_SIZE, name)),
            ranks=found.array("ranks", MOST_CLIENTS, lambda x, name: whole(x, 0, _MOST_COUNT, name)),
            dp=found.table("dp", _MOST_ENTRIES, _noise),
            deadlines=found.table("deadlines", _MOST_ENTRIES, _deadline),
            halvings=found.array("halvings", MOST_PASSES, _halvings),
        )
        if made.to_json() != data:
            raise ProtocolError("params: the JSON is not canonical; want sorted keys, no spaces and ASCII")
        return made

    @property
    def ctx(self) -> bytes:
        """The digest that binds every key and signature of the session to these parameters."""
        return digest("ctx", self.to_json())

    @property
    def ids(self) -> tuple[bytes, ...]:
        """The cohort as bytes, ascending."""
        return tuple(bytes.fromhex(x) for x in self.cohort)

    @property
    def rank_by_id(self) -> Mapping[bytes, int]:
        """Who has which rank; empty where the rule hides them."""
        return dict(zip(self.ids, self.ranks, strict=True)) if self.ranks else {}


def hash_models(models: Mapping[str, str]) -> bytes:
    """The digest of all that is sent to clients of some rank, in order of rank: ``bytes.fromhex(model_hash)``.

    models: digests in hex, by rank as decimal text.
    """
    return digest("models", *(int(r).to_bytes(4, "big") + bytes.fromhex(models[r]) for r in sorted(models, key=int)))


def is_decimal(said: str) -> bool:
    """Whether this is how a number that is not negative is written in parameters: no exponent, no sign, no spaces."""
    return _DECIMAL.fullmatch(said) is not None


def decimal(value: float) -> str:
    """A number as the shortest decimal string that is read back as the same float: "0.00001", "4".

    ValueError for what is negative, not finite, 10^30 or more, or so small that it takes more than 60 places.
    """
    said = format(Decimal(repr(float(value))), "f")
    said = said.rstrip("0").rstrip(".") if "." in said else said
    if not is_decimal(said):
        raise ValueError(f"got {value}; want a number that is not negative, of at most 30 digits and 60 places")
    return said


_KEYS = tuple(x.name for x in fields(Params))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _decimal(value: object, name: str) -> str:
    if not isinstance(value, str) or not is_decimal(value):
        raise ProtocolError(f'{name}: got {shown(value)}; want a decimal string such as "0.5"')
    return value


def _model(rank: str, value: object, name: str) -> str:
    if not re.fullmatch(r"0|[1-9][0-9]{0,9}", rank) or int(rank) > _MOST_COUNT:
        raise ProtocolError(f"{name}: no rank; want a whole number from 0 to {_MOST_COUNT}")
    return hexed(value, _DIGEST, name)


def _noise(key: str, value: object, name: str) -> str | int:
    text(key, _MOST_TEXT, f"{name}, the key")
    return whole(value, 0, _MOST_COUNT, name) if type(value) is int else text(value, _MOST_TEXT, name)


def _halvings(value: object, name: str) -> tuple[int, ...]:
    return array(value, _MOST_TENSORS, lambda x, name: whole(x, 0, _MOST_COUNT, name), name)


def _deadline(key: str, value: object, name: str) -> int:
    text(key, _MOST_TEXT, f"{name}, the key")
    return whole(value, 0, _MOST_COUNT, name)
