"""The directions of Fed-SB, and RAVAN's, which may be the same: whose they are, and how they are kept."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, same
from fedpeft.rules import FedSB, Ravan, ServerState, Task
from fedpeft.testing.cohorts import train

each_rule = pytest.mark.parametrize("rule", [FedSB(), Ravan(seed=2, heads=3)], ids=repr)


def state_of(kind_a=np.float64, kind_b=np.float64):
    rng = np.random.default_rng(0)
    layer = LowRank(rng.normal(size=(6, 11)).astype(kind_a), rng.normal(size=(14, 6)).astype(kind_b), 0.5)
    first = Adapter({"w": layer}, {"head": rng.normal(size=3)})
    return ServerState(Task(first.spec, 5), first)


@each_rule
@pytest.mark.parametrize("rank", [2, 6])
def test_the_directions_are_those_received_whatever_a_client_says_that_it_has(rule, rank):
    sent = rule.send(state_of(), rank)
    update = train(rule, sent, np.random.default_rng(1))
    want = rule.encode(update, sent.task)
    got = rule.encode(replace(update, trained=replace(update.trained, fixed={})), sent.task)
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x)
    assert np.count_nonzero(want["w/core"]) == (rank * rank if rule == FedSB() else rank // 2 * 2 * 2)


@each_rule
def test_each_side_keeps_its_own_precision(rule):
    state = state_of(np.float32, np.float64)
    sent = rule.send(state, 6).adapter
    assert (sent.layers["w"].a.dtype, sent.layers["w"].b.dtype) == (np.float32, np.float64)
    assert (sent.fixed["w/right"].dtype, sent.fixed["w/left"].dtype) == (np.float32, np.float64)


@each_rule
def test_who_trains_everything_receives_the_servers_adapter_bit_for_bit(rule):
    sent = rule.send(state_of(), 6)
    change = train(rule, sent, np.random.default_rng(1))
    state = rule.decode(rule.encode(change, sent.task), replace(state_of(), adapter=sent.adapter))
    assert not same(state.adapter, sent.adapter)
    assert same(rule.send(state, 6).adapter, state.adapter)
