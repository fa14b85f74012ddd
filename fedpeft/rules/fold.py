"""Products that are folded into the tail, in factored form: base weights are never written."""

import numpy as np

from fedpeft.adapters import Array, LowRank, compress


def check_threshold(energy: float, rank: int | None) -> None:
    """Raise ValueError for a share of energy or a largest rank of a tail that can't be."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy: got {energy}; want more than 0 and at most 1, which keeps all")
    if rank is not None and rank < 1:
        raise ValueError(f"largest: got {rank}; want at least 1 direction, or leave it out")


def fold(tail: LowRank | None, left: Array, right: Array, energy: float, largest: int | None) -> LowRank:
    """The tail with ``left @ right`` added, cut first to this share of its energy.

    Its rank is at most ``largest``; without that it grows, round after round, to min(d, k). fp64, scale 1.
    """
    new = compress(left, right, energy)
    old = new.cut(0) if tail is None else tail.at(1.0)
    return compress(np.hstack([old.b, new.b]), np.vstack([old.a, new.a]), rank=largest)


def as_kept(x: LowRank, like: LowRank) -> LowRank:
    """Its factors in the dtypes of those of ``like``: what travels, and what a checkpoint holds."""
    return LowRank(x.a.astype(like.a.dtype), x.b.astype(like.b.dtype), x.scale)
