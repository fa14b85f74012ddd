"""What clients answer, as Flower records.

``unpack_…`` raises ProtocolError, and nothing else, for what the other side can't have meant. A
term carries its round and pass, and nothing else of the client but its vector.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedpeft.adapters import Adapter, Array
from fedpeft.channel import Coded, Coding, Sparse
from fedpeft.errors import ProtocolError
from fedpeft.flower import facts as read
from fedpeft.flower.packing import Json, Parcel, Tensor, pack, unpack
from fedpeft.flower.requests import Part, parts_of
from fedpeft.rounds import WHOLE, Metrics

Cause: TypeAlias = Literal["refused", "base", "constants", "failed"]
_CAUSES: tuple[Cause, ...] = get_args(Cause)
_ID = re.compile(r"[0-9a-f]{64}")
MOST = 1 << 28
"""Numbers in an answer, where nothing tells how many there should be."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How many examples a client has of each part."""

    train: int
    validation: int = 0
    test: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Capabilities:
    """What a node says of itself.

    client: its number; base: its fingerprint; counts: of its examples, None where that is not for others to know;
    central: whether it holds the central test set; holds: digests of constants that it has; start: the adapter before
    any training, if it was asked for; rank: how many directions it can train, where the experiment leaves that to each
    client; identity: its id for secure aggregation in hex, "" where it has none.
    """

    client: int
    base: str
    counts: Counts | None
    central: bool = False
    holds: tuple[str, ...] = ()
    start: Adapter | None = None
    rank: int | None = None
    identity: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One client's answer to a request to train: its vector, fp32 or fp64, and what round and pass it is for.

    coded: what travels in its place, where the run has a codec.
    """

    round: int
    pass_: int
    vector: Array
    coded: Coded | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that says why there is none.

    cause: "base" for another base model, "constants" if these must be sent in full, "refused" for a
    message that the client can't accept, "failed" for what went wrong on its side.
    """

    cause: Cause
    reason: str


def pack_capabilities(node: Capabilities) -> RecordDict:
    """The answer to a query; the start adapter goes in full, with its fixed tensors."""
    counts = node.counts
    facts: dict[str, Json] = {
        "client": node.client,
        "base": node.base,
        "examples": None if counts is None else [counts.train, counts.validation, counts.test],
        "central": node.central,
        "holds": list(node.holds),
        "start": None if node.start is None else read.describe(node.start.spec),
        "rank": node.rank,
        "identity": node.identity,
    }
    tensors: dict[str, Tensor] = {}
    if node.start is not None:
        tensors |= {f"adapter/{n}": x for n, x in node.start.tensors().items()}
        tensors |= {f"fixed/{n}": x for n, x in node.start.fixed.items()}
    return pack(Parcel("capabilities", facts, tensors))


def unpack_capabilities(content: RecordDict) -> Capabilities:
    """The inverse of ``pack_capabilities``."""
    parcel = unpack(content, "capabilities")
    facts, tensors = parcel.facts, dict(parcel.tensors)
    read.exactly(facts, ("client", "base", "examples", "central", "holds", "start", "rank", "identity"))
    start = None
    if facts["start"] is not None:
        fixed = read.take_all(tensors, "fixed/")
        mine = read.take_all(tensors, "adapter/")
        start = read.adapter_of(read.spec_of(facts, "start"), mine, fixed)
        read.none_left(mine)
    read.none_left(tensors)
    rank = None if facts["rank"] is None else read.whole(facts, "rank")
    if rank is not None and not 1 <= rank <= WHOLE:
        raise ProtocolError(f"its rank is {rank}; want 1 to {WHOLE}")
    return Capabilities(
        read.whole(facts, "client"),
        read.text(facts, "base"),
        _counts(facts),
        read.claim(facts, "central"),
        read.texts(facts, "holds"),
        start,
        rank,
        _identity(facts),
    )


def _counts(facts: Mapping[str, Json]) -> Counts | None:
    match facts["examples"]:
        case None:
            return None
        case [_, _, _] as found:
            return Counts(*(read.whole({"examples": n}, "examples") for n in found))
    raise ProtocolError(f"examples is {str(facts['examples'])[:60]!r}; want three counts, or null")


def _identity(facts: Mapping[str, Json]) -> str:
    found = read.text(facts, "identity")
    if found and not _ID.fullmatch(found):
        raise ProtocolError(f"identity is {found[:80]!r}; want 64 hex digits, or none")
    return found


def pack_term(term: Term) -> RecordDict:
    """The answer to a request to train. Zeros, of directions that a client does not train, hardly take up room."""
    x = term.vector
    facts: dict[str, Json] = {"round": term.round, "pass": term.pass_, "size": len(x)}
    if term.coded is not None:
        codes = np.frombuffer(term.coded.codes, np.uint8)
        return pack(Parcel("term", facts, {"codes": codes, "rest": term.coded.rest}))
    kept = Sparse.of(x)
    mask = np.frombuffer(zlib.compress(kept.mask.tobytes()), np.uint8)
    is_sparse = mask.nbytes + kept.values.nbytes < x.nbytes
    return pack(Parcel("term", facts, {"mask": mask, "values": kept.values} if is_sparse else {"term": x}))


def unpack_term(content: RecordDict, most: int = MOST, coding: Coding | None = None) -> Term:
    """The inverse of ``pack_term``; whether the vector may be added is for the round to check.

    most: numbers that it may have; the message itself can be far smaller. coding: what it was coded by, None where the
    run has no codec: then none that is coded is taken, and else no other.
    """
    parcel = unpack(content, "term")
    read.exactly(parcel.facts, ("round", "pass", "size"))
    size, found = read.whole(parcel.facts, "size"), parcel.tensors
    if coding is not None:
        vector = _decoded(found, size, most, coding)
        return Term(read.whole(parcel.facts, "round"), read.whole(parcel.facts, "pass"), vector)
    name = "values" if found.keys() == {"mask", "values"} else "term"
    given = found.get(name)
    if (
        len(found) != (2 if name == "values" else 1)
        or given is None
        or given.ndim != 1
        or given.dtype not in (np.float32, np.float64)
    ):
        told = {n: f"{x.dtype} {x.shape}" for n, x in list(found.items())[:3]}
        raise ProtocolError(f"a term holds {told}; want one fp32 or fp64 vector, 'term', or its 'values' and 'mask'")
    if size > most:
        raise ProtocolError(f"the update has shape ({size},); want at most ({most},)")
    vector = given
    if name == "values":
        vector = Sparse.restored(size, _inflated(found["mask"], -(-size // 8)), given).dense()
    elif size != len(vector):
        raise ProtocolError(f"the update has {len(vector)} numbers, and says {size}")
    return Term(read.whole(parcel.facts, "round"), read.whole(parcel.facts, "pass"), vector)


def _decoded(found: Mapping[str, Tensor], size: int, most: int, coding: Coding) -> Array:
    codes, rest = found.get("codes"), found.get("rest")
    if len(found) != 2 or codes is None or rest is None or codes.dtype != np.uint8 or rest.dtype != np.float32:
        raise ProtocolError(f"a coded term holds {sorted(found)[:3]}; want its 'codes', bytes, and 'rest', fp32")
    if rest.ndim != 1 or size != coding.layout.size + len(rest) - coding.behind or size > most:
        raise ProtocolError(f"the update has shape ({size},) and {rest.shape} beside the codes; want at most ({most},)")
    return coding.decode(Coded(codes.tobytes(), rest))


def _inflated(mask: Tensor, size: int) -> NDArray[np.uint8]:
    """A mask of exactly so many bytes. Raises ProtocolError, and makes no more than these."""
    inflate = zlib.decompressobj()
    try:
        found = inflate.decompress(mask.tobytes(), size + 1)
    except zlib.error as error:
        raise ProtocolError(f"the update's mask is not deflated: {error}") from None
    if len(found) != size:
        raise ProtocolError(f"the update's mask has another length than {size} bytes")
    return np.frombuffer(found, np.uint8)


def pack_metrics(metrics: Mapping[Part, Metrics]) -> RecordDict:
    """The answer to a request to evaluate."""
    rows = np.array([x.vector() for x in metrics.values()], np.float64).reshape(-1, 4)
    return pack(Parcel("metrics", {"parts": list(metrics)}, {"metrics": rows}))


def unpack_metrics(content: RecordDict) -> dict[Part, Metrics]:
    """The inverse of ``pack_metrics``: finite sums, no count negative, no more right than predicted."""
    parcel = unpack(content, "metrics")
    read.exactly(parcel.facts, ("parts",))
    parts = parts_of(read.texts(parcel.facts, "parts"), "evaluate")
    tensors = dict(parcel.tensors)
    rows = read.take(tensors, "metrics", (len(parts), 4))
    read.none_left(tensors)
    if not np.isfinite(rows).all():
        raise ProtocolError("an evaluation holds NaN or infinity")
    answers: dict[Part, Metrics] = {part: Metrics.of(row) for part, row in zip(parts, rows, strict=True)}
    for part, x in answers.items():
        if min(x.units, x.correct, x.examples) < 0 or x.correct > x.units:
            raise ProtocolError(f"the evaluation on {part} has impossible counts: {x}")
    return answers


def pack_refusal(refusal: Refusal) -> RecordDict:
    """An answer that says why there is none."""
    return pack(Parcel("error", {"cause": refusal.cause, "reason": refusal.reason[:500]}, {}))


def unpack_refusal(content: RecordDict) -> Refusal:
    """The inverse of ``pack_refusal``; the reason is cut at 500 characters."""
    parcel = unpack(content, "error")
    read.exactly(parcel.facts, ("cause", "reason"))
    read.none_left(parcel.tensors)
    for cause in _CAUSES:
        if cause == read.text(parcel.facts, "cause"):
            return Refusal(cause, read.text(parcel.facts, "reason")[:500])
    raise ProtocolError(f"the cause is {str(parcel.facts['cause'])[:40]!r}; want one of {', '.join(_CAUSES)}")
