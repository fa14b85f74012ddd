"""Facts of a manifest, read with their types checked: whatever is wrong is a ProtocolError.

``exactly`` comes first: the others take it for granted that the key is there.
"""

from collections.abc import Collection, Mapping
from math import isfinite
from typing import Any, TypeGuard

import numpy as np

from fedpeft.adapters import Adapter, Array, Layer, LowRank, Spec
from fedpeft.errors import ProtocolError
from fedpeft.flower.packing import Json, Tensor

LARGEST = 1 << 53


def text(facts: Mapping[str, Json], key: str) -> str:
    """A string."""
    x = facts[key]
    if not _is_text(x):
        raise ProtocolError(f"{key} is {str(x)[:60]!r}; want a string")
    return x


def whole(facts: Mapping[str, Json], key: str) -> int:
    """A whole number from 0 to 2^53."""
    x = facts[key]
    if type(x) is not int or not 0 <= x <= LARGEST:
        raise ProtocolError(f"{key} is {str(x)[:60]!r}; want a whole number from 0 to 2^53")
    return x


def claim(facts: Mapping[str, Json], key: str) -> bool:
    """True or false."""
    x = facts[key]
    if not isinstance(x, bool):
        raise ProtocolError(f"{key} is {str(x)[:60]!r}; want true or false")
    return x


def texts(facts: Mapping[str, Json], key: str) -> tuple[str, ...]:
    """A list of strings."""
    x = facts[key]
    if not isinstance(x, list) or not all(_is_text(s) for s in x):
        raise ProtocolError(f"{key} is {str(x)[:60]!r}; want a list of strings")
    return tuple(x)


def _is_text(x: Json) -> TypeGuard[str]:
    """Whether it is a string that can be written: JSON may name halves of characters, which no file takes."""
    return isinstance(x, str) and not any("\ud800" <= c <= "\udfff" for c in x)


def exactly(facts: Mapping[str, Json], keys: Collection[str]) -> None:
    """Refuse a manifest without one of these keys, or with others: those would be ignored."""
    missing, extra = sorted(set(keys) - set(facts)), sorted(set(facts) - set(keys))
    if missing:
        raise ProtocolError(f"the manifest has no {', '.join(missing)}")
    if extra:
        raise ProtocolError(f"the manifest has facts that are not known: {extra[:5]}; want {sorted(keys)}")


def describe(spec: Spec) -> list[Json]:
    """A spec as JSON: [[name, d, k, rank, scale], …], [[name, shape], …]."""
    return [
        [[x.name, x.d, x.k, x.rank, float(x.scale)] for x in spec.layers],
        [[name, list(shape)] for name, shape in spec.dense],
    ]


def spec_of(facts: Mapping[str, Json], key: str) -> Spec:
    """The inverse of ``describe``."""
    x = facts[key]
    if not isinstance(x, list) or len(x) != 2 or not all(isinstance(part, list) for part in x):
        raise ProtocolError(f"{key} is {str(x)[:60]!r}; want [layers, dense]")
    layers = tuple(_layer(row, key) for row in x[0])
    dense = tuple(_leaf(row, key) for row in x[1])
    names = [layer.name for layer in layers] + [name for name, _ in dense]
    if len(set(names)) != len(names):
        raise ProtocolError(f"{key} names a layer or a leaf twice")
    return Spec(layers, dense)


def take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Array:
    """Remove and give a floating-point tensor of this shape."""
    x = tensors.pop(name, None)
    if x is None:
        raise ProtocolError(f"the message has no tensor {name!r}")
    if x.shape != shape or not np.issubdtype(x.dtype, np.floating):
        raise ProtocolError(f"{name!r} is {x.dtype} {x.shape}; want floating-point {shape}")
    return x


def take_all(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove and give all tensors whose names begin so, without the prefix."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def none_left(tensors: Mapping[str, Any]) -> None:
    """Refuse tensors that nobody asked for."""
    if tensors:
        raise ProtocolError(f"the message has tensors that are not wanted: {sorted(tensors)[:3]}")


def adapter_of(spec: Spec, tensors: dict[str, Tensor], fixed: Mapping[str, Tensor]) -> Adapter:
    """Remove the tensors of this spec, as ``Adapter.tensors`` names them, and give the adapter that they make."""
    return Adapter(
        layers={x.name: low_rank(x, tensors, x.name) for x in spec.layers},
        dense={name: take(tensors, name, shape) for name, shape in spec.dense},
        fixed=dict(fixed),
    )


def low_rank(layer: Layer, tensors: dict[str, Tensor], name: str) -> LowRank:
    """Remove the two factors of a layer, and give the pair."""
    a = take(tensors, f"{name}/a", (layer.rank, layer.k))
    b = take(tensors, f"{name}/b", (layer.d, layer.rank))
    return LowRank(a, b, layer.scale)


def _layer(row: Json, key: str) -> Layer:
    match row:
        case [str(name), int(d), int(k), int(rank), int() | float() as scale] if (
            all(type(n) is int and 0 <= n < 1 << 31 for n in (d, k, rank))
            and rank * (d + k) < 1 << 31
            and not isinstance(scale, bool)
            and abs(scale) < 1e30
            and isfinite(scale)
        ):
            return Layer(name, d, k, rank, float(scale))
    raise ProtocolError(f"{key} has the layer {str(row)[:80]!r}; want [name, d, k, rank, scale], not giant")


def _leaf(row: Json, key: str) -> tuple[str, tuple[int, ...]]:
    match row:
        case [str(name), list(shape)] if len(shape) <= 16 and all(type(n) is int and 0 <= n < 1 << 31 for n in shape):
            return name, tuple(shape)
    raise ProtocolError(f"{key} has the leaf {str(row)[:80]!r}; want [name, shape], no size negative or giant")
