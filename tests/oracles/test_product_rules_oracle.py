"""FlexLoRA, FedSVD and LoRA-FAIR against their equations, with dense matrices; no rule forms one on the server.

Sources: Bai et al., arXiv:2402.11505; Lee et al., arXiv:2505.12805; Bian et al., arXiv:2411.14961.
"""

import tracemalloc

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update, same
from fedpeft.rules import FedEx, FedSVD, FlexLoRA, FLoRA, LoRAFair, ServerState, Subspace, Task
from tests.laws.cohorts import LAYERS, cohort, play, start
from tests.oracles.dense import (
    EXACT,
    NAMES,
    PRODUCT,
    each_ranks,
    each_scales,
    head_is_the_mean,
    mean_drift,
    model,
    product,
    shares,
    truncated,
    with_scales_of_their_own,
)


@each_ranks
@each_scales
def test_flexlora_adds_the_mean_change_and_keeps_the_best_of_its_rank(ranks, own_scales):
    state = start()
    for seed in range(3):
        clients = cohort(FlexLoRA(), state, ranks, seed)
        if own_scales:
            clients = with_scales_of_their_own(clients)
        before = model(state)
        after = play(FlexLoRA(), state, clients).state
        for name, _, _, r, s in LAYERS:
            want = truncated(before[name] + mean_drift(clients, name), r)
            got = after.adapter.layers[name]
            assert got.scale == s
            np.testing.assert_allclose(product(got), want, atol=PRODUCT)
            np.testing.assert_allclose(got.a @ got.a.T, got.b.T @ got.b, atol=PRODUCT)  # an even split
            np.testing.assert_allclose(np.diag(np.diag(got.a @ got.a.T)), got.a @ got.a.T, atol=PRODUCT)
            assert np.all(np.diff(np.diag(got.a @ got.a.T)) <= 0)
        head_is_the_mean(state, after, clients)
        assert after.task.round == seed + 1
        state = after


@each_ranks
def test_full_flexlora_is_the_best_of_its_rank_for_the_mean_of_what_was_trained(ranks):
    rule, state = FlexLoRA("full"), start()
    for seed in range(3):
        clients = cohort(rule, state, ranks, seed)
        assert [u.received.layers["q"].rank for u, _ in clients.values()] == list(ranks)
        after = play(rule, state, clients).state
        for name, _, _, r, _ in LAYERS:
            mean_product = sum(p * product(u.trained.layers[name]) for p, u in shares(clients))
            np.testing.assert_allclose(product(after.adapter.layers[name]), truncated(mean_product, r), atol=PRODUCT)
        head_is_the_mean(state, after, clients)
        state = after


@pytest.mark.parametrize("form", ["drift", "full"])
def test_a_direction_without_energy_can_still_be_trained(form):
    rng = np.random.default_rng(0)
    first = Adapter({"w": LowRank(rng.normal(size=(4, 9)), np.zeros((8, 4)), 2.0)})
    state = ServerState(Task(first.spec), first)
    sent = FlexLoRA(form).send(state, 1).adapter
    trained = Adapter({"w": LowRank(sent.layers["w"].a, rng.normal(size=(8, 1)), 2.0)})
    got = play(FlexLoRA(form), state, {1: (Update(sent, trained), 3.0)}, EXACT).state.adapter.layers["w"]
    np.testing.assert_allclose(product(got), product(trained.layers["w"]), atol=1e-12)
    lengths = np.linalg.norm(got.a, axis=1)
    np.testing.assert_allclose(lengths[1:], 1e-3, rtol=1e-6)
    assert lengths[0] > 0.1
    np.testing.assert_allclose(got.b[:, 1:], 0, atol=1e-10)


def test_flexlora_does_the_same_with_a_stack_so_wide_that_it_searches():
    rng = np.random.default_rng(2)
    first = Adapter({n: LowRank(rng.normal(size=(2, 130)), rng.normal(size=(110, 2)), 0.5) for n in "qv"})
    state = ServerState(Task(first.spec), first)
    clients = cohort(FlexLoRA(), state, (2, 1) * 40)
    after = play(FlexLoRA(), state, clients, EXACT).state
    for name in "qv":
        whole = model(state)[name] + mean_drift(clients, name)
        best = np.linalg.norm(whole - truncated(whole, 2))
        assert np.linalg.norm(whole - product(after.adapter.layers[name])) < 1.001 * best
    again = play(FlexLoRA(), state, clients, EXACT).state
    assert same(after.adapter, again.adapter)


@pytest.mark.parametrize("rule", [FlexLoRA(), FlexLoRA("full"), Subspace(seed=0)], ids=repr)
def test_a_rank_that_no_layer_can_have_is_kept_as_zeros(rule):
    """Rank 5 where d is 3: there are 3 directions, and the adapter keeps its shape."""
    rng = np.random.default_rng(2)
    first = Adapter({"w": LowRank(rng.normal(size=(5, 9)), rng.normal(size=(3, 5)), 0.5)})
    state = ServerState(Task(first.spec), first)
    clients = cohort(rule, state, (5, 5))
    after = play(rule, state, clients, EXACT).state
    got = after.adapter.layers["w"]
    assert (got.a.shape, got.b.shape) == ((5, 9), (3, 5))
    assert not got.a[3:].any()
    np.testing.assert_allclose(product(got), model(state)["w"] + mean_drift(clients, "w"), atol=1e-9)
    play(rule, after, cohort(rule, after, (5, 2)), EXACT)


@each_ranks
def test_fedsvd_is_exact_and_its_a_is_orthonormal(ranks):
    rule, state = FedSVD(), start()
    for seed in range(3):
        assert rule.trains(state.task) == "b"
        clients = cohort(rule, state, ranks, seed)
        before = model(state)
        for u, _ in clients.values():
            for name in NAMES:
                np.testing.assert_array_equal(u.trained.layers[name].a, u.received.layers[name].a)
        after = play(rule, state, clients).state
        for name, _, _, r, s in LAYERS:
            want = before[name] + mean_drift(clients, name)
            got = after.adapter.layers[name]
            np.testing.assert_allclose(product(got), want, atol=PRODUCT)
            np.testing.assert_allclose(got.a @ got.a.T, np.eye(r), atol=1e-12)
            values = np.linalg.svd(want, compute_uv=False)[:r]
            np.testing.assert_allclose(got.b.T @ got.b, np.diag((values / s) ** 2), atol=10 * PRODUCT)
            assert got.scale == s
        assert after.tail == state.tail
        head_is_the_mean(state, after, clients)
        state = after


def test_fedsvd_starts_from_b_zero_with_an_orthonormal_a_that_can_be_trained():
    first = Adapter({"w": LowRank(np.random.default_rng(0).normal(size=(3, 7)), np.zeros((5, 3)), 2.0)})
    state = ServerState(Task(first.spec), first)
    got = play(FedSVD(), state, {1: (Update(first, first), 1.0)}).state.adapter.layers["w"]
    np.testing.assert_array_equal(got.b, np.zeros((5, 3)))
    np.testing.assert_allclose(got.a @ got.a.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(first.layers["w"].a @ got.a.T @ got.a, first.layers["w"].a, atol=1e-12)


@pytest.mark.parametrize(("d", "k", "rank"), [(3, 9, 5), (5, 9, 5), (2, 3, 5), (5, 3, 4), (1, 2, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fedsvd_trains_as_many_directions_after_a_round_as_before_where_d_is_small(d, k, rank, dtype):
    rng = np.random.default_rng(2)
    first = Adapter({"w": LowRank(rng.normal(size=(rank, k)).astype(dtype), np.zeros((d, rank), dtype), 0.5)})
    state, rule = ServerState(Task(first.spec), first), FedSVD()
    for seed in range(2):
        before = model(state)["w"]
        clients = cohort(rule, state, (rank, 1), seed)
        state = play(rule, state, clients, EXACT).state
        got, a = state.adapter.layers["w"], first.layers["w"].a
        np.testing.assert_allclose(product(got), before + mean_drift(clients, "w"), atol=1e-5)
        count = min(rank, k)
        np.testing.assert_allclose(got.a @ got.a.T, np.diag((np.arange(rank) < count) * 1.0), atol=1e-6)
        np.testing.assert_allclose(a @ got.a.T @ got.a, a, atol=2e-6)  # what b can reach is what it could
        assert not got.b[:, d:].any()
        assert got.a.dtype == dtype


@each_ranks
@pytest.mark.parametrize("ridge", [1e-9, 0.01, 3.0])
def test_lora_fair_corrects_b_by_ridge_regression(ranks, ridge):
    rule, state = LoRAFair(ridge), start()
    clients = cohort(rule, state, ranks)
    after = play(rule, state, clients).state
    for name, d, _, r, s in LAYERS:
        old = state.adapter.layers[name]
        a, b = old.a.copy(), old.b.copy()
        for p, u in shares(clients):
            new, was = u.trained.layers[name], u.received.layers[name]
            a[: new.rank] += p * (new.a - was.a)
            b[:, : new.rank] += p * (new.b - was.b)
        target = (product(old) + mean_drift(clients, name)) / s - b @ a
        penalty = ridge * np.mean(np.sum(a**2, axis=1))
        # The minimum of ‖target − Δ a‖² + penalty ‖Δ‖², row by row, as one least-squares problem.
        system = np.vstack([a.T, np.sqrt(penalty) * np.eye(r)])
        delta = np.linalg.lstsq(system, np.vstack([target.T, np.zeros((r, d))]), rcond=None)[0].T
        got = after.adapter.layers[name]
        np.testing.assert_allclose(got.a, a, atol=2e-6)
        np.testing.assert_allclose(got.b, b + delta, atol=PRODUCT)
        error = np.linalg.norm(target - (got.b - b) @ a)
        assert error < np.linalg.norm(target)
    head_is_the_mean(state, after, clients)


@pytest.mark.parametrize("ridge", [0.0, -0.5, float("nan")])
def test_a_penalty_that_is_none_is_refused(ridge):
    with pytest.raises(ValueError, match=f"^ridge: got {ridge}; want more than 0$"):
        LoRAFair(ridge)


# ---- T5: rank collapse, without any training


def energy_above(state, rank):
    return {n: float(np.sum(np.linalg.svd(x, compute_uv=False)[rank:] ** 2)) for n, x in model(state).items()}


def idle(rule, state, ranks):
    clients = {i: (Update(x, x), 1.0) for i, r in enumerate(ranks) for x in [rule.send(state, r).adapter]}
    return play(rule, state, clients, EXACT).state


def test_full_flexlora_loses_what_only_some_clients_hold_by_a_constant_factor_a_round_and_drift_does_not():
    rng = np.random.default_rng(1)
    first = Adapter({"w": LowRank(rng.normal(size=(6, 30)), rng.normal(size=(20, 6)), 0.5)})
    ranks = (2, 2, 2, 6)  # a quarter of the weight holds what is above rank 2
    drifted = lost = play(FlexLoRA(), ServerState(Task(first.spec), first), {1: (Update(first, first), 1.0)}).state
    start_energy = energy_above(lost, 2)["w"]
    seen = []
    for _ in range(4):
        lost, drifted = idle(FlexLoRA("full"), lost, ranks), idle(FlexLoRA(), drifted, ranks)
        seen.append(energy_above(lost, 2)["w"])
    np.testing.assert_allclose(seen, [start_energy / 16**n for n in (1, 2, 3, 4)], rtol=1e-6)  # (1/4)² each round
    np.testing.assert_allclose(energy_above(drifted, 2)["w"], start_energy, rtol=1e-9)


# ---- the server's memory

LARGE = [FlexLoRA(), FlexLoRA("full"), FLoRA(seed=0), FedEx(), FedSVD(), LoRAFair()]


@pytest.mark.parametrize("rule", LARGE, ids=repr)
def test_no_dense_matrix_is_formed_on_the_server(rule):
    d, k, rank = 6000, 5000, 4
    rng = np.random.default_rng(0)
    first = Adapter({"w": LowRank(rng.normal(size=(rank, k)), rng.normal(size=(d, rank)), 1.0)})
    state = ServerState(Task(first.spec), first)
    clients = cohort(rule, state, (4, 2, 4))
    encodings = [(rule.encode(u, state.task), w) for u, w in clients.values()]
    tracemalloc.start()
    if isinstance(rule, FedSVD):
        rule.decode({n: (x + encodings[1][0][n]) / 2 for n, x in encodings[0][0].items()}, state)
    else:
        rule.decode(encodings, state)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.1 * d * k * 8, f"{peak / 1e6:.0f} MB; a dense fp64 matrix has {d * k * 8 / 1e6:.0f} MB"
