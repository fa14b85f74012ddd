"""What policies count on: that ranks tell who adds to which part of a sum, and that what is sent is for that rank."""

import pytest

from fedpeft.rules import FedKSeed, LoRAA2, PersonalMean, Ravan
from tests.laws.cohorts import MEAN_RULES, cohort, start

each_mean_rule = pytest.mark.parametrize("rule", MEAN_RULES.values(), ids=MEAN_RULES)


@each_mean_rule
@pytest.mark.parametrize("round", [0, 1, 2])
def test_what_is_sent_is_for_its_rank_and_for_no_other_that_trains_otherwise(rule, round):
    state = start(round=round)
    most = max(x.rank for x in state.task.spec.layers)
    ranks = range(1, most + 2)
    sent = {rank: rule.send(state, rank) for rank in ranks}
    for asked in ranks:
        for rank in ranks:
            sizes = [
                [min(r, x.rank) if not isinstance(rule, Ravan) else heads(rule, x, r) for x in state.task.spec.layers]
                for r in (asked, rank)
            ]
            if isinstance(rule, LoRAA2):
                sizes = [min(asked, most), min(rank, most)]
            if isinstance(rule, FedKSeed):
                sizes = [most, most]  # all train all
            assert rule.is_for(sent[asked], rank) == (sizes[0] == sizes[1]), (asked, rank)


def heads(rule, layer, rank):
    count, width = rule.sizes(layer)
    return min(count, max(1, rank // width))


@each_mean_rule
@pytest.mark.parametrize("ranks", [(1, 2), (1, 3), (2, 2), (1, 1, 3), (3, 3), (1, 2, 3)])
@pytest.mark.parametrize("round", [0, 1, 2])
def test_by_a_nested_rule_who_has_a_higher_rank_adds_to_all_that_lower_ones_add_to(rule, ranks, round):
    state = start(round=round)
    if rule.passes > 1 or not rule.is_nested(ranks, state.task.spec):
        return
    filled = []
    for rank in ranks:
        clients = cohort(rule, state, ranks=(rank,) * 3)
        for update, _ in clients.values():
            encoded = rule.encode(update, rule.send(state, rank).task)
            filled.append({n: x != 0 for n, x in encoded.items() if not n.endswith(("/lacks", "/norm"))})
    for low, high in zip(filled, filled[3:], strict=False):
        assert all((~low[n] | high[n]).all() for n in low)


def test_the_rules_that_are_not_nested():
    spec = start().task.spec
    most = max(x.rank for x in spec.layers)
    not_nested = {n for n, x in MEAN_RULES.items() if not x.is_nested([1, 2, most], spec)}
    assert not_nested == {"lora_a2", "ravan"}
    assert LoRAA2().is_nested([most, most + 1], spec)
    assert not LoRAA2().is_nested([most - 1, most], spec)
    assert Ravan(seed=0, heads=6).is_nested([1, 1, most], spec)


@pytest.mark.parametrize("inner", [LoRAA2(), Ravan(seed=1, heads=6)])
def test_a_rule_with_personal_parts_is_for_the_ranks_that_its_own_rule_is_for(inner):
    state = start()
    rule = PersonalMean(inner, ("head",))
    most = max(x.rank for x in state.task.spec.layers)
    assert [rule.is_for(rule.send(state, 1), rank) for rank in (1, most)] == [True, False]
    assert [rule.is_nested(x, state.task.spec) for x in ([1, 2, most], [most])] == [False, True]
