"""Named tensors as one flat vector, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.floating[Any]]
Tensors: TypeAlias = Mapping[str, Array]
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The names and shapes, in order, of the tensors that a vector holds.

    A layout is public and the same for every client: it may not depend on a client's rank,
    data or training. That is what lets vectors of different clients be added.
    """

    shapes: tuple[tuple[str, Shape], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.shapes]
        if len(set(names)) != len(names):
            raise ValueError(
                f"a layout names each tensor once; got twice: {sorted(n for n in set(names) if names.count(n) > 1)}"
            )

    @property
    def size(self) -> int:
        return sum(prod(shape) for _, shape in self.shapes)

    def __add__(self, other: Self) -> "Layout":
        return Layout(self.shapes + other.shapes)

    def flatten(self, tensors: Tensors) -> Array:
        """One vector of shape (size,). Raises ValueError if a tensor is missing, left over or of another shape."""
        found = {name: x.shape for name, x in tensors.items()}
        if found != dict(self.shapes):
            raise ValueError(f"tensors do not fit the layout: {_difference(found, dict(self.shapes))}")
        if not self.shapes:
            return np.zeros(0)
        return np.concatenate([tensors[name].ravel() for name, _ in self.shapes])

    def unflatten(self, vector: Array) -> dict[str, Array]:
        """The tensors of a vector of shape (size,), as views of it."""
        if vector.shape != (self.size,):
            raise ValueError(f"vector does not fit the layout: got {vector.shape}; want ({self.size},)")
        return {n: vector[at : at + prod(shape)].reshape(shape) for n, (at, shape) in self.places.items()}

    @property
    def places(self) -> dict[str, tuple[int, Shape]]:
        """Where each tensor begins in a vector, and its shape."""
        places: dict[str, tuple[int, Shape]] = {}
        start = 0
        for name, shape in self.shapes:
            places[name] = start, shape
            start += prod(shape)
        return places


def _difference(got: Mapping[str, Shape], want: Mapping[str, Shape]) -> str:
    missing = [n for n in want if n not in got]
    extra = [n for n in got if n not in want]
    wrong = [f"{n} is {got[n]}, want {want[n]}" for n in want if n in got and got[n] != want[n]]
    return "; ".join(
        f"{what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("not wanted", extra), ("wrong shape", wrong))
        if names
    )
