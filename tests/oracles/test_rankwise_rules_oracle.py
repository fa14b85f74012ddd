"""Zero padding, RBLA, HetLoRA and FFA by owners, against their equations index by index, in loops.

Sources: Cho et al., arXiv:2401.06432; Chen et al., arXiv:2408.08699. Values are averaged in the papers, and so they are
here: what a client trained, with nothing where it holds nothing.
"""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update
from fedpeft.channel import PlainChannel
from fedpeft.rules import FactorMean, HetLoRA, Scaffold, ServerState, Task, ZeroPad
from fedpeft.rules.factors import lacking
from tests.laws.cohorts import LAYERS, RBLA, cohort, play, start

WIRE = 4e-6
EXACT = PlainChannel(exact=True)
RANKS = [(3, 3, 3), (1, 2, 3, 1), (2, 1), (1, 1)]
each_ranks = pytest.mark.parametrize("ranks", RANKS, ids=str)


def held_by(clients, name, i):
    """Weight and trained layer of each client that holds direction i."""
    return [(w, u.trained.layers[name]) for u, w in clients.values() if u.received.layers[name].rank > i]


def head_is_the_mean(before, after, clients):
    total = sum(w for _, w in clients.values())
    for name in before.adapter.dense:
        want = sum(w / total * u.trained.dense[name] for u, w in clients.values())
        np.testing.assert_allclose(after.adapter.dense[name], want, atol=2e-6)


@each_ranks
def test_zero_padding_averages_what_is_held_with_zeros_for_the_rest(ranks):
    state = start()
    for seed in range(3):
        clients = cohort(ZeroPad(), state, ranks, seed)
        total = sum(w for _, w in clients.values())
        after = play(ZeroPad(), state, clients).state
        for name, d, k, r, _ in LAYERS:
            for i in range(r):
                a, b = np.zeros(k), np.zeros(d)
                for w, x in held_by(clients, name, i):
                    a, b = a + w / total * x.a[i], b + w / total * x.b[:, i]
                np.testing.assert_allclose(after.adapter.layers[name].a[i], a, atol=WIRE)
                np.testing.assert_allclose(after.adapter.layers[name].b[:, i], b, atol=WIRE)
        head_is_the_mean(state, after, clients)
        state = after


@each_ranks
def test_rbla_averages_each_direction_over_those_who_hold_it(ranks):
    state = start()
    for seed in range(3):
        clients = cohort(RBLA, state, ranks, seed)
        after = play(RBLA, state, clients).state
        for name, _, _, r, _ in LAYERS:
            old, new = state.adapter.layers[name], after.adapter.layers[name]
            for i in range(r):
                held = held_by(clients, name, i)
                total = sum(w for w, _ in held)
                a = sum(w / total * x.a[i] for w, x in held) if held else old.a[i]
                b = sum(w / total * x.b[:, i] for w, x in held) if held else old.b[:, i]
                np.testing.assert_allclose(new.a[i], a, atol=WIRE)
                np.testing.assert_allclose(new.b[:, i], b, atol=WIRE)
        head_is_the_mean(state, after, clients)
        state = after


def test_a_client_lacks_what_it_was_not_sent_and_not_what_it_gave_up():
    state = start()
    received = state.adapter.cut(2)
    lacks = lacking(Update(received, received.cut(1)), state.task.spec)
    assert {n: x.tolist() for n, x in lacks.items()} == {"q/lacks": [0.0, 0.0, 1.0], "v/lacks": [0.0, 0.0]}
    assert {x.dtype for x in lacks.values()} == {np.dtype(np.float64)}


@pytest.mark.parametrize("cycle", [("ab",), ("a",), ("b",)], ids=str)
@pytest.mark.parametrize(("held", "is_held"), [(2**-30, False), (2**-30 + 2**-52, True), (2**-31, False)])
def test_a_share_of_holders_that_is_rounding_moves_nothing(cycle, held, is_held):
    rule, state = FactorMean(cycle, owners=True), start()
    mean = {n: np.ones(shape) for n, shape in rule.layout(state.task).shapes}
    mean["q/lacks"], mean["v/lacks"] = np.array([0.5, 0.0, 1 - held]), np.zeros(2)
    after = rule.decode(mean, state).adapter.layers["q"]
    moved = {"a": after.a - state.adapter.layers["q"].a, "b": (after.b - state.adapter.layers["q"].b).T}
    for part in "ab":
        shares = np.array([2.0, 1.0, 1 / held if is_held else 0.0]) * (part in cycle[0])
        want = np.repeat(shares[:, None], moved[part].shape[1], axis=1)
        np.testing.assert_allclose(moved[part], want, rtol=1e-12, atol=1e-12)  # 1 / held is 1e9, and a share 1e-9


@pytest.mark.parametrize("rule", [ZeroPad(), RBLA, HetLoRA(), Scaffold()], ids=repr)
def test_the_mean_that_is_decoded_stays_as_it_was(rule):
    state = start()
    mean = {n: np.full(shape, 0.25) for n, shape in rule.layout(state.task).shapes}
    rule.decode(mean, state)
    assert list(mean) == [n for n, _ in rule.layout(state.task).shapes]
    assert all(np.all(x == 0.25) for x in mean.values())


@pytest.mark.parametrize("cycle", [("b",), ("b", "a")], ids=["ffa", "rolora"])
@each_ranks
def test_one_factor_by_owners_counts_each_direction_by_itself(cycle, ranks):
    rule, state = FactorMean(cycle, owners=True), start()
    for seed in range(2):
        part = rule.trains(state.task)
        clients = cohort(rule, state, ranks, seed)
        after = play(rule, state, clients).state
        for name, _, _, r, _ in LAYERS:
            old, new = state.adapter.layers[name], after.adapter.layers[name]
            np.testing.assert_array_equal(*(getattr(x, "a" if part == "b" else "b") for x in (old, new)))
            for i in range(r):
                held = held_by(clients, name, i)
                total = sum(w for w, _ in held)
                if part == "b":
                    want = sum(w / total * x.b[:, i] for w, x in held) if held else old.b[:, i]
                    np.testing.assert_allclose(new.b[:, i], want, atol=WIRE)
                else:
                    want = sum(w / total * x.a[i] for w, x in held) if held else old.a[i]
                    np.testing.assert_allclose(new.a[i], want, atol=WIRE)
        state = after


@each_ranks
def test_hetlora_weighs_by_the_size_of_each_clients_product(ranks):
    rule, state = HetLoRA(gamma=1.0), start()
    for seed in range(3):
        clients = cohort(rule, state, ranks, seed)
        after = play(rule, state, clients).state
        for name, d, k, r, _ in LAYERS:
            sizes = [w * np.linalg.norm(u.trained.layers[name].product()) for u, w in clients.values()]
            a, b = np.zeros((r, k)), np.zeros((d, r))
            for size, (u, _) in zip(sizes, clients.values(), strict=True):
                x = u.trained.layers[name]
                a[: x.rank] += size / sum(sizes) * x.a
                b[:, : x.rank] += size / sum(sizes) * x.b
            np.testing.assert_allclose(after.adapter.layers[name].a, a, atol=WIRE)
            np.testing.assert_allclose(after.adapter.layers[name].b, b, atol=WIRE)
        head_is_the_mean(state, after, clients)
        state = after


def test_hetlora_with_one_factor_at_zero_moves_nothing_since_no_client_has_a_size():
    rng = np.random.default_rng(0)
    layer = LowRank(rng.normal(size=(2, 5)), np.zeros((4, 2)), 1.0)
    first = Adapter({"w": layer}, {"head": rng.normal(size=3)})
    trained = Adapter({"w": replace(layer, a=rng.normal(size=(2, 5)))}, {"head": rng.normal(size=3)})
    state = ServerState(Task(first.spec), first)
    after = play(HetLoRA(), state, {1: (Update(first, trained), 2.0)}, EXACT).state.adapter
    np.testing.assert_array_equal(after.layers["w"].a, layer.a)
    np.testing.assert_array_equal(after.layers["w"].b, layer.b)
    np.testing.assert_allclose(after.dense["head"], trained.dense["head"])


def test_hetlora_with_clients_of_a_small_size_moves_as_with_others():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 5)), rng.normal(size=(4, 2))
    first = Adapter({"w": LowRank(0.1 * a, 0.1 * b, 1.0)})
    trained = [Adapter({"w": LowRank(0.1 * a + x, -0.2 * b, 1.0)}) for x in (0.02, -0.05)]
    x, y = (w * np.linalg.norm(t.layers["w"].product()) for w, t in zip((1, 3), trained, strict=True))
    assert 0 < (x + y) / 4 < 1
    state = ServerState(Task(first.spec), first)
    clients = {i: (Update(first, t), w) for i, (t, w) in enumerate(zip(trained, (1.0, 3.0), strict=True))}
    after = play(HetLoRA(gamma=1.0), state, clients, EXACT).state.adapter.layers["w"]
    np.testing.assert_allclose(after.a, 0.1 * a + (0.02 * x - 0.05 * y) / (x + y), atol=1e-14)
    np.testing.assert_allclose(after.b, -0.2 * b, atol=1e-14)


@pytest.mark.parametrize("total", [0.0, -0.25, float("nan")])
def test_hetlora_moves_no_factor_by_a_mean_whose_norms_are_nothing_but_noise(total):
    """As where a channel adds noise to zeros: then neither the norms nor the changes say anything."""
    rule, state = HetLoRA(), start()
    mean = {n: np.full(shape, 0.5) for n, shape in rule.layout(state.task).shapes} | {"q/norm": np.full(3, total)}
    after = rule.decode(mean, state).adapter
    before = state.adapter
    for part in "ab":
        np.testing.assert_array_equal(getattr(after.layers["q"], part), getattr(before.layers["q"], part))
    np.testing.assert_allclose(after.layers["v"].b, before.layers["v"].b + 1, rtol=1e-14)
    np.testing.assert_allclose(after.dense["head"], before.dense["head"] + 0.5, rtol=1e-14)


def pruned(rank, gamma, change):
    """Server's and one client's layer, where training has multiplied b's last column by ``change``."""
    rng = np.random.default_rng(rank)
    layer = LowRank(rng.normal(size=(rank, 6)), rng.normal(size=(9, rank)), 2.0)
    b = layer.b + 0.5
    b[:, -1] = change * layer.b[:, -1]
    first, trained = Adapter({"w": layer}), Adapter({"w": replace(layer, b=b)})
    state = ServerState(Task(first.spec), first)
    return layer, b, play(HetLoRA(gamma), state, {1: (Update(first, trained), 3.0)}, EXACT).state.adapter.layers["w"]


@pytest.mark.parametrize(("rank", "gamma", "left"), [(3, 0.99, 2), (5, 0.8, 4), (5, 0.5, 2), (2, 0.5, 1), (2, 0.1, 1)])
def test_a_client_leaves_out_last_directions_that_have_shrunk(rank, gamma, left):
    layer, b, after = pruned(rank, gamma, 0.0)
    tail = b[:, left:], layer.b[:, left:]
    assert np.linalg.norm(tail[0]) < np.linalg.norm(tail[1]) or left < rank - 1
    if np.linalg.norm(tail[0]) < np.linalg.norm(tail[1]):
        np.testing.assert_allclose(after.b[:, :left], b[:, :left], atol=1e-12)
        np.testing.assert_allclose(after.b[:, left:], 0, atol=1e-12)
        np.testing.assert_allclose(after.a[left:], 0, atol=1e-12)
    else:
        np.testing.assert_allclose(after.b, b, atol=1e-12)
    np.testing.assert_allclose(after.a[:left], layer.a[:left], atol=1e-12)


@pytest.mark.parametrize(("gamma", "change"), [(0.99, 1.0), (0.99, 1.5), (1.0, 0.0)])
def test_directions_that_have_not_shrunk_stay(gamma, change):
    layer, b, after = pruned(3, gamma, change)
    np.testing.assert_allclose(after.b, b, atol=1e-12)
    np.testing.assert_allclose(after.a, layer.a, atol=1e-12)


def test_a_pruned_clients_size_is_that_of_what_is_left():
    rng = np.random.default_rng(2)
    layer = LowRank(rng.normal(size=(3, 6)), rng.normal(size=(9, 3)), 2.0)
    first = Adapter({"w": layer})
    state = ServerState(Task(first.spec), first)
    small = replace(layer, b=layer.b * [1.5, 1.5, 0.5])
    other = replace(layer, b=layer.b * 1.2, a=layer.a + 1)
    clients = {1: (Update(first, Adapter({"w": small})), 2.0), 2: (Update(first, Adapter({"w": other})), 5.0)}
    after = play(HetLoRA(0.7), state, clients, EXACT).state.adapter.layers["w"]
    left = replace(small, a=small.a[:2], b=small.b[:, :2])
    x, y = 2 * np.linalg.norm(left.product()), 5 * np.linalg.norm(other.product())
    a = (x * np.vstack([left.a, np.zeros((1, 6))]) + y * other.a) / (x + y)
    b = (x * np.hstack([left.b, np.zeros((9, 1))]) + y * other.b) / (x + y)
    np.testing.assert_allclose(after.a, a, atol=1e-12)
    np.testing.assert_allclose(after.b, b, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, -0.5, 1.01])
def test_a_share_of_directions_out_of_range_is_refused(gamma):
    with pytest.raises(ValueError, match=f"^gamma: got {gamma}; want more than 0 and at most 1"):
        HetLoRA(gamma)


def idle(rule, state, ranks):
    clients = {i: (Update(x, x), 1.0) for i, r in enumerate(ranks) for x in [rule.send(state, r).adapter]}
    return play(rule, state, clients, EXACT).state


def test_zero_padding_lets_rare_directions_fade_each_round_and_rbla_and_frozen_rests_do_not():
    """T5, with nobody training: a quarter of the weight holds all 3 directions of q, half holds 2."""
    ranks = (1, 2, 3, 1)
    states = {"zeropad": ZeroPad(), "hetlora": HetLoRA(), "rbla": RBLA, "fedit": FactorMean()}
    first = start()
    for name, rule in states.items():
        state = first
        for n in range(1, 4):
            state = idle(rule, state, ranks)
            for before, now in zip(first.adapter.layers["q"].b.T, state.adapter.layers["q"].b.T, strict=True):
                if name in ("rbla", "fedit"):
                    np.testing.assert_array_equal(now, before)
            if name == "zeropad":
                share = np.array([1, 1 / 2, 1 / 4]) ** n
                np.testing.assert_allclose(state.adapter.layers["q"].b, first.adapter.layers["q"].b * share, rtol=1e-9)
        if name == "hetlora":
            left = np.linalg.norm(state.adapter.layers["q"].b, axis=0) / np.linalg.norm(
                first.adapter.layers["q"].b, axis=0
            )
            assert left[0] == pytest.approx(1)
            assert (1 / 2) ** 3 < left[1] < 1
            assert (1 / 4) ** 3 < left[2] < left[1]
