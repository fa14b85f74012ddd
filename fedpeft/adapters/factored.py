"""Linear algebra on products of thin matrices, which are never multiplied out."""

from collections.abc import Iterable

import numpy as np

from fedpeft.adapters.layout import Array
from fedpeft.adapters.lowrank import LowRank


def stack(terms: Iterable[tuple[float, LowRank]]) -> tuple[Array, Array]:
    """Factors of ``Σ weight · ΔW``: left (d, R) and right (R, k), fp64, with R the sum of the ranks.

    The scale of each term goes into its left factor, so terms of different scales add up.
    """
    pairs = list(terms)
    if not pairs:
        raise ValueError("a sum of low-rank updates needs at least one; got none")
    left = np.hstack([weight * x.scale * x.b.astype(np.float64) for weight, x in pairs])
    return left, np.vstack([x.a.astype(np.float64) for _, x in pairs])


def factored_svd(left: Array, right: Array) -> tuple[Array, Array, Array]:
    """The thin SVD (u, s, vt) of ``left @ right``, s descending.

    Shapes: left (d, R), right (R, k); u (d, m), s (m,), vt (m, k) with m = min(d, R, k).
    Cost: O((d + k)·R² + R³) in fp64: QR of both sides, then the SVD of an R × R core.
    """
    q, top = np.linalg.qr(left.astype(np.float64))
    p, side = np.linalg.qr(right.T.astype(np.float64))
    u, s, vt = np.linalg.svd(top @ side.T, full_matrices=False)
    return q @ u, s, vt @ p.T


def best_rank(left: Array, right: Array, rank: int, scale: float) -> LowRank:
    """The rank-``rank`` update nearest to ``left @ right`` in Frobenius norm (Eckart–Young), fp64.

    ``b @ a`` times ``scale`` is the product, split evenly: ``aaᵀ`` equals ``bᵀb``. Padded with zeros
    where the product's own rank is smaller, so that its shape does not depend on the data.
    """
    u, s, vt = factored_svd(left, right)
    root = np.sqrt(s[:rank] / scale)
    return LowRank(a=root[:, None] * vt[:rank], b=u[:, :rank] * root, scale=scale).pad(rank)
