"""The error of a round, from sketches that clients send: against dense matrices, and for each rule what it promises."""

from dataclasses import replace
from math import isqrt

import numpy as np
import pytest

from fedpeft.adapters import Adapter, Layout, LowRank, Spec, Update
from fedpeft.channel import PlainChannel, Running
from fedpeft.errors import ProtocolError
from fedpeft.rounds import Buffer, Buffered, Exactness, ListRound, Metrics, SumRound, answer_size, contribute
from fedpeft.rounds.exactness import compared, of_client, of_server, sketch, sketched
from fedpeft.rules import (
    Averaging,
    FactorMean,
    FedEx,
    FedSVD,
    FlexLoRA,
    FLoRA,
    MeanRule,
    Median,
    ServerState,
    Subspace,
    Task,
    ZeroPad,
)
from tests.laws.cohorts import FEDIT, FEDSA, FFA, ROLORA, RULES, cohort, start

EXACT = PlainChannel(exact=True)
WIRE = 1e-6
"""What exact rules stay below: answers travel in fp32 (6e-8, relative), and here nothing is small beside the rest."""
ONE = LowRank(np.ones((1, 5)), np.ones((4, 1)), 1.0)


def machine(rule, state, clients, channel=EXACT, **options):
    kind = SumRound if isinstance(rule, MeanRule) else ListRound
    return kind(state, dict.fromkeys(clients, 1 << 30), 1, channel, rule=rule, exactness=True, **options)


def played(rule, state, clients, channel=EXACT, **options):
    round_ = machine(rule, state, clients, channel, **options)
    while not round_.is_over:
        outbox = round_.outbox()
        for client, (update, weight) in clients.items():
            task = outbox[client].task
            sent = contribute(rule, channel, update, weight, Metrics(units=1.0), task, True)
            assert sent.shape == (answer_size(rule, task, True),)
            round_.receive(client, sent, task.round, task.pass_)
        round_.close()
    return round_.result()


def product(x):
    return x.scale * np.array(x.b) @ np.array(x.a)


def dense(before, after, clients):
    """Of each layer the server's change less the mean of the clients', and that mean: d × k matrices."""
    total = sum(w for _, w in clients.values())
    out = {}
    for name in before.adapter.layers:
        mean = sum(
            w / total * (product(u.trained.layers[name]) - product(u.received.layers[name]))
            for u, w in clients.values()
        )
        models = [
            product(s.adapter.layers[name]) + (product(s.tail[name]) if name in s.tail else 0) for s in (after, before)
        ]
        out[name] = models[0] - models[1] - mean, mean
    return out


def wide(layers=30, d=200, k=150, rank=8):
    """A model large enough for sketches of 16 × 16, and clients that are strongly unequal."""
    rng = np.random.default_rng(4)
    first = Adapter(
        {f"l{i}": LowRank(rng.normal(size=(rank, k)), rng.normal(size=(d, rank)), 2.0) for i in range(layers)},
        {"head": rng.normal(size=3)},
    )
    state = ServerState(Task(first.spec), first)
    return state, cohort(FEDIT, state, ranks=(rank,) * 3, seed=9)


def spread(x, p=16):
    """The bound in the docstring: the relative deviation of a sketch's squared norm."""
    s = np.linalg.svd(x, compute_uv=False) ** 2
    q = np.sum(s**2) / np.sum(s) ** 2
    return np.sqrt(4 * q / p + 2 * (1 + q) / p**2)


def test_the_estimate_is_within_its_stated_spread_of_the_dense_error():
    state, clients = wide()
    got = played(FEDIT, state, clients)
    found = dense(state, got.state, clients)
    assert sketched(FEDIT, state.task).shapes == tuple((f"l{i}", (16, 16)) for i in range(30))
    assert list(got.exactness.layers) == list(found)
    off = []
    for name, (error, mean) in found.items():
        ratio = np.sum(error**2) / np.sum(mean**2)
        off.append(got.exactness.layers[name] ** 2 / ratio - 1)
        # A ratio of two estimates: their deviations add up at worst; 4 of them, for the 30 layers.
        assert abs(off[-1]) < 4 * (spread(error) + spread(mean))
        assert spread(error) + spread(mean) < 0.6
    # The sketches are unbiased and independent: the mean over 30 layers is √30 times as sure.
    assert abs(np.mean(off)) < 4 * 0.6 / np.sqrt(30)
    whole = np.sqrt(sum(np.sum(e**2) for e, _ in found.values()) / sum(np.sum(m**2) for _, m in found.values()))
    assert whole > 0.3
    assert got.exactness.overall == pytest.approx(whole, rel=0.1)


def test_squared_norms_are_right_on_average_and_spread_as_stated():
    rng = np.random.default_rng(0)
    for rank in (1, 4):
        x = LowRank(rng.normal(size=(rank, 60)), rng.normal(size=(80, rank)), 0.5)
        layout = Layout(tuple((f"l{i}", (16, 16)) for i in range(400)))
        got = sketch([(3.0, {n: x for n, _ in layout.shapes})], layout)
        off = np.array([np.sum(y**2) for y in got.values()]) / (9 * np.sum(product(x) ** 2)) - 1
        assert abs(off.mean()) < 4 * spread(product(x)) / np.sqrt(400)
        # Of 400, an estimate of a deviation is good to a fifth for tails as long as these.
        assert 0.7 * spread(product(x)) < off.std() < 1.2 * spread(product(x))


def test_a_sketch_is_linear_and_never_of_what_a_term_lacks():
    rng = np.random.default_rng(1)
    x, y = (LowRank(rng.normal(size=(r, 5)), rng.normal(size=(4, r)), s) for r, s in ((2, 3.0), (1, 0.5)))
    layout = Layout((("q", (3, 3)),))
    both = sketch([(2.0, {"q": x}), (-1.5, {"q": y, "other": ONE}), (1.0, {})], layout)
    assert list(both) == ["q"]
    joined = LowRank(np.vstack([x.a, y.a]), np.hstack([6.0 * x.b, -0.75 * y.b]), 1.0)
    np.testing.assert_allclose(both["q"], sketch([(1.0, {"q": joined})], layout)["q"], rtol=1e-12)
    assert not sketch([], layout)["q"].any()
    assert not sketch([(7.0, {"q": x}), (-7.0, {"q": x})], layout)["q"].any()  # nothing changed: exactly zero


def test_signs_follow_from_the_layers_name_and_size_alone():
    x = LowRank(np.array([[1.0, 2, 4, 8, 16]]), np.array([[1.0], [2], [4], [8]]), 1.0)
    layout = Layout((("q", (2, 2)), ("v", (2, 2))))
    got = sketch([(1.0, {"q": x, "v": x})], layout)
    # Client and server each draw them, on machines with other versions of numpy: these numbers may never change.
    np.testing.assert_allclose(got["q"] * 2, [[-5, 7], [-25, 35]], rtol=1e-12)
    np.testing.assert_allclose(got["v"] * 2, [[1, 29], [-5, -145]], rtol=1e-12)


EXACT_RULES = {
    "ffa": FFA,
    "rolora": ROLORA,
    "fedsvd": FedSVD(),
    "fedex": FedEx(),
    "flora": FLoRA(seed=1),
}


@pytest.mark.parametrize("round_", [0, 1])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 2, 3)])
@pytest.mark.parametrize("rule", EXACT_RULES.values(), ids=EXACT_RULES)
def test_exact_rules_have_no_error_but_rounding(rule, ranks, round_):
    state = start(round=round_)
    clients = cohort(rule, state, ranks=ranks)
    assert played(rule, state, clients, PlainChannel()).exactness.overall < WIRE
    got = played(rule, state, clients)
    assert got.exactness.overall < 1e-12
    assert set(got.exactness.layers) == {"q", "v"}
    assert max(got.exactness.layers.values()) < 1e-12


def test_what_is_cut_to_the_servers_rank_has_no_error_up_to_that_rank():
    first = start()
    empty = replace(first.adapter, layers={n: replace(x, b=0 * x.b) for n, x in first.adapter.layers.items()})
    state = replace(first, adapter=empty)
    for rule in (FlexLoRA(), Subspace(seed=3)):
        few, many = (cohort(rule, state, ranks=ranks) for ranks in ((1, 1), (3, 3, 3)))
        assert played(rule, state, few).exactness.overall < 1e-9  # two directions fit into ranks 3 and 2
        assert played(rule, state, many).exactness.overall > 0.1  # nine don't


@pytest.mark.parametrize("rule", [FEDIT, ZeroPad(), Median()], ids=["fedit", "zeropad", "median"])
def test_rules_that_are_not_the_mean_have_an_error(rule):
    state = start()
    clients = cohort(rule, state, ranks=(1, 2, 3))
    got = played(rule, state, clients)
    assert got.exactness.overall > 0.1
    assert min(got.exactness.layers.values()) > 0.01


MEASURED = {n: x for n, x in RULES.items() if not x.personal(start().task.spec) and x.pool is None}


def test_a_rule_that_sends_less_than_a_sketch_is_not_measured():
    """Moves are of all layers together: there is no layer of which a tenth could be sketched."""
    rule, state = RULES["fedkseed"], start()
    assert sketched(rule, state.task).shapes == ()
    assert played(rule, state, cohort(rule, state)).exactness is None


@pytest.mark.parametrize("rule", MEASURED.values(), ids=MEASURED)
def test_one_client_alone_is_met_exactly(rule):
    state = start()
    # The one-pass sketch is solved by a pseudoinverse, which amplifies the rounding of fp64.
    assert played(rule, state, cohort(rule, state, ranks=(3,))).exactness.overall < 1e-8


@pytest.mark.parametrize(
    ("rule", "exact"),
    [(FEDIT, True), (FactorMean(rest="dropped"), True), (FlexLoRA("full"), False), (ZeroPad(), False)],
)
def test_directions_that_a_lone_client_lacks_are_an_error_only_where_the_server_takes_them_away(rule, exact):
    state = start()
    error = played(rule, state, cohort(rule, state, ranks=(1,))).exactness.overall
    assert error < 1e-12 if exact else error > 0.1


def test_sums_of_sketches_in_any_grouping_give_the_same_errors():
    state = start()
    clients = cohort(FEDIT, state, ranks=(3, 1, 2, 3, 3))
    want = played(FEDIT, state, clients)
    layout, size = sketched(FEDIT, state.task), FEDIT.layout(state.task).size
    terms = [
        EXACT.weigh(contribute(FEDIT, EXACT, u, w, Metrics(units=1.0), state.task, True), size)
        for u, w in clients.values()
    ]
    for cut in range(6):
        left, right = Running(len(terms[0])), Running(len(terms[0]))
        for i, x in enumerate(reversed(terms)):
            (left if i < cut else right).add(x)
        left.merge(right)
        mean, weight, rest = EXACT.down(left.total, size)
        after = FEDIT.decode(FEDIT.layout(state.task).unflatten(mean), state)
        got = compared(rest[4:], weight, layout, state, after)
        assert got.overall == pytest.approx(want.exactness.overall, rel=1e-12)
        assert got.layers == pytest.approx(want.exactness.layers, rel=1e-12)


def test_errors_are_relative_to_the_mean_change_by_layer_and_over_all():
    mean = {
        "q": np.array([[3.0, 0.0], [0.0, 4.0]]),
        "v": np.array([[0.0, 12.0], [0.0, 0.0]]),
        "still": np.zeros((2, 2)),
    }
    change = {"q": mean["q"] + [[0, 1.0], [0, 0]], "v": 0.5 * mean["v"], "still": np.array([[0, 0], [8.0, 0]])}
    got = Exactness.of(change, mean)
    assert got.layers == {"q": 0.2, "v": 0.5}  # 1/5 and 6/12; for a layer that no client changes there is none
    assert got.overall == pytest.approx(np.sqrt((1 + 36 + 64) / (25 + 144)))
    assert Exactness.of({"q": change["q"]}, {"q": 0 * mean["q"]}) is None
    assert Exactness.of({}, {}) is None


def test_where_nobody_changes_anything_or_nothing_is_measured_there_is_no_number():
    state = start()
    still = {i: (Update(x, x), 1.0) for i in (1, 2) for x in [FEDIT.send(state, 3).adapter]}
    assert played(FEDIT, state, still).exactness is None
    clients = cohort(FEDIT, state)
    off = SumRound(state, dict.fromkeys(clients, 3), 1, EXACT, rule=FEDIT)
    for client, (update, weight) in clients.items():
        off.receive(client, contribute(FEDIT, EXACT, update, weight, Metrics(units=1.0), state.task), 0, 0)
    off.close()
    assert off.result().exactness is None
    assert answer_size(FEDIT, state.task, False) == FEDIT.layout(state.task).size + 5
    only = ServerState(Task(Spec((), (("head", (3,)),))), Adapter({}, {"head": np.ones(3)}))
    assert sketched(FEDIT, only.task).size == 0
    assert played(FEDIT, only, cohort(FEDIT, only)).exactness is None


def test_a_layer_of_which_a_factor_stays_on_the_client_is_left_out():
    state = start()
    assert sketched(FEDSA, state.task) == Layout(())
    assert played(FEDSA, state, cohort(FEDSA, state)).exactness is None

    class OneAtHome(FactorMean):
        def personal(self, spec):
            return frozenset({"q/b", "head"})

    assert [n for n, _ in sketched(OneAtHome(), state.task).shapes] == ["v"]


def test_sketches_are_in_the_last_pass_alone():
    rule, state = Subspace(seed=3), start()
    assert sketched(rule, state.task).size == 0
    assert [n for n, _ in sketched(rule, replace(state.task, pass_=1)).shapes] == ["q", "v"]
    assert [n for n, _ in sketched(Subspace(seed=3, one_pass=True), state.task).shapes] == ["q", "v"]


@pytest.mark.parametrize(("d", "k", "rank"), [(768, 768, 8), (768, 768, 1), (64, 48, 4), (30, 20, 2), (7, 5, 1)])
@pytest.mark.parametrize("rule", [FEDIT, FFA], ids=["fedit", "ffa"])
def test_a_sketch_is_a_tenth_of_what_its_layer_sends_at_most(rule, d, k, rank):
    adapter = Adapter({"x/y": LowRank(np.ones((rank, k)), np.ones((d, rank)), 1.0)}, {"head": np.ones(10_000)})
    task = Task(adapter.spec)
    sent = rank * (d + k) if rule is FEDIT else rank * d
    ((_, (p, other)),) = sketched(rule, task).shapes
    assert p == other == min(16, max(2, isqrt(sent // 10)))
    assert p * p <= sent / 10 or p == 2
    if (d, rank) == (768, 8):
        assert p * p / sent == pytest.approx(0.021 if rule is FEDIT else 0.042, abs=5e-4)


def test_dense_leaves_and_what_a_method_does_with_the_product_change_nothing():
    """DoRA's lengths are dense leaves: what is measured is the product of its factors."""
    state = start()
    clients = cohort(FEDIT, state)
    still = {c: (replace(u, trained=replace(u.trained, dense=u.received.dense)), w) for c, (u, w) in clients.items()}
    got, want = played(FEDIT, state, still).exactness, played(FEDIT, state, clients).exactness
    assert got == want


def test_a_clients_own_scale_counts():
    state = start()
    rule = FLoRA(seed=1)
    clients = {}
    for i, (client, (u, w)) in enumerate(cohort(rule, state).items()):
        sides = [
            replace(x, layers={n: LowRank(y.a, y.b / (2 + i), y.scale * (2 + i)) for n, y in x.layers.items()})
            for x in (u.received, u.trained)
        ]
        clients[client] = Update(*sides), w
    assert played(rule, state, clients).exactness.overall < 1e-12


def test_what_the_server_does_beyond_the_mean_is_an_error():
    state = start()
    clients = cohort(FFA, state)
    for lr in (0.75, 1.5):
        error = played(FFA, state, clients, optimiser=Averaging(lr)).exactness
        assert error.overall == pytest.approx(abs(lr - 1), rel=1e-9)
        assert error.layers == pytest.approx({"q": abs(lr - 1), "v": abs(lr - 1)}, rel=1e-9)


def answers(state, clients):
    return {c: contribute(FEDIT, EXACT, u, w, Metrics(units=1.0), state.task, True) for c, (u, w) in clients.items()}


@pytest.mark.parametrize("kind", ["nan", "inf", "left out", "twice"])
def test_a_sketch_that_is_no_sketch_is_refused_and_the_round_goes_on(kind):
    state = start()
    clients = cohort(FEDIT, state)
    round_, sent = machine(FEDIT, state, clients), answers(state, clients)
    size = sketched(FEDIT, state.task).size
    assert size == 8
    bad = sent[11].copy()
    if kind in ("nan", "inf"):
        bad[-3] = float(kind)
    bad = bad[:-size] if kind == "left out" else np.append(bad, bad[-size:]) if kind == "twice" else bad
    with pytest.raises(ProtocolError, match="NaN or infinity" if kind in ("nan", "inf") else r"shape .*; want \("):
        round_.receive(11, bad, 0, 0)
    for client in (10, 12):
        round_.receive(client, sent[client], 0, 0)
    round_.close()
    want = played(FEDIT, state, {c: clients[c] for c in (10, 12)}).exactness
    assert round_.result().exactness.overall == pytest.approx(want.overall, rel=1e-12)


def test_a_wrong_sketch_spoils_this_number_and_nothing_else():
    state = start()
    clients = cohort(FEDIT, state)
    round_, sent = machine(FEDIT, state, clients), answers(state, clients)
    sent[11][-8:] = 1e30
    for client, x in sent.items():
        round_.receive(client, x, 0, 0)
    round_.close()
    got, want = round_.result(), played(FEDIT, state, clients)
    for name, x in want.state.adapter.tensors().items():
        np.testing.assert_array_equal(got.state.adapter.tensors()[name], x)
    assert got.metrics == want.metrics
    assert got.exactness.overall == pytest.approx(1.0, abs=1e-6)  # beside this the server has not moved at all


@pytest.mark.parametrize("normalised", [False, True])
def test_answers_of_several_rounds_count_in_a_buffers_error_as_they_do_in_its_step(normalised):
    state = start()
    buffer = Buffer(state, FEDIT, Buffered(2, 3, 0.5, 9, normalised), Averaging(), EXACT, exactness=True)
    old = {c: buffer.ask(c) for c in (10, 11, 12)}
    made = cohort(FEDIT, state, ranks=(3, 3, 3))
    for c in (10, 11):
        update, weight = made[c]
        buffer.receive(c, contribute(FEDIT, EXACT, update, weight, Metrics(), old[c].task, True), 0, 0)
    before = buffer.step().state
    new = buffer.ask(10)
    fresh = cohort(FEDIT, before, ranks=(3,), seed=8)[10]
    for c, (update, weight), task in ((10, fresh, new.task), (12, made[12], old[12].task)):
        buffer.receive(c, contribute(FEDIT, EXACT, update, weight, Metrics(), task, True), task.round, 0)
    got = buffer.step()
    assert got.staleness == (0, 1)
    layout, factor = sketched(FEDIT, state.task), 2**-0.5
    total = of_client(*fresh, layout) + factor * of_client(*made[12], layout)
    weight = fresh[1] + (factor if normalised else 1) * made[12][1]
    want = Exactness.of(of_server(before, got.state, layout), layout.unflatten(total / weight))
    assert got.exactness.overall == pytest.approx(want.overall, rel=1e-12)
    assert 0.01 < got.exactness.overall < 2


def test_a_buffer_of_an_exact_rule_has_no_error_however_old_its_answers():
    state = start()
    buffer = Buffer(state, FFA, Buffered(1, 3, 1.0, 9, False), Averaging(), EXACT, exactness=True)
    sent = {c: buffer.ask(c) for c in (10, 11)}
    made = cohort(FFA, state, ranks=(3, 3))
    for staleness, c in enumerate((10, 11)):
        update, weight = made[c]
        buffer.receive(c, contribute(FFA, EXACT, update, weight, Metrics(), sent[c].task, True), 0, 0)
        got = buffer.step()
        assert got.staleness == (staleness,)
        assert got.exactness.overall < 1e-12
