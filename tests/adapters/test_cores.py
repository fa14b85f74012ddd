"""Layers in core form: what their b and a are, and which of an adapter's fixed tensors say so."""

import numpy as np
import pytest

from fedpeft.adapters import Adapter, Basis, LowRank, bases, basis_of, cored, drawn, lasting

D, K, R = 9, 7, 6
RNG = np.random.default_rng(0)
LEFT = np.linalg.qr(RNG.normal(size=(D, R)))[0]
RIGHT = RNG.normal(size=(R, K))
AT = np.array([[4, 1], [0, 5]])
CORES = RNG.normal(size=(2, 2, 2))
BASIS = Basis(LEFT, RIGHT, AT)


def test_a_layer_is_the_sum_of_its_cores_between_their_directions():
    got = BASIS.pair(CORES, 3.0)
    want = np.zeros((D, K))
    for core, (i, j) in zip(CORES, AT, strict=True):
        want += 3.0 * LEFT[:, [i, j]] @ core @ RIGHT[[i, j]]
    np.testing.assert_allclose(got.scale * got.b @ got.a, want, atol=1e-13)
    np.testing.assert_array_equal(got.a, RIGHT[[4, 1, 0, 5]])
    np.testing.assert_allclose(got.b[:, 2:], LEFT[:, [0, 5]] @ CORES[1], atol=1e-14)
    assert (got.scale, got.rank) == (3.0, 4)
    np.testing.assert_array_equal(BASIS.lefts[1], LEFT[:, [0, 5]])
    assert BASIS.lefts.shape == (2, D, 2)


def test_a_pair_has_each_factor_in_the_dtype_of_its_own_directions():
    mixed = Basis(LEFT.astype(np.float32), RIGHT, AT).pair(CORES, 3.0)
    assert (mixed.b.dtype, mixed.a.dtype) == (np.float32, np.float64)


def test_a_b_tells_its_cores_and_nothing_that_is_not_between_the_directions():
    b = BASIS.b(CORES)
    assert b.shape == (D, 4)
    np.testing.assert_allclose(BASIS.cores(b), CORES, atol=1e-14)
    beside = RNG.normal(size=(D, 4))
    beside -= LEFT @ (LEFT.T @ beside)
    np.testing.assert_allclose(BASIS.cores(b + beside), CORES, atol=1e-13)
    np.testing.assert_allclose(BASIS.cores(2 * b), 2 * CORES, atol=1e-13)
    assert not BASIS.cores(np.zeros((D, 4))).any()


def test_cores_are_told_in_double_precision_and_layers_made_in_the_directions_own():
    narrow = Basis(LEFT.astype(np.float32), RIGHT.astype(np.float32), AT)
    got = narrow.pair(CORES, 1.0)
    assert (got.a.dtype, got.b.dtype) == (np.float32, np.float32)
    assert narrow.b(CORES.astype(np.float32)).dtype == np.float64
    assert narrow.cores(got.b).dtype == np.float64
    np.testing.assert_allclose(narrow.cores(got.b), CORES, atol=2e-6)  # a few units of fp32, 6e-8, below 10


def test_the_same_directions_may_be_around_other_cores():
    one = BASIS.only(np.array([[3]]))
    assert one.left is LEFT
    assert one.right is RIGHT
    np.testing.assert_allclose(one.pair(np.full((1, 1, 1), 2.0), 1.0).product(), 2 * np.outer(LEFT[:, 3], RIGHT[3]))
    assert one.pair(np.ones((1, 1, 1)), 1.0).rank == 1


@pytest.mark.parametrize(
    ("left", "right", "at", "message"),
    [
        (LEFT[:, :5], RIGHT, AT, r"bases do not match: left is \(9, 5\), right is \(6, 7\); want R of each"),
        (LEFT[0], RIGHT, AT, "bases do not match"),
        (LEFT, RIGHT[:, :, None], AT, "bases do not match"),
        (LEFT, RIGHT, AT.astype(float), r"at: got float64 \(2, 2\); want \(h, r\) whole numbers from 0 below 6"),
        (LEFT, RIGHT, AT[0], r"at: got int64 \(2,\)"),
        (LEFT, RIGHT, AT + 1, r"at: got int64 \(2, 2\)"),
        (LEFT, RIGHT, AT - 1, r"at: got int64 \(2, 2\)"),
    ],
)
def test_directions_that_are_none_are_refused(left, right, at, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Basis(left, right, at)


@pytest.mark.parametrize("shape", [(2, 2), (1, 2, 2), (2, 1, 2), (2, 2, 1), (4, 1, 1)])
def test_cores_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=rf"^cores: got \({', '.join(map(str, shape))}\); want \(2, 2, 2\)"):
        BASIS.b(np.ones(shape))


def test_the_first_and_the_last_direction_are_directions():
    assert Basis(LEFT, RIGHT, np.array([[0, R - 1]])).at.size == 2


def adapter():
    pair = LowRank(RNG.normal(size=(2, 5)), RNG.normal(size=(4, 2)), 0.5)
    other = LowRank(RNG.normal(size=(R, K)), RNG.normal(size=(D, R)), 3.0)
    return Adapter({"p": pair, "q": other}, {"head": np.ones(3)}, {"q.projection": np.arange(4), "p/left": np.ones(2)})


def test_an_adapter_in_core_form_says_so_in_its_fixed_tensors():
    before = adapter()
    after = cored(before, {"q": BASIS}, {"q": CORES})
    assert list(bases(before)) == []
    assert list(bases(after)) == ["q"]
    found = bases(after)["q"]
    assert basis_of(after, "q").left is LEFT
    with pytest.raises(KeyError, match="p/right"):
        basis_of(after, "p")
    assert (found.left is LEFT, found.right is RIGHT, found.at is AT) == (True, True, True)
    np.testing.assert_allclose(found.cores(after.layers["q"].b), CORES, atol=1e-14)
    assert after.layers["q"].scale == 3.0
    assert after.layers["p"] is before.layers["p"]
    assert after.dense is before.dense
    assert list(after.layers) == ["p", "q"]
    assert set(after.fixed) == {"q.projection", "p/left", "q/left", "q/right", "q/at"}
    assert set(before.fixed) == {"q.projection", "p/left"}
    assert set(drawn(after)) == {"q.projection", "p/left"}  # p is in no core form: its method drew it
    assert set(lasting(after)) == {"q.projection", "p/left", "q/left", "q/right"}
    assert lasting(after)["q/left"] is LEFT
    assert drawn(after)["q.projection"] is before.fixed["q.projection"]
