"""FedIT, FFA-LoRA, RoLoRA and FedSA-LoRA against their papers' equations, written out over the list of clients.

Sources: Zhang et al., arXiv:2305.05644; Sun et al., arXiv:2403.12313; Chen et al., arXiv:2409.02346; Guo et al.,
arXiv:2410.01463. Terms travel in fp32, so a mean of numbers below 10 is off by at most 1e-6.
"""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update
from fedpeft.rules import ServerState, Task
from tests.laws.cohorts import FEDIT, FEDSA, FFA, LAYERS, ROLORA, cohort, play, start, train

WIRE = 2e-6
NAMES = [name for name, *_ in LAYERS]


def shares(clients):
    total = sum(weight for _, weight in clients.values())
    return [(weight / total, update) for update, weight in clients.values()]


def wide(x, rank, axis):
    """x with zeros up to this rank along its rank's axis."""
    more = [(0, 0), (0, 0)]
    more[axis] = (0, rank - x.shape[axis])
    return np.pad(x, more)


def test_fedit_averages_each_factor_and_misses_the_mean_product_by_the_covariance():
    state = start()
    clients = cohort(FEDIT, state, ranks=(3, 3, 3, 3))
    after = play(FEDIT, state, clients).state.adapter
    for name, _, _, _, s in LAYERS:
        each = [(p, u.trained.layers[name].b, u.trained.layers[name].a) for p, u in shares(clients)]
        b_mean, a_mean = sum(p * b for p, b, _ in each), sum(p * a for p, _, a in each)
        np.testing.assert_allclose(after.layers[name].a, a_mean, atol=WIRE)
        np.testing.assert_allclose(after.layers[name].b, b_mean, atol=WIRE)
        mean_product = sum(p * s * b @ a for p, b, a in each)
        covariance = sum(p * (b - b_mean) @ (a - a_mean) for p, b, a in each)
        missed = mean_product / s - after.layers[name].b @ after.layers[name].a
        np.testing.assert_allclose(missed, covariance, atol=20 * WIRE)  # T1; three products of numbers near 3
        assert np.abs(covariance).max() > 0.1
    for name in state.adapter.dense:
        np.testing.assert_allclose(
            after.dense[name], sum(p * u.trained.dense[name] for p, u in shares(clients)), atol=WIRE
        )


def test_fedit_has_no_covariance_where_clients_took_the_same_step():
    state = start()
    [(update, _)] = cohort(FEDIT, state, ranks=(3,)).values()
    after = play(FEDIT, state, {i: (update, float(i)) for i in (1, 2, 5)}).state.adapter
    for name in NAMES:
        np.testing.assert_allclose(after.layers[name].product(), update.trained.layers[name].product(), atol=20 * WIRE)


@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 2, 3, 1)])
def test_fedit_pads_smaller_ranks_with_no_change(ranks):
    """A client of rank 1 has no say in the second direction: its zero change still counts in the mean (HetLoRA)."""
    state = start()
    clients = cohort(FEDIT, state, ranks=ranks)
    after = play(FEDIT, state, clients).state.adapter
    for name, _, _, r, _ in LAYERS:
        old = state.adapter.layers[name]
        b = sum(p * wide(u.trained.layers[name].b - u.received.layers[name].b, r, 1) for p, u in shares(clients))
        a = sum(p * wide(u.trained.layers[name].a - u.received.layers[name].a, r, 0) for p, u in shares(clients))
        np.testing.assert_allclose(after.layers[name].b, old.b + b, atol=WIRE)
        np.testing.assert_allclose(after.layers[name].a, old.a + a, atol=WIRE)


@pytest.mark.parametrize("rule", [FFA, ROLORA], ids=["ffa", "rolora"])
@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (1, 3, 2, 1)])
def test_one_factor_at_a_time_adds_exactly_the_mean_change_round_after_round(rule, ranks):
    state = start()
    for seed in range(4):
        clients = cohort(rule, state, ranks, seed)
        want = {
            name: s * state.adapter.layers[name].b @ state.adapter.layers[name].a
            + sum(
                p * s * (x.b @ x.a - y.b @ y.a)
                for p, u in shares(clients)
                for x, y in [(u.trained.layers[name], u.received.layers[name])]
            )
            for name, _, _, _, s in LAYERS
        }
        state = play(rule, state, clients).state
        for name, x in state.adapter.layers.items():
            np.testing.assert_allclose(x.product(), want[name], atol=20 * WIRE)


def test_rolora_trains_and_sends_b_then_a_then_b():
    state = start()
    for moved, kept in (("b", "a"), ("a", "b"), ("b", "a")):
        assert ROLORA.trains(state.task) == moved
        clients = cohort(ROLORA, state, seed=state.task.round)
        after = play(ROLORA, state, clients).state
        for name, before in state.adapter.layers.items():
            want = sum(p * getattr(u.trained.layers[name], moved) for p, u in shares(clients))
            np.testing.assert_allclose(getattr(after.adapter.layers[name], moved), want, atol=WIRE)
            np.testing.assert_array_equal(getattr(after.adapter.layers[name], kept), getattr(before, kept))
            both = ROLORA.send(after, 3).adapter.layers[name]  # the next round's clients need both
            np.testing.assert_array_equal(both.a, after.adapter.layers[name].a)
            np.testing.assert_array_equal(both.b, after.adapter.layers[name].b)
        state = after


def test_ffa_never_moves_a():
    first = state = start()
    for seed in range(3):
        assert FFA.trains(state.task) == "b"
        state = play(FFA, state, cohort(FFA, state, seed=seed)).state
    for name in NAMES:
        np.testing.assert_array_equal(state.adapter.layers[name].a, first.adapter.layers[name].a)
        assert not np.allclose(state.adapter.layers[name].b, first.adapter.layers[name].b)


def test_fedsa_averages_a_while_b_and_the_head_stay_with_each_client():
    state = start()
    first = state.adapter
    kept = FEDSA.personal(state.task.spec)
    assert kept == {"q/b", "v/b", "head", "bias", "gate"}
    rng = np.random.default_rng(4)
    held = {client: {n: first.tensors()[n] for n in kept} for client in (1, 2, 3)}
    mine = {client: {name: first.layers[name].b for name in NAMES} for client in held}
    heads = dict.fromkeys(held, first.dense["head"])
    for _ in range(3):
        sent = FEDSA.send(state, 3)
        assert FEDSA.trains(state.task) == "ab"
        clients = {}
        for client, weight in ((1, 5.0), (2, 1.0), (3, 2.0)):
            received = sent.adapter.put(held[client])
            for name in NAMES:
                np.testing.assert_array_equal(received.layers[name].b, mine[client][name])
            np.testing.assert_array_equal(received.dense["head"], heads[client])
            update = train(FEDSA, replace(sent, adapter=received), rng)
            held[client] = {n: update.trained.tensors()[n] for n in kept}
            mine[client] = {name: update.trained.layers[name].b for name in NAMES}
            heads[client] = update.trained.dense["head"]
            clients[client] = (update, weight)
        state = play(FEDSA, state, clients).state
        for name in NAMES:
            want = sum(p * u.trained.layers[name].a for p, u in shares(clients))
            np.testing.assert_allclose(state.adapter.layers[name].a, want, atol=WIRE)
            np.testing.assert_array_equal(state.adapter.layers[name].b, first.layers[name].b)  # the server learns no b
        for name, x in first.dense.items():
            np.testing.assert_array_equal(state.adapter.dense[name], x)
    assert not np.allclose(heads[1], heads[2])


# ---- T3: y = X a bᵀ, one direction, noiseless, clients' inputs of unlike covariance

OUT, IN, CLIENTS = 6, 9, 4
DRAW = np.random.default_rng(3)
B_STAR, A_STAR = DRAW.normal(size=(OUT, 1)), DRAW.normal(size=(1, IN))
INPUTS = [DRAW.normal(size=(400, IN)) * DRAW.uniform(0.9, 1.1, IN) for _ in range(CLIENTS)]
TARGETS = [x @ A_STAR.T @ B_STAR.T for x in INPUTS]
COUNTS = [1.0, 4.0, 2.0, 3.0]


def linear_round(rule, state):
    """Each client solves for b exactly, or takes 3 gradient steps on a; the loss is |X aᵀ bᵀ − Y|² / 2n."""
    clients = {}
    for i, (x, y) in enumerate(zip(INPUTS, TARGETS, strict=True)):
        sent = rule.send(state, 1).adapter
        a, b = sent.layers["w"].a, sent.layers["w"].b
        if rule.trains(state.task) == "b":
            z = x @ a.T
            b = y.T @ z / (z.T @ z)
        else:
            for _ in range(3):
                gradient = b.T @ (x @ a.T @ b.T - y).T @ x / len(x)
                a = a - 0.7 / (b.T @ b) * gradient
        clients[i] = (Update(sent, Adapter({"w": LowRank(a, b, 1.0)})), COUNTS[i])
    return play(rule, state, clients).state


def excess(state):
    w = state.adapter.layers["w"]
    return float(np.sum((w.b @ w.a - B_STAR @ A_STAR) ** 2))


def linear_start():
    first = Adapter({"w": LowRank(np.random.default_rng(8).normal(size=(1, IN)), np.zeros((OUT, 1)), 1.0)})
    return ServerState(Task(first.spec), first)


def test_on_a_linear_model_rolora_converges_geometrically():
    state = linear_start()
    excesses = []
    for _ in range(30):
        state = linear_round(ROLORA, state)
        excesses.append(excess(state))
    assert excesses[-1] < 1e-9
    pairs = np.array(excesses[::2])
    above = pairs[pairs > 1e-25]  # terms are changes, so what fp32 rounds shrinks with them, down to fp64's own unit
    assert len(above) >= 10
    assert np.all(above[1:] < 0.5 * above[:-1])


def test_on_a_linear_model_ffa_stops_at_the_floor():
    """Nothing but b moves, so the best is |b*|²·|a*|²·sin² of the angle between a₀ and a*, and c is the unlikeness."""
    state = linear_start()
    a = state.adapter.layers["w"].a
    cosine = (a @ A_STAR.T).item() / (np.linalg.norm(a) * np.linalg.norm(A_STAR))
    floor = np.sum(B_STAR**2) * np.sum(A_STAR**2) * (1 - cosine**2)
    for _ in range(30):
        state = linear_round(FFA, state)
    assert floor > 1
    assert floor <= excess(state) <= 1.001 * floor
