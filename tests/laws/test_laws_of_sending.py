"""Laws of what rules send, keep and hand on, each one test over every rule."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import LowRank
from fedpeft.rules import FedEx, FedKSeed, FLoRA, ListRule, LoRAA2, Scaffold, Subspace
from tests.laws.cohorts import (
    FACTOR_RULES,
    FEDIT,
    RULES,
    TwoPasses,
    assert_near,
    cohort,
    computed,
    drops,
    play,
    start,
)

FOLDING = (FLoRA, FedEx)
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
each_factor_rule = pytest.mark.parametrize("rule", FACTOR_RULES.values(), ids=FACTOR_RULES)
each_round = pytest.mark.parametrize("round", [0, 1])


@each_factor_rule
@each_round
def test_what_is_trained_is_either_sent_or_kept(rule, round):
    state = start(round=round)
    spec = state.task.spec
    sent, kept = {n for n, _ in rule.layout(state.task).shapes}, rule.personal(spec)
    assert not sent & kept
    assert sent | kept == set(state.adapter.tensors(rule.trains(state.task)))


def test_only_a_personalised_rule_keeps_anything_on_the_client():
    spec = start().task.spec
    kept = {name: rule.personal(spec) for name, rule in RULES.items()}
    assert kept.pop("fedsa") == {"q/b", "v/b", "head", "bias", "gate"}
    assert set(kept.values()) == {frozenset()}


@each_rule
def test_a_client_of_some_rank_receives_that_many_directions_and_the_tail(rule):
    tail = {"q": LowRank(np.ones((4, 5)), np.ones((7, 4)), 3.0)}
    state = replace(start(), tail=tail)
    for rank in (1, 2, 3, 1 << 30):
        sent = rule.send(state, rank)
        assert (sent.task.round, sent.task.pass_, sent.task.spec) == (0, 0, state.task.spec)
        trains_all = isinstance(rule, FedKSeed | LoRAA2) or rule == RULES["ravan, one head"]
        held = 3 if trains_all else rank
        assert [x.rank for x in sent.adapter.layers.values()] == [min(held, 3), min(held, 2)]
        if drops(rule) or rank >= 3:
            assert dict(sent.tail) == tail
        if not drops(rule):
            assert_near(computed(sent), computed(state), atol=1e-12)


@each_rule
def test_what_else_the_server_keeps_is_handed_on(rule):
    state = replace(
        start(),
        tail={"q": LowRank(np.ones((4, 5)), np.ones((7, 4)), 1.0)},
        memory={"basis": np.ones(2)},
        moments={"v/q/a": np.ones(3)},
    )
    after = play(rule, state, cohort(rule, state)).state
    if not isinstance(rule, FOLDING):
        assert after.tail is state.tail
    assert after.memory["basis"] is state.memory["basis"]
    assert isinstance(rule, Scaffold | Subspace) or set(after.memory) == {"basis"}
    assert after.moments == state.moments
    assert after.task.spec is state.task.spec


@each_rule
def test_passes_and_parts_are_what_the_rule_says(rule):
    two = isinstance(rule, TwoPasses) or (isinstance(rule, Subspace) and not rule.one_pass)
    assert rule.passes == (2 if two else 1)
    if isinstance(rule, TwoPasses | Subspace | ListRule):
        assert rule.trains(start().task) == "ab"
        assert rule.constant(start().task.spec) == frozenset()


def test_nothing_comes_between_in_a_rule_of_one_pass():
    with pytest.raises(ValueError, match="FactorMean has one pass; nothing comes between"):
        FEDIT.between({}, start())
