"""A base model's tensors in one safetensors file, packed or whole, which processes map into memory and share.

A packed matrix NAME is "NAME.codes" and "NAME.scales" (see ``formats``), any other tensor is in fp32 under its name;
each is in the file once. Every tensor starts at a multiple of 64 bytes: where the one before it ends earlier there is a
tensor of zeros between them, "gap.0" and on, since the format allows no bytes that belong to none. What the file is,
and the digest of its tensors' bytes, is JSON in its metadata. No torch is imported.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from fedpeft.errors import DataError
from fedpeft.training.formats import Format, Packed

ALIGNED = 64
"""Bytes: every tensor starts at a multiple of so many."""

Content: TypeAlias = NDArray[Any] | Packed
"""A tensor as it is, or a matrix that is packed."""

_KEY = "fedpeft"  # of the metadata
_FORMAT = 1  # of the metadata: raise it when that changes
_GAP = "gap."
_KINDS: Mapping[str, type[np.generic]] = {
    "I8": np.int8,
    "U8": np.uint8,
    "F16": np.float16,
    "F32": np.float32,
    "I64": np.int64,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(kind): name for name, kind in _KINDS.items()}
_LARGEST = 100 << 20  # bytes of a header: more is no header
_AT_ONCE = 1 << 20  # bytes that are read for the digest at a time


@dataclass(frozen=True, slots=True)
class Held:
    """A packed matrix in a file. name: of the parameter; columns: of the packed matrix; transposed: whether the model
    has its transpose, (in, out), as Conv1D does."""

    name: str
    format: Format
    columns: int
    transposed: bool

    @property
    def codes(self) -> str:
        return f"{self.name}.codes"

    @property
    def scales(self) -> str:
        return f"{self.name}.scales"


@dataclass(frozen=True, slots=True, eq=False)
class PackedFile:
    """An open file. tensors: by their names in it, mapped read-only; places: where each is, (offset, bytes) from the
    file's start; held: its packed matrices; facts: what the writer said of it."""

    path: Path
    tensors: Mapping[str, NDArray[Any]]
    places: Mapping[str, tuple[int, int]]
    held: tuple[Held, ...]
    facts: Mapping[str, Any]

    def matrix(self, held: Held) -> Packed:
        """A packed matrix, without a copy."""
        return Packed(held.format, held.columns, self.tensors[held.codes], self.tensors[held.scales])

    @property
    def whole(self) -> dict[str, NDArray[Any]]:
        """The tensors that are not packed, by name."""
        packed = {x for y in self.held for x in (y.codes, y.scales)}
        return {n: x for n, x in self.tensors.items() if n not in packed}

    @property
    def formats(self) -> frozenset[str]:
        """What its matrices are held in; none where nothing is packed."""
        return frozenset(x.format for x in self.held)


def parts(
    content: Mapping[str, Content], transposed: frozenset[str] = frozenset(), facts: Mapping[str, Any] | None = None
) -> Iterator[Buffer]:
    """The bytes of a file, to be written one after another.

    content: by parameters' names, in the order of the file; transposed: of these, the packed ones that the model has
    the other way round; facts: JSON-able. ValueError for an array of a type that is not held, and for a name twice.
    """
    flat: dict[str, NDArray[Any]] = {}
    held: list[Held] = []
    for name, x in content.items():
        new = {name: x}
        if isinstance(x, Packed):
            held.append(Held(name, x.format, x.columns, name in transposed))
            new = {held[-1].codes: x.codes, held[-1].scales: x.scales}
        for key, array in new.items():
            if key in flat:
                raise ValueError(f"got two tensors named {key}; want each once")
            flat[key] = np.ascontiguousarray(array)
    header, body = _laid(flat)
    digest = sha256()
    for part in body:
        digest.update(part)
    told = {
        "format": _FORMAT,
        "sha256": digest.hexdigest(),
        "held": [[x.name, x.format, x.columns, x.transposed] for x in held],
        "facts": dict(facts or {}),
    }
    text = json.dumps({"__metadata__": {_KEY: json.dumps(told)}, **header}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    yield len(text).to_bytes(8, "little")
    yield text
    yield from body


def write(
    file: Path,
    content: Mapping[str, Content],
    transposed: frozenset[str] = frozenset(),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Put ``parts`` into a file."""
    with file.open("wb") as stream:
        for part in parts(content, transposed, facts):
            stream.write(part)


def read(file: Path, check: bool = True) -> PackedFile:
    """A file, mapped into memory read-only: its pages are the system's, and those of all processes that map it.

    check: read all of it once, and compare the digest of its tensors' bytes (a fifth of a second for 140 MB).
    DataError for a file that is not ours, is damaged, or has been cut.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_LARGEST, size - 8):
                raise DataError(_damaged(file, "its header is longer than the file"))
            header = json.loads(stream.read(length))
            told = json.loads(header.pop("__metadata__")[_KEY])
            if told["format"] != _FORMAT:
                raise DataError(
                    f"{file}: got a packed base of format {told['format']}; want {_FORMAT}: use the fedpeft that wrote "
                    f"it, or make it again"
                )
            if check:
                digest = sha256()
                while some := stream.read(_AT_ONCE):
                    digest.update(some)
                if digest.hexdigest() != told["sha256"]:
                    raise DataError(_damaged(file, "its tensors are not those that were written"))
        return _mapped(file, 8 + length, size, header, told)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(_damaged(file, " ".join(str(error).split())[:100] or type(error).__name__)) from error


def _laid(flat: Mapping[str, NDArray[Any]]) -> tuple[dict[str, Any], list[Buffer]]:
    """The header of these tensors, and their bytes, with gaps of zeros so that each starts where it should."""
    header: dict[str, Any] = {}
    body: list[Buffer] = []
    end = 0

    def put(name: str, x: NDArray[Any]) -> None:
        nonlocal end
        if x.dtype not in _NAMES:
            raise ValueError(f"{name} is of {x.dtype}; want one of {', '.join(str(np.dtype(k)) for k in _NAMES)}")
        header[name] = {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        body.append(x.data if x.nbytes else b"")
        end += x.nbytes

    for name, x in flat.items():
        gap = -end % ALIGNED
        if gap:
            put(f"{_GAP}{len(header)}", np.zeros(gap, np.uint8))
        put(name, x)
    return header, body


def _mapped(file: Path, start: int, size: int, header: Mapping[str, Any], told: Mapping[str, Any]) -> PackedFile:
    content = np.memmap(file, np.uint8, mode="r")
    tensors: dict[str, NDArray[Any]] = {}
    places: dict[str, tuple[int, int]] = {}
    for name, x in header.items():
        begin, end = x["data_offsets"]
        kind, shape = np.dtype(_KINDS[x["dtype"]]), tuple(int(n) for n in x["shape"])
        if not 0 <= begin <= end <= size - start or prod(shape) * kind.itemsize != end - begin:
            raise DataError(_damaged(file, f"{name} has no room in it"))
        if name.startswith(_GAP):
            continue
        places[name] = start + begin, end - begin
        tensors[name] = np.asarray(content[start + begin : start + end]).view(kind).reshape(shape)
    held = tuple(Held(n, cast(Format, f), int(k), bool(t)) for n, f, k, t in told["held"])
    for x in held:
        if x.codes not in tensors or x.scales not in tensors:
            raise DataError(_damaged(file, f"{x.name} is not in it"))
    return PackedFile(file, tensors, places, held, told["facts"])


def _damaged(file: Path, why: str) -> str:
    return f"{file}: this is no packed base, or it is damaged ({why}); make it again, or copy it again"
