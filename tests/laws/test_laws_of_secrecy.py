"""The law of transparency: a round that sees only sums in a ring ends as the one in the clear; and who hides ranks."""

import numpy as np
import pytest

from fedpeft.channel import PlainChannel, Scales
from fedpeft.rounds import SumRound, contribute
from tests.laws.cohorts import MEAN_RULES, TwoPasses, assert_near, cohort, computed, metrics, start
from tests.laws.secure import Heard, drive, machine, wide

RANKS = dict(enumerate((3, 1, 2, 3, 2), 10))
each_mean_rule = pytest.mark.parametrize("rule", MEAN_RULES.values(), ids=MEAN_RULES)
# Six directions of a change of rank five: the last is chance, and tells where clients are lost between the passes.
steady = pytest.mark.parametrize("rule", (MEAN_RULES | {"two passes": TwoPasses(5)}).values(), ids=MEAN_RULES)
each_lost = pytest.mark.parametrize("lost", [{}, {11: 0}, {13: 0, 12: 1, 10: 1}], ids=["all", "one lost", "three lost"])


def plain(rule, state, clients, lost, ranks=RANKS):
    """The outcome in the clear, in fp64, with the same clients lost in the same passes."""
    channel = PlainChannel(largest_norm=1e9, exact=True)
    m = SumRound(state, ranks, 1, channel, rule=rule)
    while not m.is_over:
        pass_ = m.state.task.pass_
        for client, sent in m.outbox().items():
            if lost.get(client, 99) > pass_:
                update, weight = clients[client]
                term = contribute(rule, channel, update, weight, metrics(client), sent.task)
                m.receive(client, term, sent.task.round, pass_)
        m.close()
    return m.result()


@each_mean_rule
@each_lost
@pytest.mark.parametrize("modulus", [24, 32])
def test_the_mean_is_that_of_what_clients_encoded_to_the_stated_rounding(rule, lost, modulus):
    state = start()
    clients = cohort(rule, state, ranks=RANKS.values())
    heard, asked = Heard(rule), []
    m = machine(heard, state, RANKS, wide(rule, state, clients, RANKS, modulus))
    drive(m, clients, lost, lambda pass_, tasks: asked.append(tasks))
    assert len(heard.means) == len(asked) == rule.passes
    assert m.saturated == 0
    for mean, tasks, grid in zip(heard.means, asked, m.grid, strict=True):
        total = sum(clients[c][1] for c in tasks)
        for name, got in mean.items():
            want = sum(clients[c][1] / total * rule.encode(clients[c][0], task)[name] for c, task in tasks.items())
            assert np.abs(got - want).max() <= grid.error(len(tasks), total) * (1 + 1e-6)  # fp64 adds some 1e-9 steps


@each_mean_rule
@pytest.mark.parametrize("modulus", [16, 24])
def test_with_the_scales_of_the_round_before_each_tensors_mean_is_right_to_its_own_rounding(rule, modulus):
    state = start()
    clients = cohort(rule, state, ranks=RANKS.values())
    channel = wide(rule, state, clients, RANKS, modulus)
    first = machine(rule, state, RANKS, channel)
    drive(first, clients)
    assert [x.grid for x in first.seen] == list(first.grid)
    halvings = tuple(Scales(x.grid.halvings).after(x).halvings for x in first.seen)
    heard, asked = Heard(rule), []
    m = machine(heard, state, RANKS, channel, halvings=halvings)
    drive(m, clients, each=lambda pass_, tasks: asked.append(tasks))
    assert m.saturated == 0
    total = sum(w for _, w in clients.values())
    for mean, tasks, grid, ks in zip(heard.means, asked, m.grid, halvings, strict=True):
        assert grid.halvings == ks
        for (name, got), bound in zip(mean.items(), grid.errors(len(clients), total), strict=True):
            want = sum(clients[c][1] / total * rule.encode(clients[c][0], task)[name] for c, task in tasks.items())
            assert np.abs(got - want).max() <= bound * (1 + 1e-6)


@steady
@each_lost
@pytest.mark.parametrize("round", [0, 1])
def test_a_secure_round_ends_as_the_one_in_the_clear(rule, lost, round):
    state = start(round=round)
    clients = cohort(rule, state, ranks=RANKS.values())
    m = machine(rule, state, RANKS, wide(rule, state, clients, RANKS))
    got, want = drive(m, clients, lost), plain(rule, state, clients, lost)
    rounding = m.grid[-1].error(len(want.survivors), want.weight)
    # A rule may make more of an error in its mean: by the other factor, by 1 over the share that holds a direction.
    assert_near(computed(got.state), computed(want.state), atol=20 * rounding)  # 6 at most, here
    assert rounding < 5e-6
    assert (got.survivors, got.metrics) == (want.survivors, want.metrics)
    assert got.weight == pytest.approx(want.weight, rel=1e-12)
    assert {c for c, _ in got.refused} == set(lost) - ({c for c in lost if lost[c] >= rule.passes})
    assert (got.state.task.round, got.state.task.pass_) == (round + 1, 0)


@each_mean_rule
def test_only_a_rule_that_hides_ranks_fills_the_same_places_for_all(rule):
    state = start()
    clients = cohort(rule, state, ranks=(1, 3))
    passes = []
    m = machine(rule, state, {10: 1, 11: 3}, wide(rule, state, clients, {10: 1, 11: 3}))
    drive(m, clients, each=lambda pass_, tasks: passes.append(tasks))
    filled = [
        [{n: x != 0 for n, x in rule.encode(clients[c][0], tasks[c]).items()} for c in (10, 11)] for tasks in passes
    ]
    same = all(np.array_equal(few[n], all_[n]) for few, all_ in filled for n in all_)
    assert same == rule.hides_ranks


def test_the_rules_that_hide_ranks():
    hiding = {name for name, rule in MEAN_RULES.items() if rule.hides_ranks}
    assert hiding == {"two passes", "fedkseed", "ravan, one head", "subspace", "subspace, cold", "subspace, one pass"}
