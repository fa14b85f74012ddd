"""FedRot-LoRA and LoRA-A², against their equations in dense matrices and loops, in several rounds.

Sources: Zhang et al., arXiv:2602.23638; Koo et al., arXiv:2410.22815, equations 4 to 6.
"""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update
from fedpeft.rules import FedRot, LoRAA2, ServerState, Task
from fedpeft.testing.cohorts import numbered
from tests.laws.cohorts import FEDIT, LAYERS, cohort, play, start
from tests.oracles.dense import EXACT, each_ranks, head_is_the_mean, product, shares

NEAR = 1e-8  # TIE and rounding


def best_rotation(start_from, target):
    """The rotation Q for which start_from @ Q is nearest to target, by going downhill in one plane after another.

    Each plane's best angle has a closed form; on rotations this sum of squares has no other minimum to end in.
    """
    r = start_from.shape[1]
    q = rotation(7, r)
    for _ in range(2000):
        before = q.copy()
        for i, j in combinations(range(r), 2):
            x = start_from @ q
            along = np.sum(x[:, i] * target[:, i] + x[:, j] * target[:, j])
            across = np.sum(x[:, j] * target[:, i] - x[:, i] * target[:, j])
            c, s = np.array([along, across]) / np.hypot(along, across)
            q[:, i], q[:, j] = c * q[:, i] + s * q[:, j], c * q[:, j] - s * q[:, i]
        if np.abs(q - before).max() < 1e-14:
            return q
    raise AssertionError("no rotation found")


def rotation(seed, r):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(r, r)))
    q[:, 0] *= np.sign(np.linalg.det(q))
    return q


def turned(update, name, round, strength):
    new, old = update.trained.layers[name], update.received.layers[name]
    if round == 0:
        return np.eye(new.rank)
    q = best_rotation(new.a.T, old.a.T) if round % 2 == 1 else best_rotation(new.b, old.b)
    if strength == 1:
        return q
    return best_rotation(np.eye(new.rank), (1 - strength) * np.eye(new.rank) + strength * q)


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("round", [0, 1, 2])
@each_ranks
def test_fedrot_averages_factors_that_are_turned_to_those_received(round, strength, ranks):
    rule, state = FedRot(strength), start(round=round)
    clients = cohort(rule, state, ranks, seed=3)
    after = play(rule, state, clients, EXACT, numbered(ranks)).state
    for name, *_ in LAYERS:
        held = state.adapter.layers[name]
        a, b = np.array(held.a), np.array(held.b)
        for share, update in shares(clients):
            new, old = update.trained.layers[name], update.received.layers[name]
            q = turned(update, name, round, strength)
            np.testing.assert_allclose((new.b @ q) @ (q.T @ new.a), new.b @ new.a, atol=1e-12)
            a[: new.rank] += share * (q.T @ new.a - old.a)
            b[:, : new.rank] += share * (new.b @ q - old.b)
        np.testing.assert_allclose(after.adapter.layers[name].a, a, atol=NEAR * 10)
        np.testing.assert_allclose(after.adapter.layers[name].b, b, atol=NEAR * 10)
    head_is_the_mean(state, after, clients)


def test_fedrot_of_no_strength_is_fedit():
    state = start(round=3)
    clients = cohort(FEDIT, state, (1, 3, 2))
    got, want = play(FedRot(0.0), state, clients, EXACT).state, play(FEDIT, state, clients, EXACT).state
    for name, x in want.adapter.tensors().items():
        np.testing.assert_allclose(got.adapter.tensors()[name], x, atol=1e-12)


@pytest.mark.parametrize("round", [1, 2])
def test_clients_that_learn_the_same_and_hold_it_otherwise_lose_nothing_by_fedrot_and_all_by_fedit(round):
    state = start(round=round)
    [(update, _)] = cohort(FEDIT, state, (3,)).values()
    change = {n: 0.1 * (x - state.adapter.tensors()[n]) for n, x in update.trained.tensors().items()}
    same = state.adapter.moved(change)
    clients = {}
    for i in range(5):
        layers = {
            n: LowRank(q.T @ x.a, x.b @ q, x.scale) for n, x in same.layers.items() for q in [rotation(i, x.rank)]
        }
        clients[i] = (Update(state.adapter, replace(same, layers=layers)), 1.0 + i)
    turned, plain = (play(r, state, clients, EXACT).state.adapter for r in (FedRot(), FEDIT))
    for name, x in same.layers.items():
        np.testing.assert_allclose(product(turned.layers[name]), product(x), atol=1e-7)
        assert np.linalg.norm(product(plain.layers[name]) - product(x)) > 0.3 * np.linalg.norm(product(x))


def test_a_mirrored_direction_is_not_mirrored_back():
    """Of a rotation and a reflection that is nearer, the rotation: blended with the identity, the other is singular."""
    rng = np.random.default_rng(0)
    layer = LowRank(rng.normal(size=(2, 6)), rng.normal(size=(7, 2)), 1.0)
    flip = np.diag([1.0, -1.0])
    first, mirrored = Adapter({"w": layer}), Adapter({"w": LowRank(flip @ layer.a, layer.b @ flip, 1.0)})
    state = ServerState(Task(first.spec, 1), first)
    encoded = FedRot().encode(Update(first, mirrored), state.task)
    a = layer.a + encoded["w/a"]
    q = a @ np.linalg.pinv(flip @ layer.a)  # Qᵀ
    np.testing.assert_allclose(q @ q.T, np.eye(2), atol=1e-8)
    assert np.linalg.det(q) == pytest.approx(1.0)


def test_directions_that_say_nothing_are_not_turned():
    """Columns of b that have never moved from zero: nothing tells how to turn them, so the rotation is the least."""
    rng = np.random.default_rng(0)
    old = LowRank(rng.normal(size=(4, 6)), np.hstack([rng.normal(size=(7, 2)), np.zeros((7, 2))]), 1.0)
    new = replace(old, a=old.a + 0.1 * rng.normal(size=(4, 6)), b=old.b * [1.5, 0.7, 1, 1])
    first, trained = Adapter({"w": old}), Adapter({"w": new})
    encoded = FedRot().encode(Update(first, trained), Task(first.spec, 2))
    np.testing.assert_allclose(encoded["w/a"][2:], new.a[2:] - old.a[2:], atol=1e-12)


def test_a_billionth_of_the_identity_goes_into_the_cross_product():
    """To the last digits, by Newton's iteration for the orthogonal factor."""
    rng = np.random.default_rng(0)
    old = LowRank(rng.normal(size=(3, 6)), rng.normal(size=(7, 3)), 1.0)
    new = replace(old, a=old.a + 0.3 * rng.normal(size=(3, 6)), b=old.b + 0.3 * rng.normal(size=(7, 3)))
    task = Task(Adapter({"w": old}).spec, 1)
    sent = FedRot().encode(Update(Adapter({"w": old}), Adapter({"w": new})), task)
    cross = new.a @ old.a.T
    q = cross + 1e-9 * np.sqrt(np.sum(cross**2)) * np.eye(3)
    assert np.linalg.det(q) > 0
    for _ in range(60):
        q = (q + np.linalg.inv(q).T) / 2
    np.testing.assert_allclose(sent["w/b"], new.b @ q - old.b, rtol=0, atol=2e-13)  # 1e-9 more would be off by 1e-10


def some_factors(rank):
    rng = np.random.default_rng(rank)
    return rng.normal(size=(rank, 6)), rng.normal(size=(7, rank))


def moved(old, seed, parts="ab", mirror=1.0):
    """The layer with noise on some of its factors, and its last direction mirrored in them."""
    rng = np.random.default_rng(seed)
    flip = np.ones(old.rank)
    flip[-1] = mirror
    a, b = (x + 0.3 * rng.normal(size=x.shape) for x in (flip[:, None] * old.a, old.b * flip))
    return replace(old, a=a if "a" in parts else old.a, b=b if "b" in parts else old.b)


def sent_by(old, new, round):
    """What a client sends of one layer, and the adapter's factors that it stands for."""
    first, trained = Adapter({"w": old}), Adapter({"w": new})
    sent = FedRot().encode(Update(first, trained), Task(first.spec, round))
    return old.a + sent["w/a"], old.b + sent["w/b"]


@pytest.mark.parametrize(("round", "parts"), [(1, "a"), (2, "b")])
def test_a_client_that_changed_one_factor_turns_both(round, parts):
    old = LowRank(*some_factors(3), 2.0)
    new = moved(old, 1, parts)
    q = best_rotation(new.a.T, old.a.T) if parts == "a" else best_rotation(new.b, old.b)
    a, b = sent_by(old, new, round)
    assert np.abs(q - np.eye(3)).max() > 0.01
    np.testing.assert_allclose(a, q.T @ new.a, atol=NEAR * 10)
    np.testing.assert_allclose(b, new.b @ q, atol=NEAR * 10)


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("rank", [3, 4])
def test_of_a_reflection_the_direction_that_says_least_is_turned_back(round, rank):
    old = LowRank(*some_factors(rank), 2.0)
    new = moved(old, 1, mirror=-1.0)
    cross = new.a @ old.a.T if round == 1 else new.b.T @ old.b
    assert np.linalg.det(cross) < 0  # so the nearest orthogonal matrix is a reflection
    q = best_rotation(new.a.T, old.a.T) if round == 1 else best_rotation(new.b, old.b)
    a, b = sent_by(old, new, round)
    np.testing.assert_allclose(a, q.T @ new.a, atol=NEAR * 10)
    np.testing.assert_allclose(b, new.b @ q, atol=NEAR * 10)


@pytest.mark.parametrize("round", [1, 2])
def test_factors_in_single_precision_are_turned_in_double(round):
    old = LowRank(*some_factors(3), 2.0)
    old, new = (LowRank(x.a.astype(np.float32), x.b.astype(np.float32), 2.0) for x in (old, moved(old, 1)))
    double = [LowRank(x.a.astype(np.float64), x.b.astype(np.float64), 2.0) for x in (old, new)]
    for got, want in zip(sent_by(old, new, round), sent_by(*double, round), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)  # fp32 would be off by 1e-8


def test_fedrot_refuses_a_client_with_a_scale_of_its_own():
    old = LowRank(*some_factors(3), 2.0)
    with pytest.raises(ValueError, match=r"^w: factors have scale 7.0; want the server's 2.0"):
        sent_by(old, replace(moved(old, 1), scale=7.0), 1)


@pytest.mark.parametrize("strength", [-0.01, 1.01])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match=f"^strength: got {strength}; want at least 0 and at most 1"):
        FedRot(strength)


def chosen_by(update, part, budget):
    """(layer, direction) pairs whose change of ΔW is largest, each as a dense matrix."""
    moved = {}
    for name, _, _, r, scale in LAYERS:
        new, old = update.trained.layers[name], update.received.layers[name]
        for i in range(r):
            change = np.outer(new.b[:, i], new.a[i]) - np.outer(old.b[:, i], old.a[i])
            moved[name, i] = scale * np.linalg.norm(change)
    return sorted(moved, key=moved.get, reverse=True)[:budget]


@pytest.mark.parametrize("ranks", [(3, 3), (1, 3, 2, 1), (1, 1), (2, 1)], ids=str)
def test_lora_a2_sends_the_directions_that_move_the_model_most_over_all_layers(ranks):
    rule, state = LoRAA2(), start()
    spread = False
    for seed in range(4):
        part = "ba"[seed % 2]
        assert rule.trains(state.task) == part
        clients = cohort(rule, state, ranks, seed)
        after = play(rule, state, clients, EXACT, numbered(ranks)).state
        want = {n: {"a": np.array(x.a), "b": np.array(x.b)} for n, x in state.adapter.layers.items()}
        for (share, update), rank in zip(shares(clients), ranks, strict=True):
            budget = sum(min(rank, r) for _, _, _, r, _ in LAYERS)
            picked = chosen_by(update, part, budget)
            assert len(picked) == budget
            spread |= sum(name == "q" for name, _ in picked) not in (min(rank, 3),)
            for name, i in picked:
                new, old = update.trained.layers[name], update.received.layers[name]
                if part == "b":
                    want[name]["b"][:, i] += share * (new.b[:, i] - old.b[:, i])
                else:
                    want[name]["a"][i] += share * (new.a[i] - old.a[i])
        for name, x in after.adapter.layers.items():
            np.testing.assert_allclose(x.a, want[name]["a"], atol=1e-12)
            np.testing.assert_allclose(x.b, want[name]["b"], atol=1e-12)
        head_is_the_mean(state, after, clients)
        state = after
    assert spread or min(ranks) == 3  # some client takes more from one layer than its rank, and fewer from the other


def test_lora_a2_is_exact_for_what_is_sent():
    rule, state, ranks = LoRAA2(), start(round=1), (1, 2, 3)
    clients = cohort(rule, state, ranks)
    after = play(rule, state, clients, EXACT, numbered(ranks)).state
    for name in state.adapter.layers:
        change = 0
        for (share, update), rank in zip(shares(clients), ranks, strict=True):
            sent = rule.encode(update, rule.send(state, rank).task)
            change = (
                change + share * state.adapter.layers[name].scale * state.adapter.layers[name].b @ sent[f"{name}/a"]
            )
        got = product(after.adapter.layers[name]) - product(state.adapter.layers[name])
        np.testing.assert_allclose(got, change, atol=1e-12)


def test_lora_a2_tells_each_client_its_rank_and_sends_it_everything():
    state = start(dtype=np.float16)
    for rank, told in ((1, 1), (2, 2), (3, 3), (1 << 30, 3)):
        sent = LoRAA2().send(state, rank)
        assert sent.task.shared["rank"].tolist() == [told]
        assert sent.task.shared["rank"].dtype == np.float16
        assert sent.adapter is state.adapter
    mixed = Adapter({"w": LowRank(np.ones((2, 5), np.float16), np.ones((4, 2), np.float32), 1.0)})
    told = LoRAA2().send(ServerState(Task(mixed.spec), mixed), 1).task.shared["rank"]
    assert told.dtype == np.float16  # as a has it
    no_layers = Adapter({}, {"head": np.ones(3)})
    alone = LoRAA2().send(ServerState(Task(no_layers.spec), no_layers), 4)
    assert alone.task.shared["rank"].tolist() == [0]
    assert alone.task.shared["rank"].dtype == np.float32


def test_the_size_of_a_scale_counts_in_the_choice_and_not_its_sign():
    rng = np.random.default_rng(0)
    layers = {n: LowRank(rng.normal(size=(2, 5)), rng.normal(size=(4, 2)), s) for n, s in (("p", 0.01), ("q", -50.0))}
    first = Adapter(layers)
    trained = first.moved({f"{n}/b": rng.normal(size=(4, 2)) for n in layers})
    rule, state = LoRAA2(), ServerState(Task(first.spec), first)
    sent = rule.encode(Update(first, trained), rule.send(state, 1).task)
    assert sent["q/b"].any(axis=0).all()
    assert not sent["p/b"].any()
