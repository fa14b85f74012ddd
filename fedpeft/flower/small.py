"""Adapters that are told by few numbers, on the wire: those alone. What the others follow from travels once.

Of layers in core form, their cores, and which directions these are between; of a walk, its moves since the start.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters import MOVES, Adapter, Basis, LowRank, Spec, bases, retraced, walk_of
from fedpeft.errors import ProtocolError
from fedpeft.flower.packing import Tensor


def narrowed(adapter: Adapter) -> dict[str, Tensor]:
    """``adapter.tensors()``, with "layer/core" and "layer/at" in place of the factors of layers in core form.

    Of a walk, its moves in place of them all.
    """
    if (moves := walk_of(adapter)) is not None:
        return {MOVES: moves}
    tensors: dict[str, Tensor] = dict(adapter.tensors())
    for name, basis in bases(adapter).items():
        _narrow(tensors, name, adapter.layers[name], basis)
    return tensors


def narrowed_tail(tail: Mapping[str, LowRank], adapter: Adapter) -> dict[str, Tensor]:
    """The same of a tail: where it lies in the adapter's directions, it travels as cores too.

    Those are cores between the directions that the adapter leaves out, of the same width, or one between all.
    """
    tensors: dict[str, Tensor] = dict(Adapter(layers=tail).tensors())
    for name, basis in bases(adapter).items():
        if name in tail:
            for at in _elsewhere(basis):
                if np.array_equal(tail[name].a, basis.right[at.ravel()]):
                    _narrow(tensors, name, tail[name], basis.only(at))
                    break
    return tensors


def widen(spec: Spec, tensors: dict[str, Tensor], fixed: dict[str, Tensor], is_adapter: bool) -> None:
    """Put factors in place of cores: the inverse, by ``fixed``, of what ``narrowed`` and ``narrowed_tail`` do.

    is_adapter: put "layer/at" and moves into ``fixed``, where they belong. Raises ProtocolError for what doesn't fit.
    """
    if is_adapter and (moves := tensors.pop(MOVES, None)) is not None:
        if tensors:
            raise ProtocolError(f"{MOVES} came with {min(tensors)[:80]!r}; want the one or the other")
        fixed[MOVES] = moves
        try:
            tensors |= retraced(fixed, moves)
        except (KeyError, ValueError, TypeError) as error:
            raise ProtocolError(f"{MOVES} does not fit the start that was sent: {error}") from error
    for layer in spec.layers:
        core, at = (tensors.pop(f"{layer.name}/{part}", None) for part in ("core", "at"))
        if core is None or at is None:
            if core is not None or at is not None:
                raise ProtocolError(
                    f"the message has one of {layer.name}/core and {layer.name}/at; want both or neither"
                )
            continue
        try:
            pair = Basis(fixed[f"{layer.name}/left"], fixed[f"{layer.name}/right"], at).pair(core, layer.scale)
        except (KeyError, ValueError, TypeError) as error:
            raise ProtocolError(f"{layer.name}/core does not fit the directions that were sent: {error}") from error
        tensors |= {f"{layer.name}/a": pair.a, f"{layer.name}/b": pair.b}
        if is_adapter:
            fixed[f"{layer.name}/at"] = at


def _narrow(tensors: dict[str, Tensor], name: str, layer: LowRank, basis: Basis) -> None:
    del tensors[f"{name}/a"], tensors[f"{name}/b"]
    tensors[f"{name}/core"] = basis.cores(layer.b).astype(layer.b.dtype)
    tensors[f"{name}/at"] = basis.at


def _elsewhere(basis: Basis) -> Iterator[NDArray[np.integer]]:
    """Directions that a tail may lie in: those of the other cores, and all."""
    count, width = basis.right.shape[0], basis.at.shape[1]
    others = np.setdiff1d(np.arange(count), basis.at)
    if len(others) and len(others) % width == 0:
        yield others.reshape(-1, width)
    yield np.arange(count)[None]
