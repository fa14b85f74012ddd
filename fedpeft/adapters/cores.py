"""Layers in core form: small cores between frozen directions, of which only the cores are trained."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.adapter import Adapter
from fedpeft.adapters.layout import Array, Tensors
from fedpeft.adapters.lowrank import LowRank
from fedpeft.adapters.walks import MOVES, WALK

CORES = ("core", "heads")
"""What a rule says that clients train where it is cores: these alone, or each with a scale of its own."""

_LEFT, _RIGHT, _AT = "left", "right", "at"


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """The frozen directions around a layer's h cores: ``ΔW = scale · Σᵢ left[:, atᵢ] @ coreᵢ @ right[atᵢ]``.

    Shapes: left (d, R), right (R, k), at (h, r), which says the directions that each core (r, r) is between. As a pair
    of rank h·r: ``a`` is right[at], and the i-th r columns of ``b`` are left[:, atᵢ] @ coreᵢ. The columns of ``left``
    at one core are orthonormal, or zero, so that b tells what the cores are.
    """

    left: Array
    right: Array
    at: NDArray[np.integer[Any]]

    def __post_init__(self) -> None:
        count = self.right.shape[0]
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != count:
            raise ValueError(
                f"bases do not match: left is {self.left.shape}, right is {self.right.shape}; want R of each"
            )
        is_index = self.at.ndim == 2 and np.issubdtype(self.at.dtype, np.integer)
        if not is_index or (self.at < 0).any() or (self.at >= count).any():
            raise ValueError(f"at: got {self.at.dtype} {self.at.shape}; want (h, r) whole numbers from 0 below {count}")

    @property
    def lefts(self) -> Array:
        """The left directions of each core, (h, d, r)."""
        each: Array = self.left.T[self.at]
        return each.transpose(0, 2, 1)

    def only(self, at: NDArray[np.integer[Any]]) -> "Basis":
        """The same directions around other cores."""
        return replace(self, at=at)

    def cores(self, b: Array) -> Array:
        """The cores (h, r, r) of a ``b`` (d, h·r), in fp64; linear in b, of which it sees what lies in ``left``."""
        heads, width = self.at.shape
        blocks = b.astype(np.float64).reshape(len(b), heads, width).transpose(1, 0, 2)
        return self.lefts.transpose(0, 2, 1) @ blocks

    def b(self, cores: Array) -> Array:
        """The inverse of ``cores``, in fp64. ValueError for cores that are not (h, r, r)."""
        heads, width = self.at.shape
        if cores.shape != (heads, width, width):
            raise ValueError(f"cores: got {cores.shape}; want {(heads, width, width)}")
        blocks = self.lefts @ cores.astype(np.float64)
        return blocks.transpose(1, 0, 2).reshape(self.left.shape[0], self.at.size)

    def pair(self, cores: Array, scale: float) -> LowRank:
        """The layer with these cores (h, r, r), in the dtype of ``left``."""
        return LowRank(self.right[self.at.ravel()], self.b(cores).astype(self.left.dtype), scale)


def bases(adapter: Adapter) -> dict[str, Basis]:
    """The basis of each layer that is in core form."""
    return {n: basis_of(adapter, n) for n in adapter.layers if f"{n}/{_AT}" in adapter.fixed}


def basis_of(adapter: Adapter, name: str) -> Basis:
    """The basis of a layer that is in core form. Raises KeyError for another."""
    return Basis(*(adapter.fixed[f"{name}/{part}"] for part in (_LEFT, _RIGHT, _AT)))


def cored(adapter: Adapter, basis: Mapping[str, Basis], cores: Tensors) -> Adapter:
    """The adapter with these layers in core form: on these bases, with these cores (h, r, r)."""
    fixed = dict(adapter.fixed)
    layers = dict(adapter.layers)
    for name, x in basis.items():
        fixed |= {f"{name}/{_LEFT}": x.left, f"{name}/{_RIGHT}": x.right, f"{name}/{_AT}": x.at}
        layers[name] = x.pair(cores[name], layers[name].scale)
    return replace(adapter, layers=layers, fixed=fixed)


def drawn(adapter: Adapter) -> dict[str, NDArray[Any]]:
    """The fixed tensors without those of bases and walks: what the method itself drew at random."""
    mine = {f"{n}/{part}" for n in bases(adapter) for part in (_LEFT, _RIGHT, _AT)}
    return {n: x for n, x in adapter.fixed.items() if n not in mine and not n.startswith(WALK)}


def lasting(adapter: Adapter) -> dict[str, NDArray[Any]]:
    """The fixed tensors without those of a client's directions and moves: the same for all, in every round."""
    choices = {MOVES} | {f"{n}/{_AT}" for n in adapter.layers}
    return {n: x for n, x in adapter.fixed.items() if n not in choices}
