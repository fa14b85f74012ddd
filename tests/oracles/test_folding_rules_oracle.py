"""FLoRA and FedEx-LoRA against their equations, with dense matrices: what is folded into the tail, and what is left.

Sources: Wang et al., arXiv:2409.05976; Singhal et al., arXiv:2410.09432.
"""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update
from fedpeft.rules import FedEx, FLoRA, ServerState, Task
from fedpeft.rules.fold import as_kept
from tests.laws.cohorts import LAYERS, cohort, play, start
from tests.oracles.dense import (
    EXACT,
    NAMES,
    PRODUCT,
    each_ranks,
    each_scales,
    head_is_the_mean,
    kept,
    mean_drift,
    model,
    product,
    shares,
    truncated,
    with_scales_of_their_own,
)


@each_ranks
@each_scales
def test_flora_folds_the_mean_product_exactly_and_starts_afresh(ranks, own_scales):
    rule, state = FLoRA(seed=4), start()
    fresh = []
    for seed in range(3):
        clients = cohort(rule, state, ranks, seed)
        if own_scales:
            clients = with_scales_of_their_own(clients)
        before = model(state)
        after = play(rule, state, clients).state
        for name, d, k, r, s in LAYERS:
            np.testing.assert_allclose(model(after)[name], before[name] + mean_drift(clients, name), atol=PRODUCT)
            got, tail = after.adapter.layers[name], after.tail[name]
            assert (got.a.shape, got.b.shape, got.scale, tail.scale) == ((r, k), (d, r), s, 1.0)
            assert not got.b.any()
            assert np.abs(got.a).max() <= 1 / np.sqrt(k)
            assert got.a.min() < 0 < got.a.max()
            assert tail.rank <= min(d, k)
            np.testing.assert_allclose(tail.a @ tail.a.T, np.eye(tail.rank), atol=1e-9)
            fresh.append(got.a[:2, :5])
        head_is_the_mean(state, after, clients)
        state = after
    assert len({x.tobytes() for x in fresh}) == 6  # another one in each round and layer
    again = play(rule, start(), cohort(rule, start(), seed=9)).state.adapter.layers["q"].a
    np.testing.assert_array_equal(again[:2], fresh[0])
    other = play(FLoRA(seed=5), start(), cohort(rule, start(), seed=9)).state.adapter.layers["q"].a
    assert not np.array_equal(again, other)


def test_flora_draws_a_as_wide_as_lora_does():
    first = Adapter({"w": LowRank(np.ones((20, 400)), np.zeros((3, 20)), 1.0)})
    state = ServerState(Task(first.spec), first)
    a = play(FLoRA(seed=1), state, {1: (Update(first, first), 1.0)}).state.adapter.layers["w"].a
    np.testing.assert_allclose(np.std(a), 1 / np.sqrt(3 * 400), rtol=0.03)  # 8000 numbers; 4 standard errors are 0.02
    assert np.abs(np.mean(a)) < 4 / np.sqrt(3 * 400 * 8000)


def test_floras_first_tail_is_no_wider_than_the_clients_ranks():
    first = Adapter({"w": LowRank(np.random.default_rng(0).normal(size=(5, 30)), np.zeros((20, 5)), 2.0)})
    rule, state = FLoRA(seed=0), ServerState(Task(first.spec), first)
    widths = []
    for round, ranks in enumerate([(1, 2, 1), (2, 3), (5, 4, 5)]):
        state = play(rule, state, cohort(rule, state, ranks, round), EXACT).state
        widths.append(state.tail["w"].rank)
    assert widths == [4, 9, 20]


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.99])
def test_flora_keeps_the_fewest_directions_with_the_energy_asked_for(energy):
    rule, state = FLoRA(seed=4, energy=energy), start()
    clients = cohort(rule, state, (1, 3, 2, 1), 2)
    after = play(rule, state, clients).state
    for name in NAMES:
        want, rank = kept(model(state)[name] + mean_drift(clients, name), energy)
        assert after.tail[name].rank == rank
        np.testing.assert_allclose(model(after)[name], want, atol=PRODUCT)
    clients = cohort(rule, after, (3, 2), 5)
    second = play(rule, after, clients).state
    for name in NAMES:  # what was folded before is not cut again
        want, _ = kept(mean_drift(clients, name), energy)
        np.testing.assert_allclose(model(second)[name], model(after)[name] + want, atol=PRODUCT)


@pytest.mark.parametrize("rule", [FLoRA(seed=4, largest=2), FedEx(largest=2)], ids=repr)
def test_a_limited_tail_keeps_its_largest_directions(rule):
    state = start()
    whole = play(replace(rule, largest=None), state, cohort(rule, state, (3, 2, 3), 2)).state
    after = play(rule, state, cohort(rule, state, (3, 2, 3), 2)).state
    for name in NAMES:
        assert after.tail[name].rank == 2
        np.testing.assert_allclose(after.tail[name].product(), truncated(product(whole.tail[name]), 2), atol=1e-9)
    clients = cohort(rule, after, (3, 1, 3), 3)
    second = play(rule, after, clients).state
    for name in NAMES:
        assert second.tail[name].rank == 2
        all_of_it = model(after)[name] + mean_drift(clients, name) - product(second.adapter.layers[name])
        np.testing.assert_allclose(second.tail[name].product(), truncated(all_of_it, 2), atol=PRODUCT)


@each_ranks
@each_scales
def test_fedex_averages_factors_and_its_tail_makes_that_exact(ranks, own_scales):
    rule, state = FedEx(), start()
    for seed in range(3):
        clients = cohort(rule, state, ranks, seed)
        before = model(state)
        after = play(rule, state, with_scales_of_their_own(clients) if own_scales else clients).state
        for name, d, k, r, _ in LAYERS:
            old = state.adapter.layers[name]
            moves = {"a": np.zeros((r, k)), "b": np.zeros((d, r))}
            for p, u in shares(clients):
                new, was = u.trained.layers[name], u.received.layers[name]
                moves["a"][: new.rank] += p * (new.a - was.a)
                moves["b"][:, : new.rank] += p * (new.b - was.b)
            got = after.adapter.layers[name]
            np.testing.assert_allclose(got.a, old.a + moves["a"], atol=2e-6)
            np.testing.assert_allclose(got.b, old.b + moves["b"], atol=2e-6)
            np.testing.assert_allclose(model(after)[name], before[name] + mean_drift(clients, name), atol=PRODUCT)
            if name in state.tail:
                assert after.tail[name].rank <= min(d, k)
            else:
                assert after.tail[name].rank <= min(d, k, (len(ranks) - 1) * r)
            assert not np.allclose(model(after)[name], product(got), atol=0.01)  # or there is nothing to see
            x = np.random.default_rng(seed).normal(size=k)
            want = sum(p * (before[name] @ x + (product(u.trained.layers[name]) - product(u.received.layers[name])) @ x)
                       for p, u in shares(clients))  # fmt: skip
            np.testing.assert_allclose(model(after)[name] @ x, want, atol=5 * PRODUCT)
        head_is_the_mean(state, after, clients)
        state = after


def test_fedexs_residual_is_the_covariance_and_can_be_cut_by_energy():
    state = start()
    clients = cohort(FedEx(), state, (3, 3, 3), 1)
    for energy in (1.0, 0.7):
        after = play(FedEx(energy=energy), state, clients).state
        for name, _, _, _, s in LAYERS:
            each = [(p, u.trained.layers[name]) for p, u in shares(clients)]
            b_mean, a_mean = sum(p * x.b for p, x in each), sum(p * x.a for p, x in each)
            covariance = s * sum(p * (x.b - b_mean) @ (x.a - a_mean) for p, x in each)
            want = covariance if energy == 1 else kept(covariance, energy)[0]
            np.testing.assert_allclose(after.tail[name].product(), want, atol=PRODUCT)


def test_a_round_in_which_nothing_moves_leaves_no_tail():
    first = Adapter({"w": LowRank(np.ones((2, 7)), np.zeros((5, 2)), 2.0)})
    state = ServerState(Task(first.spec), first)
    for rule in (FLoRA(seed=0), FedEx()):
        assert play(rule, state, {1: (Update(first, first), 1.0)}).state.tail == {}


def test_a_fold_that_takes_the_whole_tail_away_leaves_none():
    first = Adapter({"w": LowRank(np.eye(1, 7), np.eye(5, 1), 2.0)})
    state = ServerState(Task(first.spec), first, {"w": LowRank(np.eye(1, 7), -4 * np.eye(5, 1), 1.0)})
    trained = Adapter({"w": LowRank(np.eye(1, 7), 2 * np.eye(5, 1), 2.0)})
    assert play(FLoRA(seed=0), state, {1: (Update(first, trained), 1.0)}).state.tail == {}
    both = [Adapter({"w": LowRank(a * np.eye(1, 7), b * np.eye(5, 1), 2.0)}) for a, b in ((2, 2), (0, -2))]
    state = replace(state, tail={"w": LowRank(np.eye(1, 7), -4 * np.eye(5, 1), 1.0)})
    after = play(FedEx(), state, {n: (Update(first, x), 1.0) for n, x in enumerate(both)}).state
    assert after.tail == {}  # the covariance is 2 · ½ · (1 · 2 + (−1) · (−2)) = 4


@pytest.mark.parametrize("rule", [FLoRA(seed=0), FedEx()], ids=repr)
def test_a_tail_with_a_scale_is_added_to_as_it_is(rule):
    tail = {"q": LowRank(np.ones((1, 5)), np.arange(7.0)[:, None], 3.0)}
    state = replace(start(), tail=tail)
    clients = cohort(rule, state, (3, 2))
    after = play(rule, state, clients).state
    for name in NAMES:
        np.testing.assert_allclose(model(after)[name], model(state)[name] + mean_drift(clients, name), atol=PRODUCT)


def test_each_factor_is_kept_in_its_own_dtype():
    like = LowRank(np.ones((1, 5), np.float32), np.ones((7, 1)), 3.0)
    got = as_kept(LowRank(np.ones((2, 5)), np.ones((7, 2), np.float32), 1.0), like)
    assert (got.a.dtype, got.b.dtype, got.scale) == (np.float32, np.float64, 1.0)
