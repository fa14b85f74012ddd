"""The laws of architecture.md, each one test over every rule."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.adapters import Adapter, LowRank, Update, same
from fedpeft.channel import PlainChannel, Running
from fedpeft.rounds import contribute
from fedpeft.rules import MeanRule, Rule, ServerState
from tests.laws.cohorts import (
    COUNTS,
    FACTOR_RULES,
    FEDIT,
    MEAN_RULES,
    REFACTORED,
    RULES,
    Client,
    TwoPasses,
    assert_near,
    cohort,
    computed,
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

# Rounding of fp64 in sums below 1e3; a pseudoinverse of a Gaussian matrix may amplify it.
ATOL = {rule: 1e-9 if name == "subspace, one pass" else 1e-12 for name, rule in RULES.items()}

each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
each_mean_rule = pytest.mark.parametrize("rule", MEAN_RULES.values(), ids=MEAN_RULES)
each_factor_rule = pytest.mark.parametrize("rule", FACTOR_RULES.values(), ids=FACTOR_RULES)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])
each_round = pytest.mark.parametrize("round", [0, 1])


def in_each_pass(rule: Rule, state: ServerState, clients: dict[int, Client]) -> list[ServerState]:
    """The state as the server holds it in each pass of a round with these clients."""
    states = [state]
    while len(states) < rule.passes:
        assert isinstance(rule, MeanRule)
        state = states[-1]
        shared = rule.between(mean_of(rule, state, clients), state)
        states.append(replace(state, task=replace(state.task, pass_=state.task.pass_ + 1, shared=shared)))
    return states


def mean_of(rule: MeanRule, state: ServerState, clients: dict[int, Client]) -> dict[str, np.ndarray]:
    encodings = [(rule.encode(update, task_of(rule, state)), weight) for update, weight in clients.values()]
    total = sum(weight for _, weight in encodings)
    return {n: sum(w * x[n] for x, w in encodings) / total for n, _ in rule.layout(state.task).shapes}


@each_rule
@each_round
@each_dtype
def test_the_layout_does_not_depend_on_the_client(rule, round, dtype):
    state = start(dtype=dtype, round=round)
    clients = cohort(rule, state, ranks=(1, 2, 3))
    for step in in_each_pass(rule, state, clients):
        layout = rule.layout(step.task)
        for client, (update, weight) in clients.items():
            task = task_of(rule, step)
            assert rule.layout(task) == layout
            encoding = rule.encode(update, task)
            assert {n: x.shape for n, x in encoding.items()} == dict(layout.shapes)
            term = contribute(rule, PlainChannel(), update, weight, metrics(client), task)
            assert term.shape == (layout.size + 1 + 4,)
            assert term.dtype == np.float32


@each_mean_rule
@given(
    order=st.permutations(range(5)),
    merges=st.lists(st.integers(0, 99), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
def test_any_order_and_any_tree_of_sums_gives_the_same_state(rule, order, merges, seed):
    state = start()
    clients = cohort(rule, state, ranks=(3, 1, 2, 3, 3), seed=seed)
    want = play(rule, state, clients).state
    for step in range(rule.passes):
        layout = rule.layout(state.task)
        forest = [Running(layout.size + 5) for _ in order]
        for tree, i in zip(forest, order, strict=True):
            update, weight = clients[10 + i]
            sent = contribute(rule, PlainChannel(), update, weight, metrics(10 + i), task_of(rule, state))
            tree.add(PlainChannel().weigh(sent, rule.layout(state.task).size))
        for choice in merges:
            i = choice % (len(forest) - 1)
            forest[i].merge(forest.pop(i + 1))
        [root] = forest
        assert root.count == 5
        mean, weight, statistics = PlainChannel().down(root.total, layout.size)
        assert weight == sum(w for _, w in clients.values())
        np.testing.assert_array_equal(statistics, sum(metrics(c).vector() for c in clients))
        if step + 1 < rule.passes:
            shared = rule.between(layout.unflatten(mean), state)
            state = replace(state, task=replace(state.task, pass_=step + 1, shared=shared))
    got = rule.decode(layout.unflatten(mean), state)
    assert_near(computed(got), computed(want), atol=ATOL[rule])


@each_rule
@each_round
@each_dtype
def test_no_change_encodes_to_zero_and_leaves_the_state(rule, round, dtype):
    state = start(dtype=dtype, round=round)
    # A client that drops what it can't train has, by some rules, the opinion that it is zero.
    ranks = (3, 3, 3) if drops(rule) else (1, 2, 3)
    clients = {i: (Update(x, x), float(i)) for i, r in enumerate(ranks, 1) for x in [rule.send(state, r).adapter]}
    for step in in_each_pass(rule, state, clients):
        for update, _ in clients.values():
            encoding = rule.encode(update, task_of(rule, step))
            assert not any(x.any() for n, x in encoding.items() if not n.endswith(COUNTS))
    after = play(rule, state, clients).state
    assert after.task.round == round + 1
    assert (after.task.pass_, after.task.shared) == (0, {})
    if is_refactored(rule):
        # In the adapter's precision: products of up to 3 numbers below 10.
        assert_near(computed(after), computed(state), atol=1e-12 if dtype == np.float64 else 1e-5)
    else:
        assert after.tail == state.tail
        assert same(after.adapter, state.adapter)


@each_rule
@each_round
@each_dtype
def test_one_client_gets_its_own_update_back(rule, round, dtype):
    state = start(dtype=dtype, round=round)
    clients = cohort(rule, state, ranks=(3,))
    [(update, _)] = clients.values()
    after = play(rule, state, clients).state
    mine = update.trained.tensors()
    own = after.adapter.put({n: mine[n] for n in rule.personal(state.task.spec)})
    got = computed(replace(after, adapter=own))
    assert_near(got, weights(update.trained), atol=10 * WIRE)  # ΔW: up to 3 products of numbers near 3


@each_rule
@pytest.mark.parametrize("rank", [1, 2])
def test_one_client_of_a_low_rank_gets_its_own_update_back_too(rule, rank):
    """With the rest frozen; a rule that drops the rest has at least this client's directions right."""
    state = start()
    [(update, weight)] = cohort(rule, state, ranks=(rank,)).values()
    after = play(rule, state, {1: (update, weight)}).state
    mine = update.trained.tensors()
    sent = rule.send(after, rank)
    if drops(rule) and not isinstance(rule, TwoPasses):
        own = sent.adapter.put({n: mine[n] for n in rule.personal(state.task.spec)})
        assert_near(weights(own), weights(update.trained), atol=10 * WIRE)
    else:
        want = computed(replace(rule.send(state, rank), adapter=update.trained))
        if isinstance(rule, TwoPasses):
            change = {n: x - weights(update.received)[n] for n, x in weights(update.trained).items()}
            want = {n: x + change[n] for n, x in weights(state.adapter).items()}
        assert_near(computed(after), want, atol=10 * WIRE)


@each_rule
def test_identical_clients_count_as_one(rule):
    state = start()
    [client] = cohort(rule, state, ranks=(3,)).values()
    one = play(rule, state, {1: client}).state
    many = play(rule, state, {i: (client[0], float(1 + 3 * i)) for i in range(1, 7)}).state
    assert_near(computed(many), computed(one), atol=5 * WIRE)


@each_rule
def test_which_client_did_what_changes_nothing(rule):
    state = start()
    clients = cohort(rule, state, ranks=(3, 1, 2, 3))
    shuffled = dict(zip(clients, [clients[i] for i in (12, 10, 13, 11)], strict=True))
    got, want = play(rule, state, shuffled).state, play(rule, state, clients).state
    assert_near(computed(got), computed(want), atol=ATOL[rule])


@each_rule
@each_dtype
def test_constants_never_change_and_all_else_does(rule, dtype):
    first = state = start(dtype=dtype)
    for seed in (1, 2):
        state = play(rule, state, cohort(rule, state, seed=seed)).state
    before, after = first.adapter.tensors(), state.adapter.tensors()
    unchanged = {n for n, x in before.items() if np.array_equal(x, after[n])}
    assert unchanged == rule.constant(first.task.spec)
    assert set(after) == set(before)
    np.testing.assert_array_equal(state.adapter.fixed["projection"], first.adapter.fixed["projection"])


@each_rule
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_an_adapter_keeps_its_dtypes(rule, dtype):
    state = start(dtype=dtype)
    after = play(rule, state, cohort(rule, state)).state.adapter
    layers = () if isinstance(rule, TwoPasses) else [x for p in "ab" for x in after.tensors(p).values()]
    assert all(x.dtype == dtype for x in (*layers, *after.dense.values()))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("rule", [x for n, x in RULES.items() if n != "two passes"], ids=lambda x: repr(x))
def test_what_else_travels_has_the_adapters_dtype(rule, dtype):
    state = start(dtype=dtype)
    after = play(rule, state, cohort(rule, state)).state
    sent = rule.send(after, 1)
    others = [x for layer in (*after.tail.values(), *sent.tail.values()) for x in (layer.a, layer.b)]
    assert all(x.dtype == dtype for x in (*others, *sent.task.shared.values(), *after.memory.values()))
    if isinstance(rule, MeanRule) and rule.passes == 2:
        shared = rule.between(mean_of(rule, state, cohort(rule, state)), state)
        assert all(x.dtype == dtype for x in shared.values())


MOVING_ALL = ("zeropad", "hetlora", "lora_fair")
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
