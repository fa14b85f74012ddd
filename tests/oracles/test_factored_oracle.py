"""Algebra on factors against dense numpy."""

import numpy as np
import pytest

from fedpeft.adapters import LowRank, best_rank, compress, drift, factored_svd, orthogonal, stack, top_svd

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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("ranks", "scales"), [((3, 3), (2.0, 2.0)), ((1, 4), (0.5, 3.0)), ((4, 2), (-1.0, 0.25))])
def test_a_drift_is_the_difference_of_two_products(dtype, ranks, scales):
    new, old = (low_rank(7, 5, r, s, dtype) for r, s in zip(ranks, scales, strict=True))
    left, right = drift(new, old)
    assert (left.shape, right.shape) == ((7, 2 * max(ranks)), (2 * max(ranks), 5))
    assert left.dtype == right.dtype == np.float64
    want = new.scale * new.b.astype(float) @ new.a.astype(float) - old.scale * old.b.astype(float) @ old.a.astype(float)
    np.testing.assert_allclose(left @ right, want, atol=1e-12)


def test_a_drift_is_zero_where_nothing_changed_and_loses_no_digit_where_little_did():
    x = low_rank(7, 5, 2, 3.0)
    left, right = drift(x, x)
    assert not (left @ right).any()
    near = LowRank(x.a, x.b + 1e-12 * np.ones((7, 2)), 3.0)
    left, right = drift(near, x)
    np.testing.assert_allclose(left @ right, 3e-12 * np.ones((7, 2)) @ x.a, rtol=1e-3, atol=1e-15)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("scale", "length"), [(0.5, 3**-0.5), (4.0, 1.0)])
def test_orthogonal_is_the_truncated_dense_svd_with_all_values_in_b(size, rank, scale, length):
    d, inner, k = size
    left, right = RNG.normal(size=(d, inner)), RNG.normal(size=(inner, k))
    got = orthogonal(left, right, rank, scale) if length < 1 else orthogonal(left, right, rank, scale, length)
    u, s, vt = np.linalg.svd(left @ right, full_matrices=False)
    assert (got.a.shape, got.b.shape, got.scale) == ((rank, k), (d, rank), scale)
    np.testing.assert_allclose(scale * got.b @ got.a, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-11)
    np.testing.assert_allclose(got.a @ got.a.T, length**2 * np.eye(rank), atol=1e-11)
    np.testing.assert_allclose(got.b.T @ got.b, np.diag((s[:rank] / (length * scale)) ** 2), atol=1e-10)


def test_directions_that_a_product_lacks_have_rows_of_a_all_the_same():
    left, right = np.zeros((9, 4)), RNG.normal(size=(4, 6))
    got = orthogonal(left, right, 4, 2.0)
    np.testing.assert_array_equal(got.b, np.zeros((9, 4)))
    np.testing.assert_allclose(got.a @ got.a.T, np.eye(4) / 3, atol=1e-12)
    assert orthogonal(left, right, 8, 2.0).a.shape == (8, 6)  # more than k: the rest can only be zero


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("energy", [0.2, 0.5, 0.9, 0.999, 1.0])
def test_compress_keeps_the_fewest_directions_that_hold_the_energy(size, energy):
    d, inner, k = size
    left, right = RNG.normal(size=(d, inner)), RNG.normal(size=(inner, k))
    got = compress(left, right, energy)
    u, s, vt = np.linalg.svd(left @ right, full_matrices=False)
    s = s[: min(size)]
    want = next((r for r in range(1, len(s) + 1) if np.sum(s[:r] ** 2) >= energy * np.sum(s**2)), len(s))
    assert (got.rank, got.scale) == (len(s) if energy == 1 else want, 1.0)
    np.testing.assert_allclose(got.b @ got.a, (u[:, : got.rank] * s[: got.rank]) @ vt[: got.rank], atol=1e-11)
    np.testing.assert_allclose(got.a @ got.a.T, np.eye(got.rank), atol=1e-12)


def test_compress_drops_what_is_nothing_but_rounding_and_keeps_at_most_the_rank_asked_for():
    left, right = RNG.normal(size=(9, 2)), RNG.normal(size=(2, 6))
    wide = np.hstack([left, left, -left]), np.vstack([right, 0.5 * right, right])
    assert compress(*wide).rank == 2
    np.testing.assert_allclose(compress(*wide).product(), 0.5 * left @ right, atol=1e-12)
    one = compress(*wide, rank=1)
    assert one.rank == 1
    u, s, vt = np.linalg.svd(0.5 * left @ right)
    np.testing.assert_allclose(one.product(), s[0] * np.outer(u[:, 0], vt[0]), atol=1e-12)
    assert compress(*wide, rank=5).rank == 2


@pytest.mark.parametrize(("value", "rank"), [(2e-13, 2), (5e-14, 1), (1e-10, 2)])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_rounding_is_what_is_less_than_1e13th_of_the_largest(value, rank, size):
    left = np.zeros((5, 3))
    left[1, 0], left[3, 2] = size, -value * size
    assert compress(left, np.eye(3, 6)).rank == rank


def test_nothing_is_compressed_to_nothing():
    got = compress(np.zeros((9, 2)), np.zeros((2, 6)))
    assert (got.rank, got.a.shape, got.b.shape) == (0, (0, 6), (9, 0))
    assert compress(np.zeros((9, 0)), np.zeros((0, 6))).rank == 0
    assert compress(np.zeros((9, 2)), np.zeros((2, 6)), 0.5).rank == 0


@pytest.mark.parametrize("size", SIZES)
def test_the_top_of_a_narrow_stack_is_exact(size):
    d, inner, k = size
    left, right = RNG.normal(size=(d, inner)), RNG.normal(size=(inner, k))
    for got, want in zip(top_svd(left, right, 2, np.random.default_rng(0)), factored_svd(left, right), strict=True):
        np.testing.assert_array_equal(got, want[: got.shape[0], : got.shape[1]] if got.ndim == 2 else want[:2])
    assert top_svd(left, right, 2, np.random.default_rng(0))[0].shape == (d, 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("spectrum", ["flat", "falling", "short"])
def test_the_top_of_a_wide_stack_is_within_a_thousandth_of_the_best(spectrum, dtype):
    d, inner, k, rank = 210, 320, 260, 4
    rng = np.random.default_rng(1)
    left, right = rng.normal(size=(d, inner)).astype(dtype), rng.normal(size=(inner, k)).astype(dtype)
    left *= {"flat": 1, "falling": 1 / np.arange(1, inner + 1), "short": np.arange(inner) < 3}[spectrum]
    dense = left.astype(float) @ right.astype(float)
    values = np.linalg.svd(dense, compute_uv=False)
    u, s, vt = top_svd(left, right, rank, np.random.default_rng(0))
    assert (u.shape, s.shape, vt.shape) == ((d, rank), (rank,), (rank, k))
    assert u.dtype == s.dtype == vt.dtype == np.float64
    np.testing.assert_allclose(u.T @ u, np.eye(rank), atol=1e-10)
    np.testing.assert_allclose(vt @ vt.T, np.eye(rank), atol=1e-10)
    best = np.sqrt(np.sum(values[rank:] ** 2))
    error = np.linalg.norm(dense - (u * s) @ vt)
    assert error <= 1.001 * best + 1e-9 * values[0]
    assert error < (1.00001 if spectrum == "falling" else 1.001) * best + 1e-9 * values[0]
    np.testing.assert_allclose(s, values[:rank], rtol=0.03 if spectrum == "flat" else 1e-6, atol=1e-9 * values[0])
    assert np.all(np.diff(s) <= 0)


def test_the_top_of_a_wide_stack_depends_on_where_the_search_begins_only_by_rounding():
    rng = np.random.default_rng(1)
    left, right = rng.normal(size=(210, 320)) / np.arange(1, 321), rng.normal(size=(320, 260))
    one, other = (top_svd(left, right, 4, np.random.default_rng(seed)) for seed in (0, 1))
    np.testing.assert_allclose((one[0] * one[1]) @ one[2], (other[0] * other[1]) @ other[2], atol=1e-6)
    assert not np.array_equal(one[0], other[0])  # or it was the exact way after all
