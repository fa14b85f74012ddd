"""An adapter's digest tells apart what ``same`` tells apart."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update, same


def adapter():
    rng = np.random.default_rng(5)
    layers = {"q": LowRank(rng.normal(size=(2, 5)), rng.normal(size=(3, 2)), 2.0)}
    return Adapter(layers, {"head": rng.normal(size=(4, 3)).astype(np.float32)}, {"seed": np.arange(3)})


def changed(kind):
    x = adapter()
    q = x.layers["q"]
    match kind:
        case "scale":
            return replace(x, layers={"q": replace(q, scale=2.5)})
        case "factor":
            return replace(x, layers={"q": replace(q, a=-q.a)})
        case "name":
            return replace(x, layers={"k": q})
        case "dense":
            return replace(x, dense={"head": x.dense["head"] + 1})
        case "dtype":
            return replace(x, dense={"head": x.dense["head"].astype(np.float64)})
        case "shape":
            return replace(x, dense={"head": x.dense["head"].reshape(3, 4)})
        case _:
            return replace(x, fixed={"seed": np.arange(3) + 1})


@pytest.mark.parametrize("kind", ["scale", "factor", "name", "dense", "dtype", "shape", "fixed"])
def test_any_difference_changes_the_digest(kind):
    assert changed(kind).digest != adapter().digest
    assert not same(changed(kind), adapter())


def test_equal_adapters_have_one_digest_whatever_the_order_of_their_names():
    x = adapter()
    assert adapter().digest == x.digest
    two = Adapter(dense={"a": np.ones(2), "b": np.zeros(3)})
    assert Adapter(dense={"b": np.zeros(3), "a": np.ones(2)}).digest == two.digest
    assert len(x.digest) == 64


def test_padding_to_its_own_rank_copies_nothing():
    q = adapter().layers["q"]
    assert q.pad(q.rank) is q


def test_a_change_is_exact_where_single_precision_would_round_it():
    old, new = (Adapter(dense={"x": np.array([v], np.float32)}) for v in (1.0, -3e-8))
    change = Update(old, new).dense()["x"]
    assert change.dtype == np.float64
    assert change[0] == float(np.float32(-3e-8)) - 1.0
    assert change[0] != np.float32(change[0])
