"""Algebra on factors against dense numpy."""

import numpy as np
import pytest

from fedpeft.adapters import LowRank, best_rank, compress, drift, factored_svd, orthogonal, orthonormal, stack, top_svd

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
@pytest.mark.parametrize(("ranks", "scales"), [((3, 3), (2.0, 2.0)), ((1, 4), (0.7, 3.0)), ((4, 2), (-1.1, 0.25))])
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


@pytest.mark.parametrize(("energy", "rank"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (1.0, 4)])
def test_directions_that_hold_just_the_energy_are_enough(energy, rank):
    assert compress(2 * np.eye(6, 4), np.eye(4, 5), energy).rank == rank  # 4 of 16 each, to the last bit


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


@pytest.mark.parametrize("size", [(0, 1, 9), (9, 0, 1), (1, 9, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize(("least", "is_exact"), [(90, True), (91, False)])
def test_a_stack_is_searched_where_each_side_is_wider_than_ten_blocks(size, least, is_exact):
    """A block for rank 1 has 1 + 8 columns, and a space 5 blocks: twice that is 90."""
    rng = np.random.default_rng(3)
    d, inner, k = (least + more for more in size)
    left, right = rng.normal(size=(d, inner)), rng.normal(size=(inner, k))
    got, want = top_svd(left, right, 1, np.random.default_rng(0)), factored_svd(left, right)
    assert np.array_equal(got[0], want[0][:, :1]) is is_exact
    assert np.array_equal(got[1], want[1][:1]) is is_exact
    assert np.array_equal(got[2], want[2][:1]) is is_exact


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


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1e9, 1, 1e-9), (3, 0, 2)])
def test_orthonormal_columns_span_what_was_given_beyond_what_was_there(lengths):
    rng = np.random.default_rng(4)
    beside = np.linalg.qr(rng.normal(size=(9, 2)))[0]
    x = rng.normal(size=(9, 3)) * lengths
    got = orthonormal(x, beside)
    rank = np.count_nonzero(lengths)
    assert got.shape == (9, rank)
    np.testing.assert_allclose(got.T @ got, np.eye(rank), atol=1e-14)
    np.testing.assert_allclose(beside.T @ got, 0, atol=1e-14)
    beyond = x / np.where(np.array(lengths) > 0, lengths, 1)
    beyond = beyond - beside @ (beside.T @ beyond)
    np.testing.assert_allclose(got @ (got.T @ beyond), beyond, atol=1e-13)
    alone = orthonormal(x)
    np.testing.assert_allclose(alone @ (alone.T @ x), x, atol=1e-13 * max(lengths))


def test_directions_that_are_rounding_are_left_out_and_faint_ones_are_not():
    rng = np.random.default_rng(5)
    u = np.linalg.qr(rng.normal(size=(8, 3)))[0]
    twins = u[:, :1] + 1e-6 * u[:, 1:2]
    got = orthonormal(np.hstack([u[:, :1], twins]))
    np.testing.assert_allclose(np.abs(got.T @ u[:, :2]), [[0, 1], [1, 0]], atol=1e-5)
    np.testing.assert_allclose(got.T @ got, np.eye(2), atol=1e-14)
    assert orthonormal(np.hstack([u[:, :1], u[:, :1] + 1e-8 * u[:, 1:2]])).shape == (8, 1)
    assert orthonormal(u[:, :2] @ rng.normal(size=(2, 5))).shape == (8, 2)
    assert orthonormal(u[:, :2] @ rng.normal(size=(2, 4)), u[:, :2]).shape == (8, 0)  # all of it is there already
    faint = orthonormal(u[:, :1] + 1e-9 * u[:, 1:2], u[:, :1])
    np.testing.assert_allclose(np.abs(faint.T @ u), [[0, 1, 0]], atol=1e-6)
    assert orthonormal(np.zeros((8, 3))).shape == (8, 0)


def along(size: int, **parts: float) -> np.ndarray:
    """A column with these numbers at these places: x2=0.5 puts 0.5 at place 2."""
    column = np.zeros((size, 1))
    for place, value in parts.items():
        column[int(place[1:])] = value
    return column


@pytest.mark.parametrize(("length", "columns"), [(1.0, 0), (1 + 2**-20, 1), (1.25, 1), (0.75, 0)])
def test_what_is_shorter_than_43_bits_of_a_column_is_rounding(length, columns):
    x = along(6, x0=1.0, x2=length * 2**-43)  # of length 1, to the last bit
    assert orthonormal(x, along(6, x0=1.0)).shape == (6, columns)


@pytest.mark.parametrize(("length", "columns"), [(1.0, 1), (1 + 2**-20, 2), (1.25, 2), (0.75, 1)])
def test_what_is_shorter_than_23_bits_of_the_strongest_is_rounding(length, columns):
    faint = along(6, x0=np.sqrt(1 - (length * 2**-23) ** 2), x2=length * 2**-23)
    assert np.linalg.norm(faint) == 1  # so that nothing is rounded on the way
    x = np.hstack([along(6, x4=1.0), faint])
    assert orthonormal(x, along(6, x0=1.0)).shape == (6, columns)


def test_columns_are_made_orthonormal_twice_and_no_more(monkeypatch):
    eigh, seen = np.linalg.eigh, []
    monkeypatch.setattr(np.linalg, "eigh", lambda x: (seen.append(x.shape), eigh(x))[1])
    orthonormal(np.random.default_rng(0).normal(size=(9, 3)))
    assert seen == [(3, 3), (3, 3)]


def test_the_top_of_a_wide_stack_of_just_this_rank_is_searched():
    rng = np.random.default_rng(6)
    left, right = rng.normal(size=(150, 170)), rng.normal(size=(170, 160))
    left[:, 4:] = 0
    u, s, vt = top_svd(left, right, 4, np.random.default_rng(0))
    np.testing.assert_allclose((u * s) @ vt, left @ right, atol=1e-9)
    assert not np.array_equal(s, factored_svd(left, right)[1][:4])


def test_the_top_of_a_wide_stack_of_a_lower_rank_is_completed():
    rng = np.random.default_rng(6)
    left, right = rng.normal(size=(210, 320)), rng.normal(size=(320, 260))
    left[:, 3:] = 0
    u, s, vt = top_svd(left, right, 40 - 8, np.random.default_rng(0))
    np.testing.assert_allclose(vt @ vt.T, np.eye(32), atol=1e-12)
    np.testing.assert_allclose(u.T @ u, np.eye(32), atol=1e-12)
    np.testing.assert_allclose((u * s) @ vt, left @ right, atol=1e-9)
