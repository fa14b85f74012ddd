"""HetLoRA's self-pruning on the client: what it is asked to minimise, what it cuts, and what it remembers."""

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update
from fedpeft.rules import PLAIN, FactorMean, HetLoRA, Task

RANKS = {"q": 10, "v": 4, "w": 1}
LAYERS = {n: LowRank(np.ones((r, 5)), np.ones((7, r)), 2.0) for n, r in RANKS.items()}
FIRST = Adapter(LAYERS, {"head": np.zeros(3)})
TASK = Task(FIRST.spec)


@pytest.mark.parametrize(
    ("gamma", "cuts"),
    [(0.99, {"q": 9, "v": 3}), (0.5, {"q": 5, "v": 2}), (0.05, {"q": 1, "v": 1}), (1.0, {})],
)
def test_the_tail_begins_behind_gamma_times_the_rank_and_a_layer_keeps_one_direction(gamma, cuts):
    objective = HetLoRA(gamma, 0.25).objective(TASK, FIRST, {})
    assert dict(objective.cuts) == cuts
    assert objective.penalty == 0.25
    assert objective.shift == {}


def test_a_product_that_is_a_whole_number_but_for_rounding_is_that_number():
    wide = Adapter({"w": LowRank(np.ones((100, 2)), np.ones((3, 100)), 1.0)})
    assert 0.29 * 100 < 29
    assert dict(HetLoRA(0.29).objective(Task(wide.spec), wide, {}).cuts) == {"w": 29}


def test_the_tail_is_of_the_rank_that_the_client_has():
    assert dict(HetLoRA(0.5).objective(TASK, FIRST.cut(6), {}).cuts) == {"q": 3, "v": 2}
    assert HetLoRA().penalty == HetLoRA().objective(TASK, FIRST, {}).penalty == 1e-3
    assert HetLoRA(penalty=0.0).objective(TASK, FIRST, {}).penalty == 0.0


@pytest.mark.parametrize("penalty", [-1e-9, float("nan"), float("inf")])
def test_a_penalty_that_can_not_be_is_refused(penalty):
    with pytest.raises(ValueError, match=f"^penalty: got {penalty}; want 0 or more"):
        HetLoRA(penalty=penalty)


def shrunk(name: str, before: Adapter = FIRST, factor: float = 0.5) -> Update:
    """A client whose last direction of one layer has become smaller."""
    layer = before.layers[name]
    b = layer.b * np.where(np.arange(layer.rank) == layer.rank - 1, factor, 1.0)
    return Update(before, Adapter(dict(before.layers) | {name: LowRank(layer.a, b, 2.0)}, before.dense))


def test_what_is_cut_is_kept_and_the_client_goes_on_from_there():
    rule = HetLoRA()
    own = rule.keep(shrunk("q"), TASK, {})
    assert {n: float(x) for n, x in own.items()} == {"q/rank": 9.0}
    assert isinstance(own["q/rank"], np.ndarray)
    assert own["q/rank"].dtype == np.float64  # what is kept are tensors, of floats
    begun = rule.begin(FIRST, own)
    assert {n: x.rank for n, x in begun.layers.items()} == {"q": 9, "v": 4, "w": 1}
    assert begun.dense is FIRST.dense
    own = rule.keep(shrunk("v", begun), TASK, own)
    assert {n: float(x) for n, x in own.items()} == {"q/rank": 9.0, "v/rank": 3.0}
    own = rule.keep(shrunk("q", rule.begin(FIRST, own)), TASK, own)
    assert {n: x.rank for n, x in rule.begin(FIRST, own).layers.items()} == {"q": 8, "v": 3, "w": 1}
    assert {n: x.rank for n, x in rule.begin(FIRST.cut(2), own).layers.items()} == {"q": 2, "v": 2, "w": 1}


def test_a_round_at_a_lower_rank_is_no_cut():
    """Where ranks are drawn anew in every round, only what was pruned is gone."""
    rule = HetLoRA()
    own = rule.keep(shrunk("q"), TASK, {})
    small = rule.begin(FIRST.cut(2), own)
    assert rule.keep(Update(small, small), TASK, own) == own
    assert {n: x.rank for n, x in rule.begin(FIRST, own).layers.items()} == {"q": 9, "v": 4, "w": 1}


def test_a_tail_that_has_not_shrunk_stays():
    for factor in (1.0, 2.0):
        own = HetLoRA().keep(shrunk("q", factor=factor), TASK, {})
        assert {n: x.rank for n, x in HetLoRA().begin(FIRST, own).layers.items()} == RANKS


@pytest.mark.parametrize(
    ("in_b", "in_a", "is_cut"),
    [
        *((0.5, 1.0, True), (-0.5, 1.0, True), (1.0, -0.5, True), (0.5, 1.5, True), (1.5, 0.5, True)),
        *((0.5, 3.0, False), (3.0, 0.5, False), (-3.0, 0.5, False), (0.5, -2.0, False)),
    ],
)
def test_a_tail_is_as_large_as_the_product_of_both_factors_norms(in_b, in_a, is_cut):
    at = np.arange(10) == 9
    q = LowRank(np.ones((10, 5)) * np.where(at, in_a, 1.0)[:, None], np.ones((7, 10)) * np.where(at, in_b, 1.0), 2.0)
    own = HetLoRA().keep(Update(FIRST, Adapter(dict(FIRST.layers) | {"q": q}, FIRST.dense)), TASK, {})
    assert ("q/rank" in own) is is_cut


def test_the_norms_of_a_tail_in_half_precision_do_not_overflow():
    a, b = np.full((4, 5), 300, np.float16), np.full((7, 4), -300, np.float16)
    assert min(5 * 300**2, 7 * 150**2) > float(np.finfo(np.float16).max)
    large, small = (Adapter({"q": LowRank(a, x, 2.0)}) for x in (b, b / np.float16(2)))
    own = HetLoRA().keep(Update(large, small), Task(large.spec), {})
    assert {n: float(x) for n, x in own.items()} == {"q/rank": 3.0}


def test_directions_that_training_itself_gave_up_are_gone_for_good_too():
    """And the tail is that of the rank that is left."""
    rule = HetLoRA(gamma=0.5)
    cut = Update(FIRST, FIRST.cut(4))  # q from 10 to 4, of which the last two are smaller than the last eight were
    q = FIRST.layers["q"].cut(9)
    grown = Update(FIRST, Adapter(dict(FIRST.layers) | {"q": LowRank(q.a, 4 * q.b, 2.0)}, FIRST.dense))
    for update, rank in ((cut, 2), (grown, 9)):
        sent = rule.encode(update, TASK)
        norm = update.trained.layers["q"].cut(rank).norm
        np.testing.assert_allclose(sent["q/norm"], [norm] * rank + [0.0] * (10 - rank))
        assert {n: float(x) for n, x in rule.keep(update, TASK, {}).items()} == {"q/rank": float(rank)}


def test_who_has_kept_nothing_begins_with_what_it_received():
    assert {n: x.rank for n, x in HetLoRA().begin(FIRST, {}).layers.items()} == RANKS


def test_what_was_cut_is_not_sent_and_has_no_weight():
    rule = HetLoRA()
    update = shrunk("q")
    sent = rule.encode(update, TASK)
    norm = update.trained.layers["q"].cut(9).norm
    np.testing.assert_allclose(sent["q/norm"], [norm] * 9 + [0.0])
    begun = rule.begin(FIRST, rule.keep(update, TASK, {}))
    later = rule.encode(Update(begun, begun), TASK)
    np.testing.assert_allclose(later["q/norm"], [begun.layers["q"].norm] * 9 + [0.0])
    assert later["q/a"].shape == (10, 5)


def test_other_rules_add_nothing_and_keep_nothing():
    rule, update = FactorMean(), shrunk("q")
    assert rule.objective(TASK, FIRST, {}) is PLAIN
    assert rule.begin(FIRST, {"q/rank": np.array(1.0)}) is FIRST
    assert rule.keep(update, TASK, {"q/rank": np.array(1.0)}) == {}
    assert (PLAIN.penalty, dict(PLAIN.cuts), dict(PLAIN.shift)) == (0.0, {}, {})
