"""What a factor rule sends in which round, and which cycles make no rule."""

import pytest

from fedpeft.rules import FactorMean, Task
from tests.laws.cohorts import FEDIT, FEDSA, FFA, ROLORA, start

SPEC = start().task.spec
DENSE = ["head", "bias", "gate"]


@pytest.mark.parametrize(
    ("rule", "sent", "trains"),
    [
        (FEDIT, ["ab"] * 5, ["ab"] * 5),
        (FFA, ["b"] * 5, ["b"] * 5),
        (ROLORA, ["b", "a", "b", "a", "b"], ["b", "a", "b", "a", "b"]),
        (FEDSA, ["a"] * 5, ["ab"] * 5),
        (FactorMean(("a", "b", "ab")), ["a", "b", "ab", "a", "b"], ["a", "b", "ab", "a", "b"]),
        (FactorMean(("b", "b", "ab")), ["b", "b", "ab", "b", "b"], ["b", "b", "ab", "b", "b"]),
    ],
    ids=repr,
)
def test_rounds_go_through_the_cycle(rule, sent, trains):
    tasks = [Task(SPEC, round) for round in range(5)]
    assert [rule.sent(task) for task in tasks] == sent
    assert [rule.trains(task) for task in tasks] == trains
    for task, parts in zip(tasks, sent, strict=True):
        want = [f"{layer}/{part}" for layer in "qv" for part in parts] + ([] if rule is FEDSA else DENSE)
        assert [name for name, _ in rule.layout(task).shapes] == want


@pytest.mark.parametrize(
    ("rule", "constant"),
    [
        (FEDIT, set()),
        (FFA, {"q/a", "v/a"}),
        (ROLORA, set()),
        (FEDSA, {"q/b", "v/b", *DENSE}),
        (FactorMean(("b", "b", "ab")), set()),
        (FactorMean(("a", "b", "ab")), set()),
    ],
    ids=lambda x: repr(sorted(x)) if isinstance(x, set) else repr(x),
)
def test_what_no_round_sends_is_constant(rule, constant):
    assert rule.constant(SPEC) == constant
    assert isinstance(rule.constant(SPEC), frozenset)


@pytest.mark.parametrize("cycle", [(), ("c",), ("ab", "ba"), ("",), ("a", "abc")])
def test_a_cycle_of_anything_but_factors_is_refused(cycle):
    with pytest.raises(ValueError, match=r"^cycle: got .*; want one or more of 'a', 'b', 'ab'"):
        FactorMean(cycle)


def test_a_personalised_rule_sends_the_same_factor_every_round():
    FactorMean(("b",), personalised=True)
    with pytest.raises(ValueError, match=r"^cycle: got .*; want one entry where the other factor stays"):
        FactorMean(("b", "a"), personalised=True)
