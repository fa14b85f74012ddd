"""What rules say of themselves: what their mean is, which methods they suit, and what they do with a rest."""

import numpy as np
import pytest

from fedpeft.adapters import LowRank
from fedpeft.rules import FactorMean, FedEx, FLoRA, ListRule, MeanRule, Pool, frozen
from tests.laws.cohorts import FEDIT, FEDSA, FFA, RBLA, ROLORA, RULES, TwoPasses, computed, start

PLAIN = (
    "fedit",
    "fedit, rest dropped",
    "median",
    "trimmed",
    "krum",
    "multi-krum",
    "two passes",
    "scaffold",
    "fedkseed",
)
CHANGES = ("fedit", "ffa", "rolora", "fedsa", "fedit, rest dropped", "fedrot", "fedrot, soft", "lora_a2", "fedkseed")


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_whether_its_mean_is_a_change_and_whether_it_takes_layers_for_products(name):
    rule = RULES[name]
    assert rule.tells_factors is (name not in PLAIN)
    if isinstance(rule, MeanRule):
        assert rule.is_change is (name in CHANGES)
    else:
        assert isinstance(rule, ListRule)


def test_a_rest_of_zeros_does_not_travel():
    state = start()
    layers = {n: LowRank(x.a, np.zeros_like(x.b), x.scale) for n, x in state.adapter.layers.items()}
    layers["v"].b[:, 1] = 1.0
    state = type(state)(state.task, type(state.adapter)(layers, state.adapter.dense))
    sent = frozen(state, 1)
    assert list(sent.tail) == ["v"]
    np.testing.assert_array_equal(sent.tail["v"].a, layers["v"].a[1:])
    assert frozen(state, 2).tail == {}


def test_a_rest_goes_behind_the_tail_that_is_there():
    tail = {"q": LowRank(np.ones((4, 5)), np.ones((7, 4)), 3.0)}
    state = start()
    state = type(state)(state.task, state.adapter, tail)
    sent = frozen(state, 1)
    assert (sent.tail["q"].rank, sent.tail["v"].rank) == (6, 1)
    np.testing.assert_array_equal(sent.tail["q"].cut(4).a, tail["q"].a)
    assert state.tail["q"].rank == 4
    for name, x in computed(state).items():
        np.testing.assert_allclose(computed(sent)[name], x, atol=1e-12)


@pytest.mark.parametrize("rule", [FEDIT, FFA, ROLORA, FactorMean(("b",), owners=True)], ids=repr)
def test_the_rest_is_frozen_or_dropped_as_the_rule_says(rule):
    state = start()
    assert rule.send(state, 1).tail.keys() == {"q", "v"}
    dropping = FactorMean(rule.cycle, owners=rule.owners, rest="dropped")
    assert dropping.send(state, 1).tail is state.tail


def test_what_is_kept_on_the_client_has_no_rest():
    assert FEDSA.send(start(), 1).tail == {}
    assert FEDSA.rest == "frozen"  # so it is for its factors' sake, not for its setting's
    assert RBLA.send(start(), 1).tail == {}


@pytest.mark.parametrize("rule", [FLoRA, FedEx])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.0}, "energy: got 0.0; want more than 0 and at most 1"),
        ({"energy": 1.01}, "energy: got 1.01; want more than 0 and at most 1"),
        ({"largest": 0}, "largest: got 0; want at least 1 direction"),
    ],
)
def test_a_tail_that_can_not_be_is_refused(rule, options, message):
    seed = {"seed": 0} if rule is FLoRA else {}
    with pytest.raises(ValueError, match=f"^{message}"):
        rule(**seed, **options)
    rule(**seed, energy=0.01, largest=1)


def test_a_rule_of_ones_own_promises_nothing():
    assert not TwoPasses().is_change
    assert not TwoPasses().tells_factors


def test_only_scaffold_needs_steps_along_gradients():
    assert {name for name, rule in RULES.items() if rule.needs_sgd is not False} == {
        name for name in RULES if name.startswith("scaffold")
    }


def test_only_fedkseed_has_clients_walk_along_a_pool():
    assert {name: rule.pool for name, rule in RULES.items() if rule.pool is not None} == {"fedkseed": Pool(6, 7)}
