"""The two-pass and the one-pass subspace rule against dense matrices: what is summed, what is rebuilt, what is kept.

Layers are larger than elsewhere, so that the sketch is narrower than they are. Terms travel in fp64 here: what is
tested is the algebra.
"""

import tracemalloc

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update
from fedpeft.channel import PlainChannel
from fedpeft.rounds import Metrics, SumRound, contribute
from fedpeft.rules import ServerState, Subspace, Task
from tests.laws.cohorts import cohort, play

LAYERS = (("q", 31, 23, 4, 2.0), ("v", 19, 37, 3, 0.5))
EXACT = PlainChannel(largest_norm=1e6, exact=True)
RANKS = (1, 4, 2, 3, 1)


def begin(dtype=np.float64, is_trained=True, round=0):
    rng = np.random.default_rng(7)
    layers = {
        n: LowRank(
            (rng.normal(size=(r, k)) / np.sqrt(3 * k)).astype(dtype),
            (rng.normal(size=(d, r)) if is_trained else np.zeros((d, r))).astype(dtype),
            s,
        )
        for n, d, k, r, s in LAYERS
    }
    first = Adapter(layers, {"head": rng.normal(size=(2, 3)).astype(dtype)})
    return ServerState(Task(first.spec, round), first)


def product(layer):
    return layer.scale * layer.b.astype(float) @ layer.a.astype(float)


def mean_drift(clients, name):
    total = sum(w for _, w in clients.values())
    return sum(
        w / total * (product(u.trained.layers[name]) - product(u.received.layers[name])) for u, w in clients.values()
    )


def truncated(w, rank):
    u, s, vt = np.linalg.svd(w)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def by_hand(rule, state, clients, name):
    """The best of the server's rank for what it held plus the mean change as seen through the sketch."""
    omega = rule.send(state, 1).task.shared[f"{name}/omega"].astype(float)
    drift = mean_drift(clients, name)
    y = drift @ omega
    if rule.one_pass:
        i = [n for n, *_ in LAYERS].index(name)
        rows = min(2 * omega.shape[1], drift.shape[0])
        psi = np.random.default_rng([rule.seed, state.task.round, i, 1]).normal(size=(rows, drift.shape[0]))
        q, _ = np.linalg.qr(y)
        seen = q @ np.linalg.lstsq(psi @ q, psi @ drift, rcond=None)[0]
    else:
        basis, values, _ = np.linalg.svd(y, full_matrices=False)
        basis = basis[:, values > 1e-12]
        seen = basis @ basis.T @ drift  # the projection on the range of y
    held = state.adapter.layers[name]
    return truncated(product(held) + seen, held.rank), seen


RULES = [
    Subspace(seed=3, oversampling=2),
    Subspace(seed=3, oversampling=5, warm=False),
    Subspace(seed=3),
    Subspace(seed=3, one_pass=True),
]
each_form = pytest.mark.parametrize("rule", RULES, ids=repr)


@each_form
def test_the_mean_change_is_seen_through_the_sketch_and_the_best_of_the_rank_is_kept(rule):
    state = begin(round=2)
    for seed in range(3):
        clients = cohort(rule, state, RANKS, seed)
        after = play(rule, state, clients, EXACT).state
        for name, d, k, r, s in LAYERS:
            want, _ = by_hand(rule, state, clients, name)
            got = after.adapter.layers[name]
            assert (got.a.shape, got.b.shape, got.scale) == ((r, k), (d, r), s)
            np.testing.assert_allclose(product(got), want, atol=1e-8)  # a pseudoinverse amplifies fp64's rounding
            np.testing.assert_allclose(got.a @ got.a.T, np.eye(r) / 3, atol=1e-12)
            values = np.linalg.svd(want, compute_uv=False)[:r]
            np.testing.assert_allclose(got.b.T @ got.b, np.diag(3 * (values / s) ** 2), atol=1e-6)
        total = sum(w for _, w in clients.values())
        head = sum(w / total * u.trained.dense["head"] for u, w in clients.values())
        np.testing.assert_allclose(after.adapter.dense["head"], head, atol=1e-12)
        assert after.tail == {}
        state = after


@each_form
def test_clients_of_every_rank_run_the_same_model(rule):
    state = begin()
    state = play(rule, state, cohort(rule, state, RANKS, 1), EXACT).state
    for rank in (1, 2, 3, 4, 99):
        sent = rule.send(state, rank)
        for name, _, _, r, _ in LAYERS:
            assert sent.adapter.layers[name].rank == min(rank, r)
            whole = product(sent.adapter.layers[name]) + (product(sent.tail[name]) if name in sent.tail else 0)
            np.testing.assert_allclose(whole, product(state.adapter.layers[name]), atol=1e-12)


@pytest.mark.parametrize("own_scale", [1.0, 3.0])
@pytest.mark.parametrize("warm", [True, False])
def test_two_passes_are_exact_where_the_change_has_no_higher_rank_than_the_sketch(warm, own_scale):
    """Two clients, ranks 1 and 2: a change of rank at most 6, and a sketch of 4 + 2 columns. Scales may differ."""
    rule, state = Subspace(seed=1, oversampling=3, warm=warm), begin()
    for seed in range(2):
        clients = cohort(rule, state, (1, 2), seed)
        for client, (u, w) in clients.items():
            scaled = [
                Adapter({n: LowRank(y.a, y.b / own_scale, y.scale * own_scale) for n, y in x.layers.items()}, x.dense)
                for x in (u.received, u.trained)
            ]
            clients[client] = (Update(*scaled), w)
        after = play(rule, state, clients, EXACT).state
        for name, *_ in LAYERS:
            want = product(state.adapter.layers[name]) + mean_drift(clients, name)
            rank = state.adapter.layers[name].rank
            np.testing.assert_allclose(product(after.adapter.layers[name]), truncated(want, rank), atol=1e-9)
        state = after


@pytest.mark.parametrize("is_trained", [False, True])
def test_the_first_round_starts_from_the_rows_of_a_and_later_ones_from_the_last_change(is_trained):
    rule, state = Subspace(seed=1, oversampling=2), begin(is_trained=is_trained)
    omega = rule.send(state, 2).task.shared
    for name, _, k, r, _ in LAYERS:
        a = state.adapter.layers[name].a
        x = omega[f"{name}/omega"]
        assert x.shape == (k, r + 2)
        np.testing.assert_allclose(x[:, :r].T @ x[:, :r], np.eye(r), atol=1e-12)
        np.testing.assert_allclose(x[:, :r] @ (x[:, :r].T @ a.T), a.T, atol=1e-12)  # the same space
        drawn = np.random.default_rng([1, 0, [n for n, *_ in LAYERS].index(name), 0]).normal(size=(k, 2)) / np.sqrt(k)
        np.testing.assert_allclose(x[:, r:], drawn, atol=1e-12)
    clients = cohort(rule, state, RANKS, 5)
    after = play(rule, state, clients, EXACT).state
    again = rule.send(after, 1).task.shared
    for name, _, _, r, _ in LAYERS:
        _, seen = by_hand(rule, state, clients, name)
        top = np.linalg.svd(seen)[2][:r]
        x = again[f"{name}/omega"][:, :r]
        np.testing.assert_allclose(x @ x.T, top.T @ top, atol=1e-8)  # the same space, whatever the signs
        assert not np.allclose(again[f"{name}/omega"][:, r:], omega[f"{name}/omega"][:, r:])


def test_a_cold_start_is_gaussian_alone_and_depends_on_seed_round_and_layer():
    cold = Subspace(2, 3, warm=False)
    omegas = [
        rule.send(begin(round=round), 1).task.shared[f"{name}/omega"][:19, :6]
        for rule, round in ((cold, 0), (cold, 1), (Subspace(4, 3, warm=False), 0))
        for name in "qv"
    ]
    assert len({x.tobytes() for x in omegas}) == 6
    rng = np.random.default_rng([2, 0, 0, 0])
    np.testing.assert_allclose(omegas[0], rng.normal(size=(23, 7))[:19, :6] / np.sqrt(23), atol=1e-12)
    state = play(cold, begin(), cohort(cold, begin())).state
    rng = np.random.default_rng([2, 1, 0, 0])
    later = cold.send(state, 1).task.shared["q/omega"]
    np.testing.assert_allclose(later, rng.normal(size=(23, 7)) / np.sqrt(23), atol=1e-12)


@pytest.mark.parametrize("rule", RULES[:3], ids=repr)
def test_two_passes_never_do_worse_than_no_update(rule):
    rng = np.random.default_rng(0)
    state = begin()
    for seed in range(5):
        clients = cohort(rule, state, tuple(rng.integers(1, 5, 6)), seed)
        for name, *_ in LAYERS:
            _, seen = by_hand(rule, state, clients, name)
            drift = mean_drift(clients, name)
            assert np.linalg.norm(drift - seen) < np.linalg.norm(drift)
        state = play(rule, state, clients, EXACT).state


def test_a_warm_start_sees_more_than_a_cold_one_from_the_first_round_on():
    """Ten clients whose changes go on from round to round, with a spectrum that falls slowly."""
    rng = np.random.default_rng(3)
    first = Adapter({"w": LowRank(rng.normal(size=(4, 60)) / np.sqrt(180), np.zeros((50, 4)), 1.0)})
    moves = [(rng.normal(size=(4, 60)) / np.sqrt(180), rng.normal(size=(50, 4))) for _ in range(10)]
    errors = {}
    for warm in (True, False):
        rule, state = Subspace(seed=0, oversampling=2, warm=warm), ServerState(Task(first.spec), first)
        errors[warm] = []
        for _ in range(5):
            sent = rule.send(state, 4)
            w = sent.adapter.layers["w"]
            each = [LowRank(w.a + 0.1 * a / i, w.b + 0.1 * b / i, 1.0) for i, (a, b) in enumerate(moves, 1)]
            clients = {i: (Update(sent.adapter, Adapter({"w": x})), 1.0) for i, x in enumerate(each)}
            drift = mean_drift(clients, "w")
            q, _ = np.linalg.qr(drift @ sent.task.shared["w/omega"])
            errors[warm].append(np.linalg.norm(drift - q @ (q.T @ drift)) / np.linalg.norm(drift))
            state = play(rule, state, clients, EXACT).state
    assert errors[True][0] < errors[False][0] / 5
    assert np.mean(errors[True][1:]) < 0.7 * np.mean(errors[False][1:])


@pytest.mark.parametrize("one_pass", [False, True])
def test_the_sketch_is_no_wider_than_the_layer(one_pass):
    rule = Subspace(seed=0, oversampling=30, one_pass=one_pass)
    spec = begin().task.spec
    assert [rule.width(x) for x in spec.layers] == [23, 19]
    layout = dict(rule.layout(Task(spec)).shapes)
    assert layout["q/y"] == (31, 23)
    if one_pass:
        assert (layout["q/z"], layout["v/z"]) == ((31, 23), (19, 37))
        assert dict(Subspace(0, 8, True).layout(Task(spec)).shapes)["q/z"] == (24, 23)
    else:
        assert dict(rule.layout(Task(spec, pass_=1)).shapes) == {"q/p": (23, 23), "v/p": (37, 19), "head": (2, 3)}
    clients = cohort(rule, begin(), RANKS)
    after = play(rule, begin(), clients, EXACT).state
    for name, _, _, r, _ in LAYERS:
        want = truncated(product(begin().adapter.layers[name]) + mean_drift(clients, name), r)
        np.testing.assert_allclose(product(after.adapter.layers[name]), want, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"oversampling": 0}, "oversampling: got 0; want at least 1 column"),
        ({"oversampling": 7, "one_pass": True}, "oversampling: got 7; want at least 8 columns where one_pass is set"),
        ({"warm": False, "one_pass": True}, "warm: got false; want true where one_pass is set"),
    ],
)
def test_what_can_not_work_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Subspace(seed=0, **options)
    Subspace(seed=0, oversampling=1)
    Subspace(seed=0, oversampling=8, one_pass=True)


def test_what_travels_has_the_dtype_of_the_factor_on_its_side():
    state = begin()
    layers = {n: LowRank(x.a.astype(np.float32), x.b, x.scale) for n, x in state.adapter.layers.items()}
    state = ServerState(state.task, Adapter(layers, state.adapter.dense))
    rule = Subspace(seed=0)
    machine = SumRound(state, {1: 4}, 1, EXACT, rule=rule)
    [(update, weight)] = cohort(rule, state, (4,)).values()
    for _ in range(2):
        task = machine.outbox()[1].task
        machine.receive(1, contribute(rule, EXACT, update, weight, Metrics(units=1.0), task), 0, task.pass_)
        machine.close()
    assert {x.dtype for x in machine.state.task.shared.values()} == {np.dtype(np.float64)}  # q, on b's side
    after = machine.result().state
    assert {x.dtype for x in after.memory.values()} == {np.dtype(np.float32)}  # on a's
    assert {x.shape for x in after.memory.values()} == {(23, 4), (37, 3)}


def test_no_dense_matrix_is_formed_on_either_side():
    d, k, rank = 6000, 5000, 4
    rng = np.random.default_rng(0)
    first = Adapter({"w": LowRank(rng.normal(size=(rank, k)), rng.normal(size=(d, rank)), 1.0)})
    rule, state = Subspace(seed=0), ServerState(Task(first.spec), first)
    clients = cohort(rule, state, (4, 2))
    tracemalloc.start()
    play(rule, state, clients, EXACT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.1 * d * k * 8, f"{peak / 1e6:.0f} MB; a dense fp64 matrix has {d * k * 8 / 1e6:.0f} MB"


@pytest.mark.parametrize("one_pass", [True, False])
def test_a_round_in_which_nothing_changes_keeps_the_directions_that_are_known(one_pass):
    rule, first = Subspace(seed=1, one_pass=one_pass), begin()
    state = play(rule, first, cohort(rule, first)).state
    after = play(rule, state, {1: (Update(state.adapter, state.adapter), 1.0)}).state
    assert len(after.memory) == 2
    for name, x in after.memory.items():
        np.testing.assert_array_equal(x, state.memory[name])
    assert play(rule, first, {1: (Update(first.adapter, first.adapter), 1.0)}).state.memory == {}
