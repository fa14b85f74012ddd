"""A graph's frozen weights, read where the base's file is mapped, read-only.

Left to itself onnxruntime maps each weight so that it could be written; and what a process could write counts as its
own where memory is limited (RLIMIT_DATA), though nothing is ever written. A base is most of what a device holds.
Which weights those are is in the graph: its file is read here as far as that takes, so that nothing else need say it.
Source: ONNX, onnx.proto3, for the numbers of fields and types; Protocol Buffers, "Encoding", for their bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.lib.stride_tricks import as_strided

_GRAPH = 7  # of ModelProto
_WEIGHT = 5  # of GraphProto
_DIMS, _KIND, _NAME, _OUTSIDE, _PLACE = 1, 2, 8, 13, 14  # of TensorProto
_EXTERNAL = 1  # a place
_INT4 = 22
_LONGEST = 63  # bits before the last seven of an integer, which has 64
_KINDS: Mapping[int, type[np.generic]] = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    7: np.int64,
    10: np.float16,
    _INT4: np.int8,  # two in a byte
}


@dataclass(frozen=True, slots=True)
class Outside:
    """A weight that is so many bytes of another file. kind: ONNX's number of its type."""

    name: str
    kind: int
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


def mapped(graph: Path, base: Path) -> dict[str, Any]:
    """The weights (``OrtValue``) that a graph reads from a base's file, by name, as its pages: nothing is copied.

    They must live as long as the session that they are added to. ValueError, TypeError, LookupError or OverflowError
    for a graph that is damaged, or that doesn't fit the file.
    """
    pages = np.memmap(base, np.uint8, mode="r")
    return {x.name: _value(x, base.name, pages) for x in outside(graph.read_bytes())}


def outside(content: bytes) -> Iterator[Outside]:
    """The weights of a graph's file that are in other files. Errors as ``mapped``."""
    for number, graph in _fields(memoryview(content)):
        if number == _GRAPH:
            for inner, tensor in _fields(graph):
                if inner == _WEIGHT and (found := _outside(tensor)) is not None:
                    yield found


def _value(x: Outside, file: str, pages: np.memmap[Any, np.dtype[np.uint8]]) -> Any:
    kind = np.dtype(_KINDS[x.kind])
    each = 4 if x.kind == _INT4 else 8 * kind.itemsize
    end = x.offset + x.length
    if x.file != file or not 0 <= x.offset <= end <= len(pages) or 8 * x.length != prod(x.shape) * each:
        raise ValueError(
            f"{x.name}, of shape {x.shape} and type {x.kind}, is to be bytes {x.offset} to {end} of {x.file}; {file} "
            f"has {len(pages)}"
        )
    numbers = np.asarray(pages[x.offset : end]).view(kind)
    if x.kind != _INT4:
        return onnxruntime.OrtValue.ortvalue_from_numpy(numbers.reshape(x.shape))
    # numpy has no such type: a view that says the shape, whose second half nothing reads
    strides = tuple(prod(x.shape[i + 1 :]) for i in range(len(x.shape)))
    said = as_strided(numbers, x.shape, strides, writeable=False)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(said, _INT4)


def _outside(tensor: memoryview) -> Outside | None:
    shape: list[int] = []
    kind, name, place, said = 0, "", 0, dict[str, str]()
    for number, x in _fields(tensor):
        if number == _DIMS:
            shape += [x] if isinstance(x, int) else _integers(x)
        elif number == _KIND:
            kind = x
        elif number == _NAME:
            name = str(x, "utf8")
        elif number == _OUTSIDE:
            key, value = (str(y, "utf8") for _, y in sorted(_fields(x)))
            said[key] = value
        elif number == _PLACE:
            place = x
    if place != _EXTERNAL:
        return None
    return Outside(name, kind, tuple(shape), said["location"], int(said["offset"]), int(said["length"]))


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: an integer, or the bytes of what is none."""
    at = 0
    while at < len(message):
        key, at = _integer(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _integer(message, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            if wire != 2:
                raise ValueError(f"a field of wire type {wire}")
            size, at = _integer(message, at)
        if at + size > len(message):
            raise ValueError(f"a field of {size} bytes, of which {len(message) - at} are there")
        yield number, message[at : at + size]
        at += size


def _integer(message: memoryview, at: int) -> tuple[int, int]:
    """The integer that begins there, seven bits a byte, the lowest first; and where it ends."""
    found, shift = 0, 0
    while True:
        found |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if message[at - 1] < 128:
            return found, at
        if shift > _LONGEST:
            raise ValueError("an integer of more than 64 bits")


def _integers(message: memoryview) -> list[int]:
    found, at = list[int](), 0
    while at < len(message):
        value, at = _integer(message, at)
        found.append(value)
    return found
