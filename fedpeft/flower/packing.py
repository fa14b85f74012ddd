"""Named tensors and facts as one flat buffer and a manifest, in a Flower RecordDict, and back.

On the wire: an ArrayRecord with one entry, the bytes of all tensors one after the other (little
endian, each aligned to its item size); a ConfigRecord with one entry, the manifest: JSON, deflated,
of the schema version, the kind of parcel, its facts, each tensor's name, dtype and shape, and the
buffer's SHA-256. One tensor per array entry would cost two requests a tensor through a SuperLink;
a parcel costs six, and one more for each further 5 MB.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from typing import Any, TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedpeft.errors import ProtocolError

SCHEMA = 1
LARGEST_MANIFEST = 1 << 24
_RECORDS = ("buffer", "manifest")
_BESIDE = "beside/"
_KEYS = frozenset({"schema", "kind", "facts", "tensors", "digest"})
_DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ["float64", "float32", "float16", "bool"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
} | {"bfloat16": np.dtype("<u2")}

Tensor: TypeAlias = NDArray[Any]
Json: TypeAlias = bool | int | float | str | list[Any] | dict[str, Any] | None


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """What one message holds: its kind, its facts (JSON values) and its tensors, in order."""

    kind: str
    facts: Mapping[str, Json]
    tensors: Mapping[str, Tensor]


def pack(parcel: Parcel, narrow: frozenset[str] = frozenset()) -> RecordDict:
    """A parcel as a Flower record.

    narrow: fp32 tensors to send as bf16, rounded to nearest even, in half the bytes. Tensors whose
    own dtype is bfloat16 travel as they are. Both come back as fp32.
    """
    buffer = bytearray()
    table: list[Json] = []
    for name, x in parcel.tensors.items():
        dtype, flat = _flat(name, x, name in narrow)
        buffer.extend(bytes(-len(buffer) % _DTYPES[dtype].itemsize))
        buffer.extend(flat.view(np.uint8).data)
        table.append([name, dtype, list(x.shape)])
    manifest = {
        "schema": SCHEMA,
        "kind": parcel.kind,
        "facts": dict(parcel.facts),
        "tensors": table,
        "digest": sha256(buffer).hexdigest(),
    }
    text = json.dumps(manifest, separators=(",", ":"), allow_nan=False)
    return _records(bytes(buffer), zlib.compress(text.encode()))


def unpack(content: RecordDict, *kinds: str) -> Parcel:
    """The inverse of ``pack``: tensors are read-only views of the record's buffer.

    Raises ProtocolError, and nothing else, for a record that this schema would not have written or
    that is not of one of these kinds.
    """
    buffer, deflated = _parts(content)
    manifest = _manifest(deflated)
    kind, facts, digest = manifest["kind"], manifest["facts"], manifest["digest"]
    if kind not in kinds:
        raise ProtocolError(f"the message is a {str(kind)[:40]!r}; want {' or '.join(map(repr, kinds))}")
    if not isinstance(facts, dict):
        raise ProtocolError(f"the manifest's facts are a {type(facts).__name__}; want an object")
    places = _places(manifest["tensors"], len(buffer))
    actual = sha256(buffer).hexdigest()
    if digest != actual:
        raise ProtocolError(
            f"the buffer has digest {actual}; want the manifest's, {str(digest)[:64]!r}: it was damaged"
        )
    return Parcel(kind, facts, {name: _view(buffer, *place) for name, place in places.items()})


def glance(content: RecordDict) -> tuple[str, Mapping[str, Json]]:
    """The kind and facts of a parcel, without a look at its buffer. Raises ProtocolError."""
    manifest = _manifest(_parts(content)[1])
    if not isinstance(manifest["kind"], str) or not isinstance(manifest["facts"], dict):
        raise ProtocolError("the manifest has no kind or no facts")
    return manifest["kind"], manifest["facts"]


def payload_bytes(content: RecordDict) -> int:
    """The bytes of a packed record: buffer and manifest, and those of the one that goes with it.

    Flower adds under a kilobyte of its own.
    """
    return sum(len(part) for record in apart(content) if record is not None for part in _parts(record))


def together(content: RecordDict, other: RecordDict) -> RecordDict:
    """A packed record and another that goes with it; the records in it are those of the two, not copies."""
    return RecordDict({**content, **{_BESIDE + name: record for name, record in other.items()}})


def apart(content: RecordDict) -> tuple[RecordDict, RecordDict | None]:
    """The inverse of ``together``, of any record: what is alone comes back with None."""
    beside = {n.removeprefix(_BESIDE): record for n, record in content.items() if n.startswith(_BESIDE)}
    if not beside:
        return content, None
    return RecordDict({n: x for n, x in content.items() if not n.startswith(_BESIDE)}), RecordDict(beside)


def tensor_bytes(content: RecordDict) -> dict[str, int]:
    """The bytes of each tensor in a packed record. Raises ProtocolError."""
    buffer, deflated = _parts(content)
    places = _places(_manifest(deflated)["tensors"], len(buffer))
    return {name: prod(shape) * _DTYPES[dtype].itemsize for name, (dtype, shape, _) in places.items()}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of tensors with their names, dtypes and shapes; the order of names does not count."""
    total = sha256()
    for name in sorted(tensors):
        dtype, flat = _flat(name, tensors[name], False)
        total.update(json.dumps([name, dtype, list(tensors[name].shape)]).encode())
        total.update(flat.view(np.uint8).data)
    return total.hexdigest()


def widen(x: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bf16 bit patterns as the fp32 numbers that they are."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """fp32 numbers as the bit patterns of the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _flat(name: str, x: Tensor, is_narrow: bool) -> tuple[str, Tensor]:
    if is_narrow:
        if x.dtype != np.float32:
            raise ValueError(f"{name}: only float32 is sent as bfloat16; got {x.dtype}")
        return "bfloat16", round_to_bfloat16(x).ravel()
    dtype = x.dtype.name
    if dtype not in _DTYPES:
        raise ValueError(f"{name}: can't send {dtype}; want one of {', '.join(_DTYPES)}")
    flat = np.ascontiguousarray(x).ravel()
    return dtype, flat.view(np.uint16) if dtype == "bfloat16" else flat.astype(_DTYPES[dtype], copy=False)


def _records(buffer: bytes, manifest: bytes) -> RecordDict:
    array = Array(dtype="uint8", shape=(len(buffer),), stype="fedpeft", data=buffer)
    return RecordDict({"buffer": ArrayRecord({"0": array}), "manifest": ConfigRecord({"0": manifest})})


def _parts(content: RecordDict) -> tuple[bytes, bytes]:
    if tuple(sorted(content)) != _RECORDS:
        raise ProtocolError(f"the message holds records {sorted(content)[:5]}; want {list(_RECORDS)}")
    arrays, config = content["buffer"], content["manifest"]
    if not isinstance(arrays, ArrayRecord) or not isinstance(config, ConfigRecord):
        raise ProtocolError("the message's records have the wrong types; want an ArrayRecord and a ConfigRecord")
    if list(arrays) != ["0"] or list(config) != ["0"]:
        raise ProtocolError(f"the records have entries {list(arrays)[:5]} and {list(config)[:5]}; want ['0'] in each")
    buffer, manifest = arrays["0"].data, config["0"]
    if not isinstance(buffer, bytes) or not isinstance(manifest, bytes):
        raise ProtocolError(f"the records hold {type(buffer).__name__} and {type(manifest).__name__}; want bytes")
    return buffer, manifest


def _manifest(deflated: bytes) -> dict[str, Any]:
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(deflated, LARGEST_MANIFEST)
        if not inflate.eof:
            raise ProtocolError(f"the manifest is cut off, or longer than {LARGEST_MANIFEST} bytes")
        manifest = json.loads(text, parse_constant=_refuse_constant)
    except (zlib.error, ValueError, RecursionError) as error:
        raise ProtocolError(f"the manifest is not deflated JSON: {str(error)[:100]}") from None
    if not isinstance(manifest, dict):
        raise ProtocolError(f"the manifest is a {type(manifest).__name__}; want an object")
    schema = manifest.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        raise ProtocolError(f"the message has schema {str(schema)[:40]!r}; want {SCHEMA}: one fedpeft on both sides")
    if manifest.keys() != _KEYS:
        raise ProtocolError(f"the manifest has keys {sorted(manifest)[:9]}; want {sorted(_KEYS)}")
    return manifest


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _places(table: Json, size: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Where each tensor lies: dtype, shape and offset. The buffer must hold them, and nothing else."""
    if not isinstance(table, list):
        raise ProtocolError(f"the manifest's tensors are a {type(table).__name__}; want a list")
    places: dict[str, tuple[str, tuple[int, ...], int]] = {}
    end = 0
    for row in table:
        name, dtype, shape = _row(row)
        if name in places:
            raise ProtocolError(f"the manifest names {name[:80]!r} twice")
        start = end + -end % _DTYPES[dtype].itemsize
        end = start + prod(shape) * _DTYPES[dtype].itemsize
        if end > size:
            raise ProtocolError(f"the buffer has {size} bytes; want at least {end}: it was cut off at {name[:80]!r}")
        places[name] = (dtype, shape, start)
    if end != size:
        raise ProtocolError(f"the buffer has {size} bytes; want {end}, by the manifest's shapes")
    return places


def _row(row: Json) -> tuple[str, str, tuple[int, ...]]:
    if not isinstance(row, list) or len(row) != 3:
        raise ProtocolError(f"a tensor is described by {str(row)[:80]}; want [name, dtype, shape]")
    name, dtype, shape = row
    if not isinstance(name, str):
        raise ProtocolError(f"a tensor's name is {str(name)[:80]}; want a string")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ProtocolError(f"{name[:80]!r} has dtype {str(dtype)[:40]}; want one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(type(n) is int and 0 <= n < 1 << 31 for n in shape):
        raise ProtocolError(f"{name[:80]!r} has shape {str(shape)[:80]}; want at most 16 sizes from 0 to 2^31")
    return name, dtype, tuple(shape)


def _view(buffer: bytes, dtype: str, shape: tuple[int, ...], start: int) -> Tensor:
    x = np.frombuffer(buffer, _DTYPES[dtype], prod(shape), start)
    if dtype == "bfloat16":
        x = widen(x)
        x.flags.writeable = False
    try:
        return x.reshape(shape)
    except ValueError as error:  # an empty tensor whose other sizes multiply beyond the address space
        raise ProtocolError(f"a tensor of shape {shape} can't be: {error}") from None
