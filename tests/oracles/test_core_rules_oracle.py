"""Fed-SB and RAVAN against their equations, with dense matrices over the list of clients.

Sources: Singhal et al., arXiv:2502.15436; Raje et al., arXiv:2506.05568.
"""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update, same
from fedpeft.rules import FactorMean as FedIT
from fedpeft.rules import FedSB, Ravan, ServerState, Task, personal
from tests.laws.cohorts import LAYERS, cohort, play, start
from tests.oracles.dense import (
    EXACT,
    NAMES,
    PRODUCT,
    each_ranks,
    head_is_the_mean,
    mean_drift,
    model,
    product,
    shares,
)

WIDE = (
    ("q", 14, 11, 6, 2.0),
    ("v", 13, 19, 4, 0.5),
)  # name, d, k, rank, scale: room for several heads of two directions


def wide(seed=0, zero=False, round=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    layers = {}
    for n, d, k, r, s in WIDE:
        b = np.zeros((d, r)) if zero else rng.normal(size=(d, r))
        layers[n] = LowRank(rng.normal(size=(r, k)).astype(dtype), b.astype(dtype), s)
    first = Adapter(layers, {"head": rng.normal(size=(3, 5)).astype(dtype)})
    return ServerState(Task(first.spec, round), first)


def rounds(rule, state, ranks, count):
    """The states before and after each of some rounds, with its clients."""
    for seed in range(count):
        clients = cohort(rule, state, ranks, seed)
        after = play(rule, state, clients, EXACT, dict(zip(clients, ranks, strict=True))).state
        yield state, clients, after
        state = after


def after_rounds(rule, state, ranks, count):
    *_, (_, _, after) = rounds(rule, state, ranks, count)
    return after


# ---- Fed-SB


@each_ranks
def test_fedsb_is_exact_in_every_round_and_trains_b_then_a_then_the_core(ranks):
    rule = FedSB()
    for number, (before, clients, after) in enumerate(rounds(rule, start(), ranks, 5)):
        assert rule.trains(before.task) == ("b", "a", "core", "core", "core")[number]
        for name in NAMES:
            want = model(before)[name] + mean_drift(clients, name)
            np.testing.assert_allclose(model(after)[name], want, atol=1e-11)
        head_is_the_mean(before, after, clients)
        assert after.task.round == number + 1
        assert after.tail == {}


def test_fedsb_needs_three_rounds_and_others_one():
    assert FedSB().fewest_rounds == 3
    assert Ravan(seed=0).fewest_rounds == FedIT().fewest_rounds == 1
    assert personal(FedSB(), ("head",)).fewest_rounds == 3


def test_what_fedsb_sends_grows_small():
    def sizes(round):
        return dict(FedSB().layout(start(round=round).task).shapes)

    dense = {"head": (8, 6), "bias": (10,), "gate": ()}
    assert sizes(0) == {"q/b": (7, 3), "v/b": (4, 2)} | dense
    assert sizes(1) == {"q/a": (3, 5), "v/a": (2, 9)} | dense
    assert sizes(2) == sizes(9) == {"q/core": (3, 3), "v/core": (2, 2)} | dense


def test_the_first_round_of_fedsb_turns_b_into_the_products_left_directions():
    rule, state = FedSB(), start()
    [(_, clients, after)] = rounds(rule, state, (3, 1, 2), 1)
    for name, _, _, r, s in LAYERS:
        u, values, vt = np.linalg.svd(model(state)[name] + mean_drift(clients, name))
        got = after.adapter.layers[name]
        np.testing.assert_allclose(got.b.T @ got.b, np.eye(r), atol=1e-12)
        np.testing.assert_allclose(np.abs(np.sum(u[:, :r] * got.b, axis=0)), 1, atol=1e-9)  # in their order
        np.testing.assert_allclose(got.a @ got.a.T, np.diag((values[:r] / s) ** 2), atol=1e-9)
        assert got.scale == s
        assert np.abs(got.a @ vt[r:].T).max() < 1e-9
    assert after.adapter.fixed.keys() == state.adapter.fixed.keys()


def test_the_second_round_of_fedsb_freezes_the_products_singular_directions():
    *_, (before, clients, after) = rounds(FedSB(), start(), (3, 1, 2), 2)
    for name, _, _, r, s in LAYERS:
        u, values, vt = np.linalg.svd(model(before)[name] + mean_drift(clients, name))
        fixed, got = after.adapter.fixed, after.adapter.layers[name]
        left, right = fixed[f"{name}/left"], fixed[f"{name}/right"]
        np.testing.assert_allclose(np.abs(np.sum(u[:, :r] * left, axis=0)), 1, atol=1e-9)
        np.testing.assert_allclose(np.abs(np.sum(vt[:r] * right, axis=1)), 1, atol=1e-9)
        np.testing.assert_array_equal(fixed[f"{name}/at"], [list(range(r))])
        np.testing.assert_array_equal(got.a, right)
        np.testing.assert_allclose(got.b, left * (values[:r] / s), atol=1e-12)


@each_ranks
def test_from_the_third_round_on_fedsb_adds_the_mean_of_the_cores_blocks(ranks):
    rule = FedSB()
    first = after_rounds(rule, start(), ranks, 2)
    lefts = {n: first.adapter.fixed[f"{n}/left"] for n in NAMES}
    rights = {n: first.adapter.fixed[f"{n}/right"] for n in NAMES}
    rng, state = np.random.default_rng(5), first
    for _ in range(3):
        clients, want = {}, {n: model(state)[n] for n in NAMES}
        total = sum(range(1, len(ranks) + 1))
        for i, rank in enumerate(ranks):
            sent = rule.send(state, rank)
            trained = {}
            for name, _, _, r, s in LAYERS:
                mine = sent.adapter.layers[name]
                core = rng.normal(size=(min(rank, r), min(rank, r)))
                trained[name] = replace(mine, b=mine.b + lefts[name][:, :rank] @ core)
                want[name] = want[name] + (i + 1) / total * s * lefts[name][:, :rank] @ core @ rights[name][:rank]
            clients[i] = (Update(sent.adapter, replace(sent.adapter, layers=trained)), float(i + 1))
        state = play(rule, state, clients, EXACT).state
        for name in NAMES:
            np.testing.assert_allclose(model(state)[name], want[name], atol=1e-11)
            np.testing.assert_array_equal(state.adapter.layers[name].a, rights[name])
            for part in ("left", "right", "at"):
                assert state.adapter.fixed[f"{name}/{part}"] is first.adapter.fixed[f"{name}/{part}"]


@pytest.mark.parametrize("rank", [1, 2, 3, 1 << 30])
def test_a_client_of_fedsb_trains_the_first_block_of_the_core_and_runs_the_rest_frozen(rank):
    rule, tail = FedSB(), {"v": LowRank(np.ones((1, 9)), np.ones((4, 1)), 3.0)}
    state = replace(after_rounds(rule, start(), (3, 3), 3), tail=tail)
    sent = rule.send(state, rank)
    assert sent.task is state.task
    assert sent.adapter.dense is state.adapter.dense
    for name, _, _, r, s in LAYERS:
        left, right = (state.adapter.fixed[f"{name}/{side}"] for side in ("left", "right"))
        core = left.T @ state.adapter.layers[name].b
        held = min(rank, r)
        got = sent.adapter.layers[name]
        np.testing.assert_array_equal(got.a, right[:held])
        np.testing.assert_allclose(got.b, left[:, :held] @ core[:held, :held], atol=1e-12)
        np.testing.assert_array_equal(sent.adapter.fixed[f"{name}/at"], [list(range(held))])
        assert sent.adapter.fixed[f"{name}/left"] is left
        rest = core.copy()
        rest[:held, :held] = 0
        other = tail["v"].product() if name == "v" else 0
        got_tail = sent.tail[name].product() if name in sent.tail else 0 * product(got)
        np.testing.assert_allclose(got_tail, s * left @ rest @ right + other, atol=1e-11)
    assert ("q" in sent.tail) is (rank < 3)
    if rank >= 3:
        assert sent.adapter is state.adapter or same(sent.adapter, state.adapter)
        assert sent.tail["v"] is tail["v"]
    assert set(state.tail) == {"v"}


def test_a_rest_of_zeros_does_not_travel_with_fedsb():
    state = after_rounds(FedSB(), wide(zero=True), (6, 6), 2)
    layers = {n: replace(x, b=np.zeros_like(x.b)) for n, x in state.adapter.layers.items()}
    sent = FedSB().send(replace(state, adapter=replace(state.adapter, layers=layers)), 2)
    assert sent.tail == {}
    assert [x.rank for x in sent.adapter.layers.values()] == [2, 2]


@pytest.mark.parametrize("round", [0, 1])
def test_a_client_of_a_low_rank_trains_the_first_directions_while_fedsb_seeks_its_own(round):
    state = start(round=round)
    sent = FedSB().send(state, 1)
    assert [x.rank for x in sent.adapter.layers.values()] == [1, 1]
    for name in NAMES:
        want = product(state.adapter.layers[name])
        np.testing.assert_allclose(product(sent.adapter.layers[name]) + product(sent.tail[name]), want, atol=1e-12)


def test_fedsb_goes_on_from_an_adapter_that_is_not_yet_in_core_form():
    """As from a checkpoint of another rule: the product's own directions are taken, and nothing of it is lost."""
    state = start(round=7)
    sent = FedSB().send(state, 3)
    for name, _, _, r, _ in LAYERS:
        np.testing.assert_allclose(product(sent.adapter.layers[name]), product(state.adapter.layers[name]), atol=1e-12)
        np.testing.assert_allclose(sent.adapter.layers[name].a @ sent.adapter.layers[name].a.T, np.eye(r), atol=1e-12)
    [(before, clients, after)] = rounds(FedSB(), state, (3, 2), 1)
    for name in NAMES:
        np.testing.assert_allclose(model(after)[name], model(before)[name] + mean_drift(clients, name), atol=1e-11)


def test_a_core_is_sent_as_the_change_of_what_is_between_the_directions():
    state = after_rounds(FedSB(), start(), (3, 3), 2)
    sent = FedSB().send(state, 1)
    mine = sent.adapter.layers["q"]
    moved = mine.b + 0.7 * state.adapter.fixed["q/left"][:, :1]
    trained = replace(sent.adapter, layers=dict(sent.adapter.layers) | {"q": replace(mine, b=moved)})
    got = FedSB().encode(Update(sent.adapter, trained), state.task)
    want = np.zeros((3, 3))
    want[0, 0] = 0.7
    np.testing.assert_allclose(got["q/core"], want, atol=1e-12)
    assert not got["v/core"].any()
    assert got["q/core"].dtype == np.float64


def test_a_pair_of_factors_where_a_core_is_wanted_is_refused():
    state = start(round=4)
    with pytest.raises(ValueError, match=r"^q: got a pair of factors; want a core, as the server sends it in round 4"):
        FedSB().encode(Update(state.adapter, state.adapter), state.task)


def test_fedsb_starts_from_b_zero_and_keeps_dtypes_and_what_a_method_drew():
    state = wide(zero=True, dtype=np.float32)
    state = replace(state, adapter=replace(state.adapter, fixed={"projection": np.arange(3)}))
    for round, (_, clients, after) in enumerate(rounds(FedSB(), state, (6, 2, 1), 4)):
        assert all(x.dtype == np.float32 for x in after.adapter.tensors().values())
        assert after.adapter.fixed["projection"] is state.adapter.fixed["projection"]
        if round > 0:
            assert after.adapter.fixed["q/left"].dtype == after.adapter.fixed["q/right"].dtype == np.float32
        assert len(clients) == 3


def test_a_layer_with_fewer_directions_than_its_rank_is_padded():
    rng = np.random.default_rng(2)
    first = Adapter({"w": LowRank(rng.normal(size=(5, 9)), rng.normal(size=(3, 5)), 0.5)})
    for before, clients, after in rounds(FedSB(), ServerState(Task(first.spec), first), (5, 2, 4), 4):
        want = product(before.adapter.layers["w"]) + mean_drift(clients, "w")
        got = after.adapter.layers["w"]
        assert (got.a.shape, got.b.shape) == ((5, 9), (3, 5))
        np.testing.assert_allclose(product(got), want, atol=1e-10)


def test_directions_are_worked_out_once_for_all_clients_of_a_round():
    state = start(round=3)
    sent = [FedSB().send(state, 3).adapter for _ in range(2)]
    assert sent[0].fixed["q/left"] is sent[1].fixed["q/left"]
    state = wide(zero=True)
    sent = [Ravan(seed=0).send(state, rank).adapter for rank in (1, 6)]
    assert sent[0].fixed["q/left"] is sent[1].fixed["q/left"]


# ---- RAVAN


def test_ravan_begins_with_cores_of_zero_between_orthonormal_random_directions():
    state = wide(zero=True)
    sent = Ravan(seed=8, heads=2).send(state, 6).adapter
    for name, d, k, r, s in WIDE:
        left, right, at = (sent.fixed[f"{name}/{x}"] for x in ("left", "right", "at"))
        assert (left.shape, right.shape) == ((d, r), (r, k))
        np.testing.assert_allclose(left.T @ left, np.eye(r), atol=1e-12)
        np.testing.assert_allclose(right @ right.T, np.eye(r), atol=1e-12)
        np.testing.assert_array_equal(at, np.arange(r).reshape(2, r // 2))
        np.testing.assert_array_equal(sent.layers[name].a, right)
        assert not sent.layers[name].b.any()
        assert sent.layers[name].scale == s
    again, other = (Ravan(seed=x, heads=2).send(wide(zero=True), 6).adapter for x in (8, 9))
    assert same(again, sent)
    assert not np.allclose(other.fixed["q/left"], sent.fixed["q/left"])
    assert not np.allclose(sent.fixed["q/left"][:13, :4], sent.fixed["v/left"])
    assert not np.allclose(np.abs(sent.fixed["v/left"]), np.abs(sent.fixed["v/right"].T[:13]))


def test_ravans_directions_are_drawn_from_the_seed_and_the_layers_place():
    sent = Ravan(seed=8, heads=3).send(wide(zero=True), 6).adapter
    rng = np.random.default_rng([8, 1])
    want_left, _ = np.linalg.qr(rng.normal(size=(13, 4)))
    want_right, _ = np.linalg.qr(rng.normal(size=(19, 4)))
    np.testing.assert_array_equal(sent.fixed["v/left"], want_left)
    np.testing.assert_array_equal(sent.fixed["v/right"], want_right.T)


def test_heads_of_more_directions_than_a_side_has_are_orthonormal_each_by_itself():
    first = Adapter({"w": LowRank(np.ones((6, 11)), np.zeros((4, 6)), 1.0)})
    state = ServerState(Task(first.spec), first)
    fixed = Ravan(seed=1, heads=3).send(state, 6).adapter.fixed
    for i in range(3):
        mine = fixed["w/left"][:, 2 * i : 2 * i + 2]
        np.testing.assert_allclose(mine.T @ mine, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(fixed["w/right"] @ fixed["w/right"].T, np.eye(6), atol=1e-12)
    assert np.linalg.matrix_rank(fixed["w/left"]) == 4
    one = Ravan(seed=1, heads=1).send(state, 6).adapter.fixed["w/left"]
    assert one.shape == (4, 6)
    np.testing.assert_allclose(one.T @ one, np.diag([1, 1, 1, 1, 0, 0]), atol=1e-12)
    exact = Adapter({"w": LowRank(np.ones((4, 11)), np.zeros((4, 4)), 1.0)})
    square = Ravan(seed=1, heads=2).send(ServerState(Task(exact.spec), exact), 4).adapter.fixed["w/left"]
    np.testing.assert_allclose(square.T @ square, np.eye(4), atol=1e-12)  # as many as the side has: all of them


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 12])
def test_a_layer_has_as_many_heads_as_divide_its_rank(heads):
    rule = Ravan(seed=0, heads=heads)
    shapes = dict(rule.layout(wide().task).shapes)
    for name, (count, width) in (
        ("q", {1: (1, 6), 2: (2, 3), 3: (3, 2), 4: (2, 3), 12: (6, 1)}[heads]),
        ("v", {1: (1, 4), 2: (2, 2), 3: (1, 4), 4: (4, 1), 12: (4, 1)}[heads]),
    ):
        assert shapes[f"{name}/core"] == (count, width, width)
        assert shapes[f"{name}/lacks"] == (count,)
        assert rule.send(wide(), 6).adapter.fixed[f"{name}/at"].shape == (count, width)
    assert shapes["head"] == (3, 5)
    assert list(shapes) == ["q/core", "v/core", "q/lacks", "v/lacks", "head"]


def test_ravan_has_four_heads_and_at_least_one():
    assert Ravan(seed=0).heads == 4
    assert Ravan(seed=0, heads=1).heads == 1
    with pytest.raises(ValueError, match=r"^heads: got 0; want at least 1"):
        Ravan(seed=0, heads=0)


def trained_heads(round, rank, count, width):
    """A client's heads: as many as its rank allows, the next ones in the next round."""
    mine = min(count, max(1, rank // width))
    return sorted((round * mine + i) % count for i in range(mine))


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("ranks", [(6, 6, 6), (2, 5, 1, 6), (2, 3), (1, 1, 1)], ids=str)
def test_ravan_averages_each_head_over_those_who_trained_it(ranks, zero):
    rule, state, rng = Ravan(seed=4, heads=3), wide(zero=zero), np.random.default_rng(3)
    held = rule.send(state, 6).adapter.fixed
    for round in range(4):
        assert rule.trains(state.task) == "heads"
        clients, sums, weight = {}, {}, {}
        for i, rank in enumerate(ranks):
            sent = rule.send(state, rank)
            trained = {}
            for name, _, _, r, _ in WIDE:
                count, width = (3, 2) if name == "q" else (1, 4)
                mine = trained_heads(round, rank, count, width)
                at = [list(range(j * width, (j + 1) * width)) for j in mine]
                np.testing.assert_array_equal(sent.adapter.fixed[f"{name}/at"], at)
                pair, columns = sent.adapter.layers[name], []
                np.testing.assert_array_equal(pair.a, held[f"{name}/right"][np.ravel(at)])
                for j in mine:
                    core = rng.normal(size=(width, width))
                    columns.append(held[f"{name}/left"][:, j * width : (j + 1) * width] @ core)
                    sums[name, j] = sums.get((name, j), 0) + (i + 1) * core
                    weight[name, j] = weight.get((name, j), 0) + i + 1
                trained[name] = replace(pair, b=pair.b + np.hstack(columns))
                assert r == count * width
            clients[i] = (Update(sent.adapter, replace(sent.adapter, layers=trained)), float(i + 1))
        want = {n: product(x) for n, x in state.adapter.layers.items()}
        for (name, j), total in sums.items():
            width, scale = (2, 2.0) if name == "q" else (4, 0.5)
            some = slice(j * width, (j + 1) * width)
            left, right = held[f"{name}/left"][:, some], held[f"{name}/right"][some]
            want[name] = want[name] + scale * left @ (total / weight[name, j]) @ right
        state = play(rule, state, clients, EXACT, dict(enumerate(ranks))).state
        for name, *_ in WIDE:
            np.testing.assert_allclose(model(state)[name], want[name], atol=1e-11)
        assert state.task.round == round + 1
        assert state.tail == {}


@pytest.mark.parametrize(("held", "factor"), [(0.0, 0.0), (2**-30, 0.0), (2**-29, 2.0**29), (0.25, 4.0), (1.0, 1.0)])
def test_a_head_that_nobody_trained_stays_whatever_rounding_is_in_its_sum(held, factor):
    rule, state = Ravan(seed=4, heads=3), wide(zero=True)
    mean = {n: np.zeros(shape) for n, shape in rule.layout(state.task).shapes}
    core = np.array([[1.0, -2.0], [0.5, 3.0]])
    mean["q/core"][1], mean["q/lacks"][1] = core, 1 - held
    after = rule.decode(mean, state).adapter
    want = np.zeros((14, 6))
    want[:, 2:4] = factor * after.fixed["q/left"][:, 2:4] @ core
    np.testing.assert_allclose(after.layers["q"].b, want, rtol=1e-12, atol=1e-12)
    assert not after.layers["v"].b.any()


def test_every_head_is_trained_by_somebody_where_all_clients_are_small():
    rule = Ravan(seed=4, heads=3)
    seen = [trained_heads(round, 4, 3, 2) for round in range(3)]
    assert seen == [[0, 1], [0, 2], [1, 2]]
    for round, want in enumerate(seen):
        at = rule.send(wide(round=round), 4).adapter.fixed["q/at"]
        assert sorted({int(x) // 2 for x in at.ravel()}) == want


@pytest.mark.parametrize("rank", [1, 3, 4, 6])
def test_a_client_of_ravan_runs_the_heads_that_it_does_not_train(rank):
    rule, tail = Ravan(seed=4, heads=3), {"v": LowRank(np.ones((1, 19)), np.ones((13, 1)), 3.0)}
    state = replace(after_rounds(rule, wide(zero=True), (6, 6), 2), tail=tail)
    sent = rule.send(state, rank)
    for name, *_ in WIDE:
        got = product(sent.adapter.layers[name]) + (product(sent.tail[name]) if name in sent.tail else 0)
        np.testing.assert_allclose(got, model(state)[name], atol=1e-11)
    assert sent.adapter.layers["q"].rank == {1: 2, 3: 2, 4: 4, 6: 6}[rank]
    assert sent.tail["v"] is tail["v"]  # which has one head, that everybody trains
    assert ("q" in sent.tail) is (rank < 6)
    if rank < 6:
        assert sent.tail["q"].rank == 6 - sent.adapter.layers["q"].rank
    assert set(state.tail) == {"v"}
    joined = rule.send(replace(state, tail={"q": LowRank(np.ones((1, 11)), np.ones((14, 1)), 3.0)}), rank)
    assert joined.tail["q"].rank == 1 + (6 - sent.adapter.layers["q"].rank)


def test_heads_of_zeros_do_not_travel():
    assert Ravan(seed=4, heads=3).send(wide(zero=True), 2).tail == {}


def test_an_adapter_that_is_not_zero_keeps_its_product_on_its_singular_directions():
    state = wide()
    sent = Ravan(seed=4, heads=3).send(state, 6).adapter
    for name, *_ in WIDE:
        np.testing.assert_allclose(product(sent.layers[name]), product(state.adapter.layers[name]), atol=1e-12)
    u, _, _ = np.linalg.svd(product(state.adapter.layers["q"]))
    np.testing.assert_allclose(np.abs(np.sum(u[:, :6] * sent.fixed["q/left"], axis=0)), 1, atol=1e-9)


def test_what_a_client_of_ravan_sends():
    rule, state = Ravan(seed=4, heads=3), wide(zero=True, round=1)
    sent = rule.send(state, 2).adapter
    left, mine = sent.fixed["q/left"], sent.layers["q"]
    moved = replace(mine, b=mine.b + left[:, 2:4] @ np.array([[1.0, 2.0], [3.0, -4.0]]))
    got = rule.encode(Update(sent, replace(sent, layers=dict(sent.layers) | {"q": moved})), state.task)
    want = np.zeros((3, 2, 2))
    want[1] = [[1.0, 2.0], [3.0, -4.0]]
    np.testing.assert_allclose(got["q/core"], want, atol=1e-12)
    np.testing.assert_array_equal(got["q/lacks"], [1, 0, 1])
    np.testing.assert_array_equal(got["v/lacks"], [0])
    assert not got["v/core"].any()


@pytest.mark.parametrize("heads", [2, None])
def test_other_heads_than_the_servers_are_refused(heads):
    state = wide(zero=True)
    received = state.adapter if heads is None else Ravan(seed=4, heads=heads).send(state, 6).adapter
    with pytest.raises(ValueError, match=r"^q: got no heads of 2 directions; want them as the server sends them"):
        Ravan(seed=4, heads=3).encode(Update(received, received), state.task)


def test_ravans_directions_have_the_adapters_dtype_and_its_head_the_mean():
    rule, state = Ravan(seed=0, heads=2), wide(zero=True, dtype=np.float32)
    [(_, clients, after)] = rounds(rule, state, (6, 3), 1)
    assert {x.dtype for n, x in after.adapter.fixed.items() if not n.endswith("/at")} == {np.dtype(np.float32)}
    assert {x.dtype for x in after.adapter.tensors().values()} == {np.dtype(np.float32)}
    want = sum(p * u.trained.dense["head"] for p, u in shares(clients))
    np.testing.assert_allclose(after.adapter.dense["head"], want, atol=PRODUCT)
