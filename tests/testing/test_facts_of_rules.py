"""What rules are found to do agrees with what is known of them, and with what the laws say."""

import numpy as np
import pytest

from fedpeft.rules import (
    FactorMean,
    FedEx,
    FedRot,
    FedSVD,
    FlexLoRA,
    FLoRA,
    LoRAA2,
    Median,
    ServerState,
    Subspace,
    Task,
    ZeroPad,
)
from fedpeft.testing.cohorts import start
from fedpeft.testing.facts import SIZES, Facts, _formula, _in_turn, facts, numbers_down, numbers_up
from tests.laws.cohorts import FEDSA, RBLA, TwoPasses

FEW = "of few directions, but for the cut to R"
KNOWN = {
    FactorMean(): Facts(True, 1, "no", "runs frozen", "a, b", "R(d + k)", "R(d + k)"),
    FactorMean(("b",)): Facts(True, 1, "yes", "runs frozen", "b", "Rd", "Rd"),
    FactorMean(("b",), owners=True): Facts(True, 1, "equal ranks", "runs frozen", "b, lacks", "Rd + R", "Rd"),
    FactorMean(("b", "a")): Facts(True, 1, "yes", "runs frozen", "b | a in turn", "Rd | Rk in turn", "R(d + k)"),
    FEDSA: Facts(True, 1, "of what is sent", "goes without", "a", "Rk", "Rk"),
    RBLA: Facts(True, 1, "no", "goes without", "a, b, lacks", "R(d + k) + R", "R(d + k)"),
    ZeroPad(): Facts(True, 1, "no", "goes without", "a, b, lacks", "R(d + k) + R", "R(d + k)"),
    FedRot(): Facts(True, 1, "no", "runs frozen", "a, b", "R(d + k)", "R(d + k)"),
    FedSVD(): Facts(True, 1, "yes", "runs frozen", "b", "Rd", "R(d + k)"),
    LoRAA2(): Facts(True, 1, "equal ranks", "has all", "b | a in turn", "Rd | Rk in turn", "R(d + k) + 1"),
    Subspace(seed=1): Facts(True, 2, FEW, "runs frozen", "y; p", "(R + 8)(d + k)", "(2R + 8)(d + k)"),
    TwoPasses(width=6): Facts(True, 2, FEW, "goes without", "y; p", "6(d + k)", "Rd + Rk + 6d"),
    Median(): Facts(False, 1, "no", "runs frozen", "a, b", "R(d + k)", "R(d + k)"),
    FlexLoRA(): Facts(False, 1, "but for the cut to R", "runs frozen", "a, b", "R(d + k)", "R(d + k)"),
    FLoRA(seed=2): Facts(False, 1, "yes", "runs frozen", "a, b", "R(d + k)", "R(d + k) + tail"),
    FedEx(): Facts(False, 1, "yes", "runs frozen", "a, b", "R(d + k)", "R(d + k) + tail"),
}


@pytest.mark.parametrize(("rule", "known"), KNOWN.items(), ids=lambda x: type(x).__name__)
def test_facts_are_what_is_known_of_a_rule(rule, known):
    assert facts(rule) == known


@pytest.mark.parametrize(
    ("count", "formula"),
    [
        (lambda d, k, r: 0, "0"),
        (lambda d, k, r: r * (d + k), "R(d + k)"),
        (lambda d, k, r: r * r // 4 + 4, "R²/4 + 4"),
        (lambda d, k, r: 3 * r * r // 4, "3R²/4"),
        (lambda d, k, r: 2 * r * k + 16 * k + r * d, "Rd + 2Rk + 16k"),
        (lambda d, k, r: (2 * r + 3) * (d + k) + r, "(2R + 3)(d + k) + R"),
        (lambda d, k, r: r * d - r * (r - 1), "Rd − R² + R"),
        (lambda d, k, r: d * k, "varies"),
        (lambda d, k, r: min(d, k), "varies"),
    ],
)
def test_counts_become_formulas(count, formula):
    assert _formula([count(*size) for size in SIZES]) == formula


@pytest.mark.parametrize(
    ("each", "said"),
    [
        (["x"] * 4, "x"),
        (["x", "y", "x", "y"], "x | y in turn"),
        (["x", "y", "z", "z"], "x | y | then z"),
        (["x", "x", "x", "z"], "x | x | x | then z"),
    ],
)
def test_rounds_are_told_in_few_words(each, said):
    assert _in_turn(each) == said


def test_numbers_for_a_model_are_those_of_its_layers_and_leaves():
    state = start()
    dense = 48 + 10 + 1
    both = 3 * (7 + 5) + 2 * (4 + 9)
    assert numbers_up(FactorMean(("b", "a")), state.task) == [dense + 29, dense + 33, dense + 29, dense + 33]
    assert numbers_down(FactorMean(), state) == both + dense
    assert numbers_down(FactorMean(("b",)), state) == 29 + dense
    assert numbers_up(Subspace(seed=1), Task(state.task.spec)) == [2 * (5 * 12 + 4 * 13) // 2 + dense] * 4
    other = ServerState(state.task, state.adapter)
    assert numbers_down(FedSVD(), other) == both + dense
    assert isinstance(numbers_down(FedSVD(), other), int)
    assert not isinstance(numbers_down(FedSVD(), other), np.integer)
