"""Low-rank layers, adapters and updates as values."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, Layer, Layout, LowRank, Spec, Update, same
from tests.laws.cohorts import adapter

RNG = np.random.default_rng(5)
A, B = RNG.normal(size=(2, 5)), RNG.normal(size=(3, 2))


def one(**changes: object) -> Adapter:
    values = {"layers": {"q": LowRank(A, B, 1.5)}, "dense": {"head": np.array([1.0, -2.0])}}
    return Adapter(**(values | {"fixed": {"seed": np.array([3])}} | changes))


def test_the_product_is_scale_times_b_times_a():
    want = np.array([[1.5 * sum(B[i, r] * A[r, j] for r in range(2)) for j in range(5)] for i in range(3)])
    np.testing.assert_allclose(LowRank(A, B, 1.5).product(), want, rtol=1e-12)
    assert LowRank(A, B, 1.5).rank == 2


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 5), (3, 4)), ((5, 2), (2, 3)), ((2,), (3, 2)), ((2, 5), (2,)), ((2, 5, 1), (3, 2)), ((2, 5), (3, 2, 1))],
)
def test_factors_that_do_not_match_are_refused(a, b):
    with pytest.raises(ValueError, match=r"factors do not match: a is .*, b is .*; want \(r, k\) and \(d, r\)"):
        LowRank(np.zeros(a), np.zeros(b), 1.0)


def test_cut_keeps_the_first_directions_and_at_most_what_is_there():
    layer = LowRank(A, B, 1.5)
    small = layer.cut(1)
    np.testing.assert_array_equal(small.a, A[:1])
    np.testing.assert_array_equal(small.b, B[:, :1])
    assert small.scale == 1.5
    assert layer.cut(9).rank == 2


def test_pad_adds_zero_directions_behind():
    big = LowRank(A, B, 1.5).pad(4)
    np.testing.assert_array_equal(big.a, np.vstack([A, np.zeros((2, 5))]))
    np.testing.assert_array_equal(big.b, np.hstack([B, np.zeros((3, 2))]))
    assert (big.rank, big.scale) == (4, 1.5)
    np.testing.assert_array_equal(big.cut(2).a, A)
    assert LowRank(A, B, 1.5).pad(2).rank == 2


def test_pad_never_cuts():
    with pytest.raises(ValueError, match="can't pad rank 2 to 1: want at least 2"):
        LowRank(A, B, 1.5).pad(1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1.5, -2.0])
def test_the_norm_is_that_of_the_product(dtype, scale):
    layer = LowRank(A.astype(dtype), B.astype(dtype), scale)
    a, b = A.astype(dtype).astype(np.float64), B.astype(dtype).astype(np.float64)
    assert layer.norm == pytest.approx(np.linalg.norm(scale * b @ a), rel=1e-12)
    assert type(layer.norm) is float
    assert LowRank(A, np.zeros((3, 2)), scale).norm == 0
    assert LowRank(A[:0], B[:, :0], scale).norm == 0
    near = LowRank(np.vstack([A[0], A[0]]), np.stack([B[:, 0], -B[:, 0]], 1), scale)  # two directions that cancel
    assert 0 <= near.norm < 1e-6


def test_a_layer_is_its_first_directions_and_the_rest():
    layer = LowRank(A, B, 1.5)
    rest = layer.rest(1)
    assert (rest.rank, rest.scale) == (1, 1.5)
    np.testing.assert_allclose(layer.cut(1).product() + rest.product(), layer.product(), atol=1e-12)
    assert layer.rest(2).rank == layer.rest(9).rank == 0
    np.testing.assert_array_equal(layer.rest(0).a, A)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_two_layers_joined_are_their_sum_at_the_firsts_scale(dtype):
    x = LowRank(A.astype(dtype), B.astype(dtype), 1.5)
    y = LowRank((A[:1] * 2).astype(dtype), (B[:, 1:] - 1).astype(dtype), 4.0)
    both = x.join(y)
    assert (both.rank, both.scale, both.a.dtype, both.b.dtype) == (3, 1.5, dtype, dtype)
    np.testing.assert_array_equal(both.cut(2).a, x.a)
    np.testing.assert_array_equal(both.cut(2).b, x.b)
    np.testing.assert_allclose(both.product(), x.product() + y.product(), atol=1e-5)


def test_another_scale_is_taken_into_b():
    x = LowRank(A, B, 1.5)
    y = x.at(-6.0)
    assert y.scale == -6.0
    np.testing.assert_array_equal(y.a, A)
    np.testing.assert_allclose(y.product(), x.product(), rtol=1e-12)
    assert x.at(1.5) is x


def test_an_update_at_the_servers_scales_is_the_same_change():
    server = Spec((Layer("q", 3, 5, 2, 0.5),))
    update = Update(one(), one(layers={"q": LowRank(A + 1, B - 2, 1.5), "other": LowRank(A, B, 7.0)}))
    got = update.at(server)
    assert [x.layers["q"].scale for x in (got.received, got.trained)] == [0.5, 0.5]
    np.testing.assert_allclose(got.received.layers["q"].product(), 1.5 * B @ A, rtol=1e-12)
    np.testing.assert_allclose(got.trained.layers["q"].product(), 1.5 * (B - 2) @ (A + 1), rtol=1e-12)
    assert got.trained.layers["other"].scale == 7.0  # which is refused later, by name
    assert got.trained.dense is update.trained.dense


def test_the_spec_says_every_shape_rank_and_scale():
    assert one().spec == Spec((Layer("q", 3, 5, 2, 1.5),), (("head", (2,)),))
    assert Adapter().spec == Spec()


def test_the_layout_of_factors_follows_the_parts_asked_for():
    spec = Spec((Layer("q", 3, 5, 2, 1.5), Layer("v", 7, 4, 6, 0.5)), (("head", (2,)),))
    assert spec.factors("a") == Layout((("q/a", (2, 5)), ("v/a", (6, 4))))
    assert spec.factors("b") == Layout((("q/b", (3, 2)), ("v/b", (7, 6))))
    assert spec.factors("ab") == Layout((("q/a", (2, 5)), ("q/b", (3, 2)), ("v/a", (6, 4)), ("v/b", (7, 6))))
    assert spec.leaves == Layout((("head", (2,)),))


def test_tensors_are_named_views_in_order():
    x = one()
    assert list(x.tensors()) == ["q/a", "q/b", "head"]
    assert list(x.tensors("b")) == ["q/b", "head"]
    assert x.tensors()["q/a"] is x.layers["q"].a
    assert x.tensors("b")["q/b"] is x.layers["q"].b
    assert x.tensors()["head"] is x.dense["head"]


def test_put_replaces_what_is_named_and_nothing_else():
    x = adapter()
    new = {"q/a": np.full((3, 5), -1.0), "v/b": np.full((4, 2), 2.0), "bias": np.full(10, -3.0)}
    y = x.put(new)
    for name, value in y.tensors().items():
        assert value is new.get(name, x.tensors()[name])
    assert y.fixed is x.fixed
    assert y.spec == x.spec
    assert same(x, adapter())


def test_moved_adds_to_what_is_named_and_keeps_each_dtype():
    x = adapter(dtype=np.float32)
    change = {"q/b": np.full((7, 3), -1.5), "head": np.full((8, 6), 2.25)}
    y = x.moved(change).tensors()
    for name, value in x.tensors().items():
        assert y[name].dtype == np.float32
        if name in change:
            np.testing.assert_array_equal(y[name], (value.astype(np.float64) + change[name]).astype(np.float32))
        else:
            assert y[name] is value
    assert same(x, adapter(dtype=np.float32))


@pytest.mark.parametrize("method", ["put", "moved"])
def test_a_tensor_that_is_not_there_or_does_not_fit_is_refused(method):
    for name, shape, message in (
        ("q/c", (3, 5), "no such tensor in the adapter: q/c; it has q/a, q/b, v/a …"),
        ("projection", (3,), "no such tensor in the adapter: projection"),
        ("q/a", (1, 5), r"q/a does not fit the adapter: got \(1, 5\); want \(3, 5\)"),
        ("head", (6,), r"head does not fit the adapter: got \(6,\); want \(8, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(adapter(), method)({name: np.zeros(shape)})


def test_cut_cuts_every_layer_and_leaves_the_rest():
    x = adapter()
    y = x.cut(1)
    assert [layer.rank for layer in y.layers.values()] == [1, 1]
    np.testing.assert_array_equal(y.layers["v"].a, x.layers["v"].a[:1])
    assert y.dense is x.dense
    assert y.fixed is x.fixed
    assert [layer.rank for layer in x.cut(2).layers.values()] == [2, 2]
    assert [layer.rank for layer in x.cut(3).layers.values()] == [3, 2]


def test_an_update_is_trained_minus_received_padded_to_the_servers_rank():
    spec = adapter().spec
    received, trained = adapter(1).cut(2), adapter(2).cut(1)  # a client may give up a direction of its own
    change = Update(received, trained).factors("ab", spec)
    assert {n: x.shape for n, x in change.items()} == dict(spec.factors("ab").shapes)
    new, old = trained.layers["q"], received.layers["q"]
    want = np.zeros((3, 5))
    want[:2] -= old.a
    want[:1] += new.a
    np.testing.assert_array_equal(change["q/a"], want)
    want = np.zeros((7, 3))
    want[:, :2] -= old.b
    want[:, :1] += new.b
    np.testing.assert_array_equal(change["q/b"], want)
    assert set(Update(received, trained).factors("b", spec)) == {"q/b", "v/b"}


@pytest.mark.parametrize("side", ["received", "trained"])
def test_an_update_on_other_layers_than_the_servers_is_refused(side):
    sides = {"received": adapter(1), "trained": adapter(2)}
    sides[side] = replace(sides[side], layers={"q": sides[side].layers["q"]})
    with pytest.raises(ValueError, match=r"it has layers \['q'\]; want \['q', 'v'\]"):
        Update(**sides).factors("ab", adapter().spec)


def test_dense_leaves_of_an_update_are_trained_minus_received():
    received, trained = adapter(1), adapter(2)
    change = Update(received, trained).dense()
    assert set(change) == {"head", "bias", "gate"}
    for n, x in change.items():
        np.testing.assert_array_equal(x, trained.dense[n] - received.dense[n])


def test_the_same_adapter_is_the_same():
    assert same(one(), one())
    assert same(one(), one(layers={"q": LowRank(A.copy(), B.copy(), 1.5)}))
    assert same(Adapter(), Adapter())


@pytest.mark.parametrize(
    "other",
    [
        one(layers={"q": LowRank(A, B, 1.25)}),
        one(layers={"k": LowRank(A, B, 1.5)}),
        one(layers={"q": LowRank(np.nextafter(A, 9), B, 1.5)}),
        one(layers={"q": LowRank(A, -B, 1.5)}),
        one(layers={}),
        one(dense={"head": np.array([1.0, -2.0], np.float32)}),
        one(dense={"head": np.array([1.0, -2.0]).view(np.int64)}),
        one(dense={"head": np.array([[1.0, -2.0]])}),
        one(dense={"head": np.array([1.0, -2.5])}),
        one(dense={"head": np.array([1.0, -2.0]), "bias": np.zeros(1)}),
        one(fixed={"seed": np.array([4])}),
        one(fixed={}),
        one(fixed={}, dense={"head": np.array([1.0, -2.0]), "seed": np.array([3])}),
    ],
)
def test_any_difference_makes_adapters_differ(other):
    assert not same(one(), other)
    assert not same(other, one())


def test_zeros_of_both_signs_differ_and_a_nan_equals_itself():
    def at(value: float) -> Adapter:
        return replace(one(), dense={"head": np.array([value])})

    assert not same(at(0.0), at(-0.0))
    assert same(at(float("nan")), at(float("nan")))


def test_a_digest_stays_the_same_from_version_to_version():
    x = Adapter(
        {"q": LowRank(np.array([[1.0, -2.0]]), np.array([[3.0], [0.5], [-4.0]], np.float32), 1.5)},
        {"head": np.array([0.25, -1.0])},
        {"seed": np.array([7], np.int64)},
    )
    assert x.digest == "2ab9a029fcaafdbe174cf0ef53916c3c1844dd0c1fb1b5a3e36461b2c40839c9"


def test_a_digest_does_not_depend_on_how_the_tensors_lie_in_memory():
    x = one(layers={"q": LowRank(A, np.asfortranarray(B), 1.5)})
    assert x.digest == one().digest
    assert same(x, one())
    assert one().cut(1).digest == one(layers={"q": LowRank(A[:1].copy(), B[:, :1].copy(), 1.5)}).digest
