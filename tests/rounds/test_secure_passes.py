"""A secure round over several passes, what its clients send, and what it holds meanwhile."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from fedpeft.channel import PlainChannel, RingChannel
from fedpeft.errors import ProtocolError
from fedpeft.rounds import SumRound, contribute, contribute_ring, grids, shared_digest
from fedpeft.rules import FactorMean, Momentum, Subspace, Task
from fedpeft.secagg.protocol import Phase
from tests.laws.cohorts import FEDIT, cohort, metrics, start
from tests.laws.secure import LARGEST, Heard, drive, id_of, message
from tests.laws.secure import machine as over_mock
from tests.rounds.scripted import CHANNEL, CLIENTS, PAIR, RANKS, STATE, TWO, all_good, scripted


def machine(rule=FEDIT, channel=CHANNEL, **options):
    return over_mock(rule, STATE, RANKS, channel, **options)


def answer(m, *clients):
    outbox = m.outbox()
    for client in clients:
        m.receive(client, message(m, client, outbox[client], *PAIR[client])[0])


def test_between_passes_the_mean_is_broadcast_and_the_session_is_told_its_digest():
    heard = Heard(TWO)
    m = scripted(heard, PAIR)
    heard.means.clear()
    for _ in range(2):
        all_good(m)
        m.close()
    assert not m.is_over
    assert (m.state.task.round, m.state.task.pass_, set(m.state.task.shared)) == (4, 1, {"q/q", "v/q"})
    assert len(heard.means) == 1
    want = np.linalg.qr(heard.means[0]["q/y"])[0]
    np.testing.assert_array_equal(m.state.task.shared["q/q"], want)
    assert m.session.told == [(Phase("keys", 1, "nothing"), shared_digest(m.state.task))]
    all_good(m)
    m.close()
    for client, (_, sent) in m.outbox().items():
        assert sent.task is m.state.task
        assert sent.adapter.layers["q"].rank == RANKS[client]
    all_good(m, 10, 13, 14)
    m.close()
    assert len(m.session.told) == 1
    got = m.result()
    assert got.survivors == (10, 13, 14)
    assert (got.state.task.round, got.state.task.pass_, got.state.task.shared) == (5, 0, {})


class ThreePasses(FactorMean):
    """FedIT after two passes that only broadcast what they heard."""

    passes = 3

    def between(self, mean, state):
        return {f"heard/{state.task.pass_}": mean["q/a"]}


def test_what_was_broadcast_stays_known_through_all_later_passes():
    m, seen = machine(ThreePasses()), []
    drive(m, CLIENTS, each=lambda pass_, tasks: seen.append(sorted(tasks[10].shared)))
    assert seen == [[], ["heard/0"], ["heard/0", "heard/1"]]


class Partial(ThreePasses):
    """Tells each rank something else."""

    def send(self, state, rank):
        sent = FactorMean.send(self, state, rank)
        return replace(sent, task=replace(sent.task, shared={"rank": np.array([rank])}))


def test_a_rule_that_tells_ranks_different_things_in_a_later_pass_is_refused():
    with pytest.raises(
        ValueError, match=r"^Partial tells clients of different ranks different things in pass 1: want "
    ):
        drive(machine(Partial()), CLIENTS)


@pytest.mark.parametrize("lost_in", [0, 1])
def test_too_few_answers_in_any_pass_end_the_round(lost_in):
    m = machine(TWO, quorum=4)
    with pytest.raises(ProtocolError, match=r"^too few answers: got 3; want at least 4$"):
        drive(m, PAIR, {10: lost_in, 11: lost_in})
    assert m.state.task.pass_ == lost_in


def test_a_round_whose_clients_are_all_gone_after_a_pass_has_no_result():
    m = machine(TWO)
    answer(m, 10, 11)
    for client in RANKS:
        m.session.drop(id_of(client))
    m.close()
    assert m.waiting == frozenset()
    m.close()
    with pytest.raises(ProtocolError, match="too few answers: got 0"):
        m.result()


# ---- what the round is told and tells


def test_numbers_cut_at_the_range_are_counted_over_all_passes():
    assert machine().saturated == 0
    m = machine(TWO, RingChannel(range=2.0))
    heard = []
    drive(m, PAIR, each=lambda pass_, tasks: heard.append(tasks))
    want = 0
    for tasks in heard:
        for client, task in tasks.items():
            update, weight = PAIR[client]
            want += sum(int(np.sum(np.abs(x * weight / LARGEST) > 2)) for x in TWO.encode(update, task).values())
    assert m.saturated == want > 10


def test_the_server_optimiser_and_the_share_of_clients_are_used():
    seen = []

    class Noting(FactorMean):
        def decode(self, mean, state):
            seen.append(state.share)
            return FactorMean.decode(self, mean, state)

    m = machine(Noting(), optimiser=Momentum(lr=0.5), clients=20)
    got = drive(m, CLIENTS, {11: 0})
    assert seen == [0.2]
    drive(machine(Noting()), CLIENTS, {11: 0})
    assert seen == [0.2, 0.8]
    plain = drive(machine(), CLIENTS, {11: 0}).state.adapter.tensors()
    for n, x in got.state.adapter.tensors().items():
        np.testing.assert_allclose(
            x - STATE.adapter.tensors()[n], (plain[n] - STATE.adapter.tensors()[n]) / 2, atol=1e-12
        )
    assert {n[:2] for n in got.state.moments} == {"v/"}


def test_exactness_is_measured_in_the_ring_as_in_the_clear():
    ranks = {10: 3, 11: 1, 12: 2}
    for rule in (FactorMean(("b",)), FEDIT, Subspace(seed=5)):
        clients = cohort(rule, STATE, ranks=ranks.values())
        m, plain = (
            over_mock(rule, STATE, ranks, RingChannel(range=2.0**10), exactness=True),
            SumRound(STATE, ranks, 1, PlainChannel(exact=True), rule=rule, exactness=True),
        )
        while not plain.is_over:
            for client, sent in plain.outbox().items():
                update, weight = clients[client]
                term = contribute(rule, plain.channel, update, weight, metrics(client), sent.task, True)
                plain.receive(client, term, 4, sent.task.pass_)
            plain.close()
        got, want = drive(m, clients), plain.result()
        assert [x.sketches > 0 for x in m.grid] == [False] * (rule.passes - 1) + [True]
        assert m.saturated == 0
        assert got.exactness.layers.keys() == want.exactness.layers.keys() == {"q", "v"}
        assert got.exactness.overall == pytest.approx(want.exactness.overall, abs=1e-4)  # the grid's step is 4e-6
        assert (want.exactness.overall < 1e-9) == (rule == FactorMean(("b",)))


def test_a_state_that_is_not_finite_is_no_result():
    state = replace(STATE, adapter=STATE.adapter.put({"gate": np.array(6e4, np.float16)}))
    clients = cohort(FEDIT, STATE)
    clients = {c: (replace(u, trained=u.trained.moved({"gate": np.array(3e4)})), w) for c, (u, w) in clients.items()}
    m = over_mock(FEDIT, state, {10: 3, 11: 3, 12: 3}, RingChannel(range=2.0**16))
    with np.errstate(over="ignore"), pytest.raises(ProtocolError, match="makes the adapter NaN or infinite"):
        drive(m, clients)


def test_a_contribution_is_the_encoding_its_weight_and_counts_on_the_grid():
    [grid] = grids(FEDIT, CHANNEL, STATE.task, 3, LARGEST)
    update, weight = CLIENTS[11]
    rng = np.random.default_rng
    got = contribute_ring(FEDIT, grid, update, weight, metrics(11), STATE.task, False, rng(3))
    x = FEDIT.layout(STATE.task).flatten(FEDIT.encode(update, STATE.task))
    np.testing.assert_array_equal(got, grid.up(x, weight, metrics(11).vector(), np.zeros(0), rng(3)))
    update.trained.layers["q"].b[0, 0] = np.nan
    try:
        with pytest.raises(ValueError, match="encoding: got NaN or infinity"):
            contribute_ring(FEDIT, grid, update, weight, metrics(11), STATE.task, False, rng(3))
    finally:
        update.trained.layers["q"].b[0, 0] = 0.0


# ---- digests


def test_the_digest_of_what_is_shared_tells_every_difference_and_no_order():
    task = Task(STATE.task.spec, 4, 1, {"x": np.arange(6.0), "y": np.ones(2)})
    same_ = replace(task, shared={"y": np.ones(2), "x": np.arange(6.0)}, round=9)
    assert shared_digest(task) == shared_digest(same_)
    assert len(shared_digest(task)) == 32
    assert shared_digest(replace(task, shared={})) == b""
    others = [
        {"x": np.arange(6.0)},
        {"x": np.arange(6.0), "z": np.ones(2)},
        {"x": np.arange(6.0).reshape(2, 3), "y": np.ones(2)},
        {"x": np.arange(6.0), "y": np.ones(2, np.float32)},
        {"x": np.arange(6.0) + 1e-12, "y": np.ones(2)},
        {"x": np.arange(6.0).view(np.int64), "y": np.ones(2)},
    ]
    digests = {shared_digest(replace(task, shared=x)) for x in others}
    assert len(digests | {shared_digest(task)}) == 7


# ---- memory


def test_a_round_holds_one_sum_and_one_more_vector_at_most_while_answers_come():
    state = start(layers=(("q", 400, 300, 60, 2.0), ("v", 4, 9, 2, 0.5)))
    ranks = dict.fromkeys(range(10, 18), 60)
    clients = cohort(FEDIT, state, ranks=[60])
    m = over_mock(FEDIT, state, ranks, RingChannel(range=64.0))
    outbox = m.outbox()
    update, weight = clients[10]
    answers = {c: message(m, c, outbox[c], update, weight)[0] for c in ranks}
    size = 4 * m.grid[0].length
    tracemalloc.start()
    for client, text in answers.items():
        m.receive(client, text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.1 * size + 100_000  # the sum was there before: what came was a vector, and chunks of it
    tracemalloc.start()
    m.close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * size + 100_000  # the total, a signed copy, and the mean in fp64
