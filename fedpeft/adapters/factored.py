"""Linear algebra on products of thin matrices, which are never multiplied out."""

from collections.abc import Iterable

import numpy as np

from fedpeft.adapters.layout import Array
from fedpeft.adapters.lowrank import LowRank

ROW = 3**-0.5
"""The norm of the rows of a LoRA's ``a`` as it is usually drawn: uniform in ±1/√k, so k numbers of variance 1/(3k)."""

ROUNDING = 1e-13
"""A singular value below this, relative to the largest, is nothing but the rounding of fp64 sums."""

SMALLEST, NOTHING = 2**-46, 2**-86
"""Eigenvalues of a Gram matrix of unit columns that are its rounding: relative to the largest, and whatever that is."""

BLOCKS = 5
"""Blocks of a Krylov space; more are nearer to the best, and slower."""


def stack(terms: Iterable[tuple[float, LowRank]]) -> tuple[Array, Array]:
    """Factors of ``Σ weight · ΔW``: left (d, R) and right (R, k), fp64, with R the sum of the ranks.

    The scale of each term goes into its left factor, so terms of different scales add up.
    """
    pairs = list(terms)
    if not pairs:
        raise ValueError("a sum of low-rank updates needs at least one; got none")
    left = np.hstack([weight * x.scale * x.b.astype(np.float64) for weight, x in pairs])
    return left, np.vstack([x.a.astype(np.float64) for _, x in pairs])


def drift(new: LowRank, old: LowRank) -> tuple[Array, Array]:
    """Factors of ``ΔW of new − ΔW of old``: left (d, 2r) and right (2r, k), fp64, with r the larger rank.

    By ``ba − b₀a₀ = (b − b₀)a + b₀(a − a₀)``: where nothing has changed it is zero to the last bit, and where little
    has, no digit is lost.
    """
    rank = max(new.rank, old.rank)
    new, old = new.pad(rank), old.pad(rank)
    b, b_old = new.scale * new.b.astype(np.float64), old.scale * old.b.astype(np.float64)
    a = new.a.astype(np.float64)
    return np.hstack([b - b_old, b_old]), np.vstack([a, a - old.a])


def factored_svd(left: Array, right: Array) -> tuple[Array, Array, Array]:
    """The thin SVD (u, s, vt) of ``left @ right``, s descending.

    Shapes: left (d, R), right (R, k); u (d, m), s (m,), vt (m, k) with m = min(d, R, k).
    Cost: O((d + k)·R² + R³) in fp64: QR of both sides, then the SVD of an R × R core.
    """
    q, top = np.linalg.qr(left.astype(np.float64))
    p, side = np.linalg.qr(right.T.astype(np.float64))
    u, s, vt = np.linalg.svd(top @ side.T, full_matrices=False)
    return q @ u, s, vt @ p.T


def top_svd(left: Array, right: Array, rank: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """The first ``rank`` triples of ``factored_svd``, in a fraction of its time where the stack is many times wider.

    Shapes: left (d, R), right (R, k); u (d, m), s (m,), vt (m, k) with m = min(rank, d, R, k).
    Where R, d and k are above 2·5·(rank + 8), from a block Krylov space of 5 blocks that starts at random: the product
    of the triples is then further from ``left @ right`` than the best by less than a thousandth, and mostly by nothing
    that can be seen. Cost: O((d + k)·R·rank). Source: Musco & Musco, arXiv:1504.05477, algorithm 2.
    """
    d, k, width = left.shape[0], right.shape[1], rank + 8
    if 2 * BLOCKS * width >= min(d, left.shape[1], k):
        u, s, vt = factored_svd(left, right)
        return u[:, :rank], s[:rank], vt[:rank]
    seen = rng.normal(size=(k, width))
    q, p = np.zeros((d, 0)), np.zeros((k, 0))
    for _ in range(BLOCKS):
        block = orthonormal(left @ (right @ seen), q)
        seen = right.T @ (left.T @ block)
        q, p = np.hstack([q, block]), np.hstack([p, seen])
    side = orthonormal(p)
    if side.shape[1] < rank:  # the product's own rank is lower: only the whole decomposition completes its directions
        u, s, vt = factored_svd(left, right)
        return u[:, :rank], s[:rank], vt[:rank]
    u, s, vt = np.linalg.svd(p.T @ side)
    return q @ u[:, :rank], s[:rank], vt[:rank] @ side.T


def orthonormal(x: Array, beside: Array | None = None) -> Array:
    """Orthonormal columns that span what the columns of ``x`` (d, w) do beyond those of ``beside``.

    beside: orthonormal columns (d, n). As many as the rank of what is left: directions with less than about 1e-7 of
    the strongest one's length are left out, as is rounding. By the eigenvectors of the Gram matrix of columns of equal
    length, which for thin matrices takes a tenth of a QR's time; twice, since one time is orthonormal only to the
    square of the condition. Source: Stathopoulos & Wu, SIAM J. Sci. Comput. 23 (2002), 2165, section 2 (SVQB).
    """
    lengths = np.linalg.norm(x, axis=0)
    x = x[:, lengths > 0] / lengths[lengths > 0]
    for _ in range(2):
        if beside is not None:
            x = x - beside @ (beside.T @ x)
        values, vectors = np.linalg.eigh(x.T @ x)
        real = (values > SMALLEST * values[-1:]) & (values > NOTHING)
        x = x @ (vectors[:, real] / np.sqrt(values[real]))
    return x


def best_rank(left: Array, right: Array, rank: int, scale: float) -> LowRank:
    """The rank-``rank`` update nearest to ``left @ right`` in Frobenius norm (Eckart–Young), fp64.

    ``b @ a`` times ``scale`` is the product, split evenly: ``aaᵀ`` equals ``bᵀb``. Padded with zeros
    where the product's own rank is smaller, so that its shape does not depend on the data.
    """
    u, s, vt = factored_svd(left, right)
    root = np.sqrt(s[:rank] / scale)
    return LowRank(a=root[:, None] * vt[:rank], b=u[:, :rank] * root, scale=scale).pad(rank)


def orthogonal(left: Array, right: Array, rank: int, scale: float, length: float = ROW) -> LowRank:
    """The rank-``rank`` update nearest to ``left @ right``, as ``best_rank``, with all singular values in ``b``.

    Rows of ``a`` are orthogonal and of norm ``length``, whatever the product: a direction that it lacks can still be
    trained, for its row of ``a`` is not zero (unless rank is above d or k, where there is no further direction).
    """
    u, s, vt = factored_svd(left, right)
    return LowRank(a=length * vt[:rank], b=u[:, :rank] * (s[:rank] / (length * scale)), scale=scale).pad(rank)


def compress(left: Array, right: Array, energy: float = 1.0, rank: int | None = None) -> LowRank:
    """``left @ right`` in the fewest directions that hold this share of its energy, at most ``rank``; fp64, scale 1.

    The energy is the sum of the squared singular values. Directions that are nothing but rounding are always left
    out. Rows of ``a`` are orthonormal.
    """
    u, s, vt = factored_svd(left, right)
    real = np.count_nonzero(s > ROUNDING * s[:1])
    if real and energy != 1:
        held = np.cumsum(s**2)
        real = np.count_nonzero(held < energy * held[-1]) + 1
    kept = real if rank is None else min(real, rank)
    return LowRank(a=vt[:kept], b=u[:, :kept] * s[:kept], scale=1.0)
