"""RAVAN's heads: which travel as the tail, and in which order they are sent."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update, bases, cored
from fedpeft.rules import Ravan, ServerState, Task

RULE = Ravan(seed=2, heads=3)


def at_the_start(kind_a=np.float64, kind_b=np.float64):
    rng = np.random.default_rng(0)
    layer = LowRank(rng.normal(size=(6, 11)).astype(kind_a), np.zeros((14, 6), kind_b), 0.5)
    first = Adapter({"w": layer})
    return ServerState(Task(first.spec, 1), first)


def test_random_directions_have_each_sides_precision():
    sent = RULE.send(at_the_start(np.float32, np.float64), 6).adapter
    assert (sent.fixed["w/right"].dtype, sent.fixed["w/left"].dtype) == (np.float32, np.float64)


@pytest.mark.parametrize(("busy", "travels"), [(0, True), (1, False), (2, True)])
def test_heads_travel_as_the_tail_where_one_that_the_client_lacks_is_not_zero(busy, travels):
    """In round 1 a client of one head has head 1."""
    state = at_the_start()
    whole = RULE.send(state, 6).adapter
    cores = np.zeros((3, 2, 2))
    cores[busy] = [[1.0, -2.0], [0.5, 3.0]]
    adapter = cored(whole, bases(whole), {"w": cores})
    sent = RULE.send(replace(state, adapter=adapter), 2)
    assert ("w" in sent.tail) is travels
    assert bool(sent.adapter.layers["w"].b.any()) is not travels


def test_heads_are_told_by_their_directions_in_whatever_order_a_client_holds_them():
    state = at_the_start()
    whole = RULE.send(state, 6).adapter
    turned = cored(whole, {"w": bases(whole)["w"].only(np.array([[4, 5], [0, 1]]))}, {"w": np.zeros((2, 2, 2))})
    cores = np.array([[[1.0, -2.0], [0.5, 3.0]], [[-4.0, 5.0], [6.0, 7.0]]])
    sent = RULE.encode(Update(turned, cored(turned, bases(turned), {"w": cores})), state.task)
    np.testing.assert_allclose(sent["w/core"], [cores[1], np.zeros((2, 2)), cores[0]], atol=1e-12)
    np.testing.assert_array_equal(sent["w/lacks"], [0, 1, 0])
