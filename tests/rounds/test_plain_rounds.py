"""A round in the clear as a state machine: who is asked, what is refused, what comes out."""

import random
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, same
from fedpeft.channel import PlainChannel
from fedpeft.errors import ProtocolError
from fedpeft.rounds import ListRound, Metrics, SumRound, contribute
from fedpeft.rules import FactorMean, ListRule, Median, ServerState, Task
from tests.laws.cohorts import FEDIT, TwoPasses, assert_near, cohort, metrics, play, start, weights

STATE = start(round=4)
CLIENTS = {"sum": cohort(FEDIT, STATE, ranks=(3, 1, 2, 3, 3)), "list": cohort(Median(), STATE, ranks=(3, 1, 2, 3, 3))}
RANKS = {10: 3, 11: 1, 12: 2, 13: 3, 14: 3}
RULE = {"sum": FEDIT, "list": Median()}
each_kind = pytest.mark.parametrize("kind", ["sum", "list"])


def machine(kind, quorum=1, **options):
    return (SumRound if kind == "sum" else ListRound)(STATE, RANKS, quorum, rule=RULE[kind], **options)


def term(kind, client):
    update, weight = CLIENTS[kind][client]
    return contribute(RULE[kind], PlainChannel(), update, weight, metrics(client), STATE.task)


def answer(round_, kind, *clients):
    for client in clients:
        round_.receive(client, term(kind, client), 4, 0)


def alone(kind, *clients):
    """The result of a round in which these clients were all that was asked."""
    return play(RULE[kind], STATE, {c: CLIENTS[kind][c] for c in clients})


def assert_untouched(round_, waiting=(10, 11, 12, 13, 14)):
    assert round_.waiting == set(waiting)
    assert round_.answered == ()
    assert round_.state is STATE
    assert not round_.is_over


@each_kind
def test_everybody_receives_the_state_in_the_clients_own_rank(kind):
    outbox = machine(kind).outbox()
    assert list(outbox) == [10, 11, 12, 13, 14]
    assert {c: sent.adapter.layers["q"].rank for c, sent in outbox.items()} == RANKS
    assert all(sent.task is STATE.task for sent in outbox.values())
    assert {c: sent.tail["q"].rank if sent.tail else 0 for c, sent in outbox.items()} == {
        c: 3 - r for c, r in RANKS.items()
    }
    shuffled = SumRound(STATE, {7: 1, 3: 2, 5: 3}, 1, rule=FEDIT)
    assert list(shuffled.outbox()) == [3, 5, 7]


@each_kind
def test_who_has_answered_is_not_asked_again(kind):
    m = machine(kind)
    answer(m, kind, 12, 10)
    assert m.answered == (10, 12)
    assert m.waiting == {11, 13, 14}
    assert list(m.outbox()) == [11, 13, 14]


@each_kind
def test_the_order_of_answers_changes_nothing(kind):
    want = alone(kind, *RANKS)
    for seed in range(5):
        m = machine(kind)
        order = list(RANKS)
        random.Random(seed).shuffle(order)
        answer(m, kind, *order)
        assert m.is_settled
        m.close()
        got = m.result()
        assert_near(weights(got.state.adapter), weights(want.state.adapter), atol=1e-12)
        assert (got.survivors, got.refused, got.metrics, got.weight) == (want.survivors, (), want.metrics, want.weight)
        if kind == "list":
            assert same(got.state.adapter, want.state.adapter)


@each_kind
def test_an_outcome_says_who_is_in_it_and_what_they_measured(kind):
    m = machine(kind)
    answer(m, kind, 13, 11)
    m.close()
    got = m.result()
    assert got.survivors == (11, 13)
    assert got.weight == CLIENTS[kind][11][1] + CLIENTS[kind][13][1]
    assert got.metrics == metrics(11) + metrics(13) == Metrics(12.0, 48.0, 24.0, 24.0)
    assert got.state.task.round == 5


@each_kind
def test_a_round_without_the_drop_outs_is_the_round_of_the_others(kind):
    m = machine(kind, quorum=3)
    answer(m, kind, 13, 10, 14)
    assert not m.is_settled
    m.close()
    assert m.is_over
    got, want = m.result(), alone(kind, 10, 13, 14)
    assert_near(weights(got.state.adapter), weights(want.state.adapter), atol=1e-12)
    assert got.refused == ((11, "no answer before the deadline"), (12, "no answer before the deadline"))
    assert m.waiting == frozenset()
    assert m.outbox() == {}


@each_kind
def test_too_few_answers_give_no_result_and_leave_the_state(kind):
    m = machine(kind, quorum=3)
    answer(m, kind, 10, 11)
    m.close()
    assert m.is_over
    with pytest.raises(ProtocolError, match="too few answers: got 2; want at least 3"):
        m.result()
    assert m.state is STATE
    assert same(STATE.adapter, start().adapter)


@each_kind
def test_exactly_the_quorum_is_enough(kind):
    m = machine(kind, quorum=2)
    answer(m, kind, 10, 11)
    m.close()
    assert m.result().survivors == (10, 11)


@each_kind
@pytest.mark.parametrize("quorum", [0, -1])
def test_a_round_without_a_quorum_is_refused(kind, quorum):
    with pytest.raises(ValueError, match=f"quorum: got {quorum}; want at least 1"):
        machine(kind, quorum=quorum)


@each_kind
def test_a_result_can_be_read_again_and_changes_nothing(kind):
    m = machine(kind)
    answer(m, kind, *RANKS)
    m.close()
    first, second = m.result(), m.result()
    assert same(first.state.adapter, second.state.adapter)
    assert (first.metrics, first.weight, first.survivors) == (second.metrics, second.weight, second.survivors)
    assert m.state is STATE


@each_kind
def test_an_open_round_has_no_result_and_a_closed_one_is_not_closed_again(kind):
    m = machine(kind)
    answer(m, kind, 10, 11)
    with pytest.raises(RuntimeError, match="the round is still open: 3 clients have not answered"):
        m.result()
    m.close()
    with pytest.raises(RuntimeError, match="the round is over: nothing to close"):
        m.close()


@each_kind
def test_a_stranger_is_refused(kind):
    m = machine(kind)
    with pytest.raises(ProtocolError, match="was not asked, or is no longer waited for"):
        m.receive(99, term(kind, 10), 4, 0)
    assert m.refused == [(99, "was not asked, or is no longer waited for")]
    assert_untouched(m)


@each_kind
def test_a_second_answer_is_refused_and_the_first_one_counts(kind):
    m = machine(kind)
    answer(m, kind, *RANKS)
    with pytest.raises(ProtocolError, match="answered twice: the first answer counts"):
        m.receive(12, 3 * term(kind, 12), 4, 0)
    m.close()
    got = m.result()
    assert_near(weights(got.state.adapter), weights(alone(kind, *RANKS).state.adapter), atol=1e-12)
    assert got.survivors == tuple(RANKS)
    assert got.refused == ((12, "answered twice: the first answer counts"),)


@each_kind
@pytest.mark.parametrize(("round_", "pass_"), [(3, 0), (5, 0), (4, 1), (4, -1)])
def test_a_stale_answer_is_refused_and_the_right_one_still_counts(kind, round_, pass_):
    m = machine(kind)
    with pytest.raises(ProtocolError, match=f"the answer is for round {round_}, pass {pass_}; want round 4, pass 0"):
        m.receive(12, term(kind, 12), round_, pass_)
    assert [client for client, _ in m.refused] == [12]
    assert_untouched(m)
    answer(m, kind, *RANKS)
    m.close()
    assert_near(weights(m.result().state.adapter), weights(alone(kind, *RANKS).state.adapter), atol=1e-12)


def spoilt(kind, how):
    good = term(kind, 12)
    size = len(good) - 5
    if how == "short":
        return good[:-1], r"the update has shape .*; want \("
    if how == "long":
        return np.append(good, 0.0), r"the update has shape .*; want \("
    if how == "square":
        return good[:, None], r"the update has shape .*; want \("
    if how == "nan":
        good[3] = np.nan
        return good, "NaN or infinity"
    if how == "inf":
        good[-1] = np.inf
        return good, "NaN or infinity"
    if how == "heavy":
        good[size] = 60.0
        return good, "weight 60; want more than 0 and at most 50"
    good[0] = 1e7
    return good, "norm .* want at most 10000"


@each_kind
@pytest.mark.parametrize("how", ["short", "long", "square", "nan", "inf", "heavy", "far"])
def test_a_bad_answer_is_refused_and_the_round_goes_on_as_without_that_client(kind, how):
    m = machine(kind, quorum=4, largest_weight=50.0)
    bad, message = spoilt(kind, how)
    answer(m, kind, 10)
    with pytest.raises(ProtocolError, match=message):
        m.receive(12, bad, 4, 0)
    assert m.waiting == {11, 13, 14}
    with pytest.raises(ProtocolError, match="no longer waited for"):
        answer(m, kind, 12)
    answer(m, kind, 14, 11, 13)
    assert m.is_settled
    m.close()
    got, want = m.result(), alone(kind, 10, 11, 13, 14)
    assert_near(weights(got.state.adapter), weights(want.state.adapter), atol=1e-12)
    assert got.survivors == (10, 11, 13, 14)
    assert [client for client, _ in got.refused] == [12, 12]


@each_kind
def test_a_client_that_failed_is_not_waited_for(kind):
    m = machine(kind)
    answer(m, kind, 10, 11, 12, 13)
    m.refuse(14, "out of memory")
    assert m.is_settled
    m.refuse(13, "said so twice")  # its answer is already counted
    m.close()
    got = m.result()
    assert got.survivors == (10, 11, 12, 13)
    assert got.refused == ((14, "out of memory"), (13, "said so twice"))


@each_kind
def test_once_enough_have_answered_nobody_else_is_waited_for(kind):
    m = machine(kind, enough=3)
    for i, client in enumerate((14, 10, 12)):
        assert m.is_settled == (i == 3)
        answer(m, kind, client)
    assert m.is_settled
    assert m.waiting == {11, 13}
    m.close()
    got = m.result()
    assert got.survivors == (10, 12, 14)
    assert got.refused == ()  # who was asked on top and not needed did nothing wrong
    with pytest.raises(ProtocolError, match="no longer waited for"):
        answer(m, kind, 11)


@each_kind
def test_answers_beyond_enough_count_until_the_round_is_closed(kind):
    m = machine(kind, enough=2)
    answer(m, kind, 10, 12, 13)
    assert m.is_settled
    m.close()
    assert m.result().survivors == (10, 12, 13)


@each_kind
def test_too_few_for_enough_are_drop_outs_at_the_deadline(kind):
    m = machine(kind, enough=4)
    answer(m, kind, 10, 12)
    assert not m.is_settled
    m.close()
    assert m.result().refused == tuple((c, "no answer before the deadline") for c in (11, 13, 14))


def test_the_rounds_channel_is_used_both_ways():
    channel = PlainChannel(clip=0.5)
    want = play(FEDIT, STATE, CLIENTS["sum"], channel).state.adapter
    moved = {n: x - STATE.adapter.tensors()[n] for n, x in want.tensors().items()}
    assert np.sqrt(sum(np.sum(x**2) for x in moved.values())) <= 0.5 * (1 + 1e-6)
    with pytest.raises(ProtocolError, match=r"channel\.clip"):
        SumRound(STATE, RANKS, 1, channel, rule=FEDIT).receive(10, term("sum", 10), 4, 0)


class Recorder(ListRule):
    """Keeps what it was given, in order."""

    def layout(self, task):
        return Median().layout(task)

    def encode(self, update, task):
        return Median().encode(update, task)

    def decode(self, encodings, state):
        self.seen = encodings
        return state.next(state.adapter)


def test_a_list_rule_gets_encodings_and_weights_in_ascending_order_of_clients():
    rule = Recorder()
    m = ListRound(STATE, RANKS, 1, rule=rule)
    for client in (14, 11, 13):
        m.receive(client, term("list", client), 4, 0)
    m.close()
    m.result()
    assert [weight for _, weight in rule.seen] == [CLIENTS["list"][c][1] for c in (11, 13, 14)]
    for (encoding, _), client in zip(rule.seen, (11, 13, 14), strict=True):
        assert_near(encoding, Median().encode(CLIENTS["list"][client][0], STATE.task), atol=2e-6)


# ---- more than one pass

TWO = TwoPasses()
PAIR = cohort(TWO, STATE, ranks=(3, 1, 2, 3, 3))


def send(m, *clients, pass_):
    for client in clients:
        update, weight = PAIR[client]
        m.receive(client, contribute(TWO, PlainChannel(), update, weight, metrics(client), m.state.task), 4, pass_)


def test_between_passes_the_mean_is_broadcast_and_the_survivors_are_asked_again():
    m = SumRound(STATE, RANKS, 1, rule=TWO)
    assert all(sent.task.shared == {} and sent.task.pass_ == 0 for sent in m.outbox().values())
    send(m, 13, 10, 11, pass_=0)
    m.close()
    assert not m.is_over
    assert m.waiting == {10, 11, 13}
    assert m.answered == ()
    assert m.refused == [(12, "no answer before the deadline"), (14, "no answer before the deadline")]
    outbox = m.outbox()
    assert list(outbox) == [10, 11, 13]
    for client, sent in outbox.items():
        assert (sent.task.round, sent.task.pass_) == (4, 1)
        assert set(sent.task.shared) == {"q/q", "v/q"}
        assert sent.adapter.layers["q"].rank == RANKS[client]
    total = sum(PAIR[c][1] for c in (10, 11, 13))
    y = sum(PAIR[c][1] * TWO.encode(PAIR[c][0], STATE.task)["q/y"] for c in (10, 11, 13)) / total
    got, want = m.state.task.shared["q/q"], np.linalg.qr(y)[0]
    assert got.shape == want.shape == (7, 6)
    np.testing.assert_allclose(
        got[:, :5], want[:, :5], atol=1e-4
    )  # y is fp32 and of rank 5: its sixth direction is chance
    assert STATE.task.pass_ == 0


def test_a_client_lost_between_passes_is_not_in_the_last_sum():
    m = SumRound(STATE, RANKS, 2, rule=TWO)
    send(m, 10, 11, 12, 13, 14, pass_=0)
    m.close()
    shared = m.state.task.shared
    with pytest.raises(ProtocolError, match="for round 4, pass 0; want round 4, pass 1"):
        send(m, 12, pass_=0)
    send(m, 14, 10, 12, pass_=1)
    m.refuse(11, "was restarted")
    m.close()
    assert m.is_over
    got = m.result()
    assert got.survivors == (10, 12, 14)
    assert [c for c, _ in got.refused] == [12, 11, 13]
    assert got.metrics == metrics(10) + metrics(12) + metrics(14)
    assert got.weight == sum(PAIR[c][1] for c in (10, 12, 14))
    task = replace(STATE.task, pass_=1, shared=shared)
    total = sum(PAIR[c][1] for c in (10, 12, 14))
    each = [(PAIR[c][1] / total, TWO.encode(PAIR[c][0], task)) for c in (10, 12, 14)]
    mean = {n: sum(p * x[n] for p, x in each) for n in each[0][1]}
    want = TWO.decode(mean, replace(STATE, task=task))
    assert_near(weights(got.state.adapter), weights(want.adapter), atol=1e-5)
    assert (got.state.task.round, got.state.task.pass_, got.state.task.shared) == (5, 0, {})


@pytest.mark.parametrize("lost_in", [0, 1])
def test_too_few_answers_in_any_pass_end_the_round(lost_in):
    m = SumRound(STATE, RANKS, 3, rule=TWO)
    for pass_ in range(lost_in):
        send(m, 10, 11, 12, pass_=pass_)
        m.close()
        assert not m.is_over
    send(m, 11, 12, pass_=lost_in)
    m.close()
    assert m.is_over
    with pytest.raises(ProtocolError, match="too few answers: got 2; want at least 3"):
        m.result()


class ThreePasses(FactorMean):
    """FedIT after two passes that only broadcast what they heard."""

    @property
    def passes(self):
        return 3

    def between(self, mean, state):
        return {f"heard/{state.task.pass_}": mean["q/a"]}


def test_what_was_broadcast_stays_known_through_all_later_passes():
    rule, m = ThreePasses(), None
    m = SumRound(STATE, RANKS, 1, rule=rule)
    seen = []
    while not m.is_over:
        seen.append(sorted(m.outbox()[10].task.shared))
        answer_all = {c: CLIENTS["sum"][c] for c in RANKS}
        for client, (update, weight) in answer_all.items():
            sent = contribute(rule, PlainChannel(), update, weight, metrics(client), m.state.task)
            m.receive(client, sent, 4, len(seen) - 1)
        m.close()
    assert seen == [[], ["heard/0"], ["heard/0", "heard/1"]]
    want = alone("sum", *RANKS)
    assert_near(weights(m.result().state.adapter), weights(want.state.adapter), atol=1e-12)


def test_memory_does_not_grow_with_the_cohort():
    first = Adapter({"w": LowRank(np.zeros((16, 1000)), np.zeros((600, 16)), 1.0)})
    state = ServerState(Task(first.spec), first)
    size = FEDIT.layout(state.task).size + 5

    def peak_in_terms(clients):
        m = SumRound(state, dict.fromkeys(range(clients), 16), 1, rule=FEDIT)
        tracemalloc.start()
        for client in range(clients):
            sent = np.ones(size, np.float32)
            m.receive(client, sent, 0, 0)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top / (8 * size)

    few, many = peak_in_terms(4), peak_in_terms(400)
    assert few < 2.6  # while a term is checked: itself (½, twice at most) and its fp64 copies for the norm
    assert many == pytest.approx(few, abs=0.3)  # 396 more terms would be 198
