"""The laws of architecture.md, each one test over every rule."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update, same
from fedpeft.channel import PlainChannel
from fedpeft.rounds import contribute
from fedpeft.testing import rule_laws
from fedpeft.testing.cohorts import numbered
from tests.laws.cohorts import (
    COUNTS,
    FACTOR_RULES,
    FEDIT,
    REFACTORED,
    RULES,
    SKIPPED,
    TwoPasses,
    cohort,
    drops,
    is_refactored,
    metrics,
    play,
    start,
    task_of,
    train,
    weights,
)

# Terms travel as fp32 (unit 6e-8, relative); the numbers here stay below 10 and are rounded at most twice.
WIRE = 2e-6

EVERY_LAW = [
    pytest.param(law, id=f"{name}: {law.name}")
    for name, rule in RULES.items()
    for law in rule_laws(rule, COUNTS, SKIPPED.get(name, ()))
]
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
each_factor_rule = pytest.mark.parametrize("rule", FACTOR_RULES.values(), ids=FACTOR_RULES)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])
each_round = pytest.mark.parametrize("round", [0, 1])


@pytest.mark.parametrize("law", EVERY_LAW)
def test_law(law):
    law()


@pytest.mark.parametrize("rule", [x for x in RULES.values() if not is_refactored(x)], ids=repr)
@each_round
@each_dtype
def test_no_change_leaves_the_adapter_bit_for_bit_where_it_is_not_factored_anew(rule, round, dtype):
    state = start(dtype=dtype, round=round)
    ranks = (3, 3, 3) if drops(rule) else (1, 2, 3)
    clients = {i: (Update(x, x), float(i)) for i, r in numbered(ranks).items() for x in [rule.send(state, r).adapter]}
    after = play(rule, state, clients, ranks=numbered(ranks)).state
    assert after.tail == state.tail
    assert same(after.adapter, state.adapter)


@each_rule
@each_dtype
def test_terms_travel_in_single_precision(rule, dtype):
    state = start(dtype=dtype)
    for client, (update, weight) in cohort(rule, state).items():
        term = contribute(rule, PlainChannel(), update, weight, metrics(client), task_of(rule, state))
        assert term.dtype == np.float32


@each_rule
@each_dtype
def test_all_but_constants_changes(rule, dtype):
    first = state = start(dtype=dtype)
    for seed in (1, 2):
        state = play(rule, state, cohort(rule, state, seed=seed)).state
    before, after = first.adapter.tensors(), state.adapter.tensors()
    unchanged = {n for n, x in before.items() if np.array_equal(x, after[n])}
    assert unchanged == rule.constant(first.task.spec)
    assert set(after) == set(before)
    np.testing.assert_array_equal(state.adapter.fixed["projection"], first.adapter.fixed["projection"])


MOVING_ALL = ("zeropad", "hetlora", "lora_fair", "lora_a2")
IN_PLACE = {n: x for n, x in RULES.items() if not n.startswith((*MOVING_ALL, *REFACTORED))}


@pytest.mark.parametrize("rule", IN_PLACE.values(), ids=IN_PLACE)
def test_clients_of_lower_rank_leave_the_other_directions_alone(rule):
    state = start()
    after = play(rule, state, cohort(rule, state, ranks=(1, 2, 1))).state.adapter.layers["q"]
    before = state.adapter.layers["q"]
    np.testing.assert_array_equal(after.a[2:], before.a[2:])
    np.testing.assert_array_equal(after.b[:, 2:], before.b[:, 2:])


def test_a_two_pass_rule_gives_the_best_rank_of_the_mean_product():
    state = start()
    rule = TwoPasses(width=7)  # as wide as the taller layer, so that no client's change is out of reach
    clients = cohort(rule, state, ranks=(1, 2, 3))
    after = play(rule, state, clients).state.adapter
    total = sum(w for _, w in clients.values())
    for name, d, k, rank, scale in (("q", 7, 5, 3, 2.0), ("v", 4, 9, 2, 0.5)):
        want = (
            weights(state.adapter)[name]
            + sum(w * (weights(u.trained)[name] - weights(u.received)[name]) for u, w in clients.values()) / total
        )
        assert want.shape == (d, k)
        u, s, vt = np.linalg.svd(want)
        np.testing.assert_allclose(after.layers[name].product(), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=5 * WIRE)
        assert after.layers[name].scale == scale


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, r"it has layers \[\]; want \['q', 'v'\]"),
        ({"q": 7, "v": 4, "k": 3}, r"it has layers \['k', 'q', 'v'\]; want \['q', 'v'\]"),
    ],
)
def test_an_adapter_of_another_model_is_refused(layers, message):
    state = start()
    other = Adapter({n: LowRank(np.ones((1, 5)), np.ones((d, 1)), 2.0) for n, d in layers.items()})
    with pytest.raises(ValueError, match=message):
        FEDIT.encode(Update(other, other), state.task)


@pytest.mark.parametrize("side", ["received", "trained"])
def test_factors_of_another_scale_are_refused(side):
    state = start()
    update = train(FEDIT, FEDIT.send(state, 3), np.random.default_rng(0))
    wrong = getattr(update, side)
    wrong = replace(wrong, layers={n: replace(x, scale=7.0) for n, x in wrong.layers.items()})
    with pytest.raises(ValueError, match=r"q: factors have scale .*; want the server's 2.0"):
        FEDIT.encode(replace(update, **{side: wrong}), state.task)
