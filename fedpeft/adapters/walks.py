"""Adapters that are a start and moves along directions that a seed tells: of these, the moves are all that travels."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.adapter import Adapter
from fedpeft.adapters.layout import Array, Layout, Tensors

WALK = "walk/"
"""What the names of the fixed tensors of an adapter in this form begin with."""

MOST = 1 << 20
"""Directions of a pool: what a client that is told of more would have to find room for is no longer few numbers."""

MOVES, _START, _SEED = f"{WALK}moves", f"{WALK}start/", f"{WALK}seed"


@dataclass(frozen=True, slots=True)
class Pool:
    """Directions in the space of all of an adapter's trained tensors that both sides know.

    seed: what they are drawn by; size: how many there are; epsilon: how far along one its slope is measured.
    Each number of a direction is 1 or −1, by a bit of PCG64's raw stream, which numpy promises to keep as it is (normal
    numbers it does not) and which no machine rounds: who has another numpy has the same directions.
    Source of such directions: Spall, IEEE Trans. Automatic Control 37 (1992).
    """

    seed: int
    size: int = 1024
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        for key, good, want in (
            ("seed", self.seed >= 0, "0 or more"),
            ("size", 1 <= self.size <= MOST, f"at least 1 direction, and at most {MOST}"),
            ("epsilon", 0 < self.epsilon < np.inf, "more than 0"),
        ):
            if not good:
                raise ValueError(f"{key}: got {getattr(self, key)}; want {want}")

    def direction(self, number: int, size: int) -> Array:
        """The direction of this number, from 0 on: (size,), fp64, of 1 and −1."""
        seed = int.from_bytes(sha256(f"{self.seed} {number}".encode()).digest()[:8], "little")
        raw = np.random.PCG64(seed).random_raw(-(-size // 64)).astype("<u8")
        signs: Array = np.unpackbits(raw.view(np.uint8))[:size] * 2.0 - 1.0
        return signs

    def moved(self, start: Tensors, moves: Array) -> dict[str, Array]:
        """Tensors so far along each direction: ``start + Σ movesⱼ · directionⱼ``, added up in fp64, each in its dtype.

        moves: (size,). The same arguments give the same bits on any machine. Cost: O(numbers) for each of the
        directions that it moves along; those that it does not are not drawn.
        """
        if moves.shape != (self.size,):
            raise ValueError(f"moves: got {moves.shape}; want ({self.size},)")
        now = flat(start)
        for number in np.flatnonzero(moves).tolist():
            now += float(moves[number]) * self.direction(number, now.size)
        return {n: x.astype(start[n].dtype) for n, x in places(start).unflatten(now).items()}


def places(tensors: Tensors) -> Layout:
    """Where each tensor's numbers are in a direction: by name, so that nobody need hold them in the same order."""
    return Layout(tuple((n, tensors[n].shape) for n in sorted(tensors)))


def flat(tensors: Tensors) -> Array:
    """The tensors as one vector, in fp64."""
    return places(tensors).flatten(tensors).astype(np.float64)


def walk_of(adapter: Adapter) -> Array | None:
    """The moves of an adapter that is in this form; None for another."""
    return adapter.fixed.get(MOVES)


def walked(adapter: Adapter, pool: Pool, moves: Array) -> Adapter:
    """The adapter moved along a pool's directions, in the form of which the moves travel alone.

    One that is in this form already goes on from the same start: the moves of both are added up.
    """
    fixed, before = dict(adapter.fixed), walk_of(adapter)
    if before is None:
        fixed |= {_START + n: x for n, x in adapter.tensors().items()}
        fixed[_SEED] = np.array([pool.seed, pool.size])
        before = np.zeros(pool.size)
    kinds = [x.dtype for x in adapter.tensors().values()]
    fixed[MOVES] = (before + moves).astype(np.result_type(np.float32, *kinds))
    return replace(adapter.put(retraced(fixed, fixed[MOVES])), fixed=fixed)


def retraced(fixed: Mapping[str, NDArray[Any]], moves: Array) -> dict[str, Array]:
    """The tensors that ``walked`` made, from what it keeps as fixed and its moves.

    Raises KeyError or ValueError where there is no start, or the moves don't fit.
    """
    seed, size = fixed[_SEED].tolist()
    start = {n.removeprefix(_START): x for n, x in fixed.items() if n.startswith(_START)}
    return Pool(seed, size).moved(start, moves)
