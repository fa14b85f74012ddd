"""Buffered aggregation: against the equation, against the synchronous round, and against what can go wrong."""

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update, same
from fedpeft.channel import PlainChannel
from fedpeft.errors import ProtocolError
from fedpeft.rounds import Buffer, Buffered, Metrics, SumRound, contribute
from fedpeft.rules import Averaging, FactorMean, Momentum, ServerState, Task

RULE, CHANNEL = FactorMean(), PlainChannel(exact=True)


def start():
    rng = np.random.default_rng(0)
    return Adapter({"q": LowRank(rng.normal(size=(3, 4)), rng.normal(size=(5, 3)), 2.0)}, {"bias": rng.normal(size=5)})


def first():
    return ServerState(Task(start().spec), start())


def change(client, round):
    """What client ``client`` changes in round ``round``: made up, of both signs, and never the same twice."""
    rng = np.random.default_rng([client, round, 7])
    return {name: rng.normal(size=x.shape) / 5 for name, x in start().tensors().items()}


def weight(client):
    return 1.0 + client % 4


def answer(broadcast, client):
    task = broadcast.task
    update = Update(broadcast.adapter, broadcast.adapter.moved(change(client, task.round)))
    return contribute(RULE, CHANNEL, update, weight(client), Metrics(2.0, 4, 1, 4), task)


def made(buffer=3, concurrency=6, **options):
    names = ("exponent", "max_staleness", "normalised")
    terms = Buffered(buffer, concurrency, **{k: v for k, v in options.items() if k in names})
    rest = {k: v for k, v in options.items() if k not in names}
    return Buffer(first(), RULE, terms, channel=CHANNEL, **rest)


def run(buffer, order, steps):
    """Steps of a buffer whose clients answer in this order; the events as (client, round asked), and the outcomes."""
    waiting = {}
    events, outcomes = [], []
    for client in order:
        while buffer.has_room and (chosen := buffer.choose(range(10), 5)):
            waiting |= {c: buffer.ask(c) for c in chosen}
        if client not in waiting:
            continue
        broadcast = waiting.pop(client)
        buffer.receive(client, answer(broadcast, client), broadcast.task.round, 0)
        events.append((client, broadcast.task.round))
        if buffer.is_full:
            outcomes.append(buffer.step())
            if len(outcomes) == steps:
                break
    return events, outcomes


def arrivals(seed, n=400):
    return [int(x) for x in np.random.default_rng(seed).integers(0, 10, n)]


@pytest.mark.parametrize(("exponent", "normalised"), [(0.5, False), (0.0, False), (1.5, False), (0.5, True)])
@pytest.mark.parametrize("momentum", [False, True])
def test_steps_follow_the_equation(exponent, normalised, momentum):
    optimiser = Momentum(lr=0.5, beta=0.7) if momentum else Averaging(lr=0.5)
    buffer = made(exponent=exponent, normalised=normalised, optimiser=optimiser, max_staleness=50)
    events, outcomes = run(buffer, arrivals(1), steps=8)
    assert len(outcomes) == 8
    assert max(age for x in outcomes for age in x.staleness) >= 2
    # Nguyen et al., algorithm 1, over the list of who arrived: w <- w + lr * sum(s(t - t_i) p_i d_i) / sum(p_i).
    now = {name: x.copy() for name, x in start().tensors().items()}
    velocity = {name: np.zeros_like(x) for name, x in now.items()}
    for t in range(8):
        mine = events[3 * t : 3 * t + 3]
        factors = [(1 + t - r) ** -exponent for _, r in mine]
        counts = [weight(c) * (s if normalised else 1) for (c, _), s in zip(mine, factors, strict=True)]
        for name in now:
            total = sum(s * weight(c) * change(c, r)[name] for (c, r), s in zip(mine, factors, strict=True))
            velocity[name] = (0.7 if momentum else 0) * velocity[name] + total / sum(counts)
            now[name] = now[name] + 0.5 * velocity[name]
        got = outcomes[t].state.adapter.tensors()
        for name in now:  # fp64 throughout: only the order of sums differs
            np.testing.assert_allclose(got[name], now[name], rtol=1e-12, atol=1e-13)
        assert outcomes[t].survivors == tuple(c for c, _ in sorted(mine))
        assert outcomes[t].staleness == tuple(age for _, age in sorted((c, t - r) for c, r in mine))
        assert outcomes[t].metrics == Metrics(6, 12, 3, 12)
        assert outcomes[t].weight == pytest.approx(sum(counts))


def test_a_buffer_of_all_clients_that_are_equally_fast_is_the_synchronous_round():
    everyone = range(7)
    buffer = made(buffer=7, concurrency=7)
    state = first()
    for _ in range(3):
        asked = {c: buffer.ask(c) for c in buffer.choose(everyone, 5)}
        round = SumRound(state, dict.fromkeys(everyone, 99), 1, CHANNEL, rule=RULE)
        assert list(asked) == list(round.outbox()) == list(everyone)
        for c in everyone:
            buffer.receive(c, answer(asked[c], c), state.task.round, 0)
            round.receive(c, answer(round.outbox()[c], c), state.task.round, 0)
        round.close()
        got, want = buffer.step(), round.result()
        state = want.state
        assert same(got.state.adapter, want.state.adapter)  # bit for bit: the factor of new answers is one
        assert (got.metrics, got.weight, got.survivors) == (want.metrics, want.weight, want.survivors)
        assert got.staleness == (0,) * 7


@pytest.mark.parametrize(("exponent", "want"), [(0.5, (1, 0.5**0.5, 0.5)), (0, (1, 1, 1)), (1, (1, 0.5, 0.25))])
def test_an_answer_counts_less_the_older_it_is(exponent, want):
    assert [Buffered(exponent=exponent).factor(x) for x in (0, 1, 3)] == pytest.approx(want)


def test_so_many_are_at_work_and_none_twice_on_one_adapter():
    buffer = made(buffer=2, concurrency=6)
    chosen = buffer.choose(range(10), 5)
    assert len(chosen) == len(set(chosen)) == 6
    asked = {c: buffer.ask(c) for c in chosen}
    assert not buffer.has_room
    assert buffer.choose(range(10), 5) == ()
    done = chosen[0]
    buffer.receive(done, answer(asked[done], done), 0, 0)
    (extra,) = buffer.choose(range(10), 5)
    assert extra not in chosen  # who has answered would compute the same again
    buffer.ask(extra)
    buffer.receive(extra, answer(buffer.rule.send(first(), 9), extra), 0, 0)
    buffer.step()
    assert set(buffer.at_work) == set(chosen) - {done}
    assert {c for _ in range(40) for c in buffer.choose(range(10), 5)} == {done, extra} | set(range(10)) - set(chosen)
    with pytest.raises(ValueError, match="at work already"):
        buffer.ask(chosen[1])


def test_who_is_asked_follows_from_the_seed():
    def draws(seed):
        buffer = made(concurrency=3)
        return [buffer.choose(range(1000), seed) for _ in range(5)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert len(set(draws(1))) == 5


@pytest.mark.parametrize(
    ("break_", "why"),
    [
        (lambda x: x * np.nan, "NaN"),
        (lambda x: x[:-1], "shape"),
        (lambda x: x * 1e6, "norm"),
        (lambda x: -x, "weight"),
        (lambda x: np.r_[x[:-4], [-1, 1, 1, 1]], "impossible counts"),
    ],
)
def test_a_bad_answer_is_refused_and_changes_nothing(break_, why):
    buffer, clean = made(buffer=2, concurrency=3), made(buffer=2, concurrency=3)
    for x, clients in ((buffer, (1, 2, 3)), (clean, (2, 3))):
        asked = {c: x.ask(c) for c in clients}
        for c in clients:
            if c == 1:
                with pytest.raises(ProtocolError, match=why):
                    x.receive(c, break_(answer(asked[c], c)), 0, 0)
            else:
                x.receive(c, answer(asked[c], c), 0, 0)
    got, want = buffer.step(), clean.step()
    assert same(got.state.adapter, want.state.adapter)
    assert [c for c, _ in got.refused] == [1]
    assert why in got.refused[0][1]
    assert want.refused == ()


def test_an_answer_of_another_round_or_pass_or_of_nobody_asked_is_refused():
    buffer = made()
    asked = buffer.ask(1)
    with pytest.raises(ProtocolError, match="want round 0, pass 0"):
        buffer.receive(1, answer(asked, 1), 3, 0)
    with pytest.raises(ProtocolError, match="no longer waited for"):
        buffer.receive(1, answer(asked, 1), 0, 0)  # its one answer was used up
    buffer.ask(2)
    with pytest.raises(ProtocolError, match="want round 0, pass 0"):
        buffer.receive(2, answer(asked, 2), 0, 1)
    with pytest.raises(ProtocolError, match="was not asked"):
        buffer.receive(4, answer(asked, 4), 0, 0)
    assert buffer.answers == 0


def test_answers_that_would_be_too_old_are_no_longer_waited_for_and_counted():
    buffer = made(buffer=1, concurrency=2, max_staleness=2)
    slow = buffer.ask(9)
    refused = []
    for step in range(3):
        buffer.receive(step, answer(buffer.ask(step), step), step, 0)
        refused.append(buffer.step().refused)
    assert refused == [(), (), ((9, "no answer within 2 steps (schedule.max_staleness)"),)]
    with pytest.raises(ProtocolError, match="no longer waited for"):
        buffer.receive(9, answer(slow, 9), 0, 0)
    at_limit = made(buffer=1, concurrency=2, max_staleness=2)
    slow = at_limit.ask(9)
    for step in range(2):
        at_limit.receive(step, answer(at_limit.ask(step), step), step, 0)
        at_limit.step()
    at_limit.receive(9, answer(slow, 9), 0, 0)
    assert at_limit.step().staleness == (2,)


def test_a_step_without_answers_enough_is_left_out_and_the_next_begins_with_none():
    buffer = made(buffer=2, concurrency=3)
    buffer.receive(1, answer(buffer.ask(1), 1), 0, 0)
    buffer.refuse(2, "gone")
    with pytest.raises(ProtocolError, match="too few answers: got 1; want 2"):
        buffer.step()
    assert buffer.take_refused() == ((2, "gone"),)
    assert (buffer.state.task.round, buffer.answers) == (1, 0)
    assert same(buffer.state.adapter, start())
    for c in (1, 4):
        buffer.receive(c, answer(buffer.ask(c), c), 1, 0)
    assert buffer.step().survivors == (1, 4)


class TwoPasses(FactorMean):
    @property
    def passes(self):
        return 2


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (FactorMean(("b", "a")), "other tensors in other rounds"),
        (TwoPasses(), "2 sums a round"),
        (FactorMean(owners=True), "no change"),
    ],
)
def test_a_rule_whose_sums_of_several_rounds_can_not_be_added_is_refused(rule, why):
    with pytest.raises(ValueError, match=why):
        Buffer(first(), rule, Buffered())


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"buffer": 0}, "buffer: got 0; want at least 1"),
        ({"concurrency": 0}, "concurrency"),
        ({"exponent": -0.5}, "exponent: got -0.5; want 0 to 10"),
        ({"max_staleness": -1}, "max_staleness"),
    ],
)
def test_terms_that_can_not_be_are_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        Buffered(**fields)


def test_memory_does_not_grow_with_the_answers():
    buffer = made(buffer=50, concurrency=60)
    size = buffer._sum.total.size
    for c in range(40):
        buffer.receive(c, answer(buffer.ask(c), c), 0, 0)
    assert buffer._sum.total.size == size
    assert not any(isinstance(x, np.ndarray) for x in buffer._answered)


def test_each_client_is_asked_at_its_own_rank_of_the_round():
    asked = []

    def rank(client, round):
        asked.append((client, round))
        return 1 + client

    buffer = made(rank=rank)
    said = {c: buffer.ask(c) for c in (0, 1, 7)}
    assert {c: x.adapter.layers["q"].rank for c, x in said.items()} == {0: 1, 1: 2, 7: 3}
    assert asked == [(0, 0), (1, 0), (7, 0)]
    assert made().ask(0).adapter.layers["q"].rank == 3
