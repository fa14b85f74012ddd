"""Algebra on factors against dense numpy."""

import numpy as np
import pytest

from fedpeft.adapters import LowRank, best_rank, factored_svd, stack

RNG = np.random.default_rng(0)


def low_rank(d: int, k: int, r: int, scale: float, dtype: type = np.float64) -> LowRank:
    return LowRank(RNG.normal(size=(r, k)).astype(dtype), RNG.normal(size=(d, r)).astype(dtype), scale)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_stack_is_the_weighted_sum_of_products_with_unequal_ranks_and_scales(dtype):
    terms = [
        (0.25, low_rank(7, 5, 1, 2.0, dtype)),
        (-1.5, low_rank(7, 5, 4, 0.5, dtype)),
        (3.0, low_rank(7, 5, 2, 8.0, dtype)),
    ]
    left, right = stack(terms)
    assert left.shape == (7, 7)
    assert right.shape == (7, 5)
    assert left.dtype == right.dtype == np.float64
    want = sum(p * x.scale * (x.b.astype(float) @ x.a.astype(float)) for p, x in terms)
    np.testing.assert_allclose(left @ right, want, atol=1e-12)


def test_a_stack_takes_any_iterable_and_refuses_an_empty_one():
    left, right = stack((1.0, x) for x in [low_rank(4, 3, 2, 1.0)])
    assert (left.shape, right.shape) == ((4, 2), (2, 3))
    with pytest.raises(ValueError, match="a sum of low-rank updates needs at least one; got none"):
        stack([])


# (d, R, k): thin, R above d, R above k, R above both
SIZES = [(9, 3, 6), (4, 5, 8), (8, 6, 5), (3, 7, 4)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_factored_svd_is_the_dense_svd(size, dtype):
    d, inner, k = size
    left, right = RNG.normal(size=(d, inner)).astype(dtype), RNG.normal(size=(inner, k)).astype(dtype)
    u, s, vt = factored_svd(left, right)
    m = min(size)
    assert (u.shape, s.shape, vt.shape) == ((d, m), (m,), (m, k))
    assert u.dtype == s.dtype == vt.dtype == np.float64
    dense = left.astype(np.float64) @ right.astype(np.float64)
    np.testing.assert_allclose((u * s) @ vt, dense, atol=1e-12)  # entries of order 1; double precision, few terms
    np.testing.assert_allclose(s, np.linalg.svd(dense, compute_uv=False)[:m], atol=1e-12)
    np.testing.assert_allclose(u.T @ u, np.eye(m), atol=1e-12)
    np.testing.assert_allclose(vt @ vt.T, np.eye(m), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_best_rank_is_the_truncated_dense_svd_split_evenly(size, rank, scale):
    d, inner, k = size
    left, right = RNG.normal(size=(d, inner)), RNG.normal(size=(inner, k))
    got = best_rank(left, right, rank, scale)
    assert (got.a.shape, got.b.shape, got.scale) == ((rank, k), (d, rank), scale)
    u, s, vt = np.linalg.svd(left @ right, full_matrices=False)
    np.testing.assert_allclose(scale * got.b @ got.a, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-11)
    np.testing.assert_allclose(got.a @ got.a.T, np.diag(s[:rank]) / scale, atol=1e-11)
    np.testing.assert_allclose(got.b.T @ got.b, np.diag(s[:rank]) / scale, atol=1e-11)


def test_best_rank_pads_a_product_of_a_smaller_rank_with_zeros():
    left, right = RNG.normal(size=(9, 2)), RNG.normal(size=(2, 6))
    got = best_rank(left, right, 5, 0.5)
    assert got.rank == 5
    np.testing.assert_array_equal(got.a[2:], np.zeros((3, 6)))
    np.testing.assert_array_equal(got.b[:, 2:], np.zeros((9, 3)))
    np.testing.assert_allclose(got.product(), left @ right, atol=1e-12)
