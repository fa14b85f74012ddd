"""Clients asked how they do once they have trained for themselves: what each does, and that nothing of it is kept."""

from dataclasses import replace

import numpy as np
import pytest

import fedpeft.flower.results as results
from fedpeft.flower import ClientStore, Counts, evaluate, its_own, with_own
from fedpeft.rounds import Done, Tuning, derive
from fedpeft.rules import FactorMean, personal
from tests.flower.grids import first_state, gathered, one_round
from tests.flower.linear import RANK, LinearTrainer, counts, participant, start

MORE = 3  # the tuner's steps, which are not the trainer's


class Tuner(LinearTrainer):
    """As the trainer, from a job's seed plus one: so that it can be told which of them was used."""

    def train_many(self, jobs):
        return LinearTrainer.train_many(self, [replace(job, seed=job.seed + MORE) for job in jobs])


def ready(tuner=None, tuning=None, **others):
    tuner = Tuner() if tuner is None else tuner
    return replace(participant(**others), tuning=tuning or Tuning(), tuner=lambda: tuner)


def asked(here, clients, parts=("tuned",), rule=None, state=None):
    fleet, _, _ = gathered(here, len(clients), *(() if rule is None else (rule,)))
    ranks, wanted = dict.fromkeys(clients, RANK), dict.fromkeys(clients, parts)
    return evaluate(fleet, state or first_state(), ranks, wanted, 5.0)


def by_hand(client, shared, tuning=None, tail=None):
    one = (tuning or Tuning()).of(client, 0, derive(3, "personal", client), shared, tail or {}, start())
    (done,) = Tuner().train_many([one.job])
    assert isinstance(done, Done)
    (metrics,) = LinearTrainer().evaluate_many([one.trial(done.trained)])
    return metrics


@pytest.mark.parametrize("tuning", [Tuning(), Tuning(dual=True), Tuning(True, 0.5)], ids=repr)
def test_each_client_is_evaluated_on_its_test_rows_with_what_it_has_trained(tuning):
    got = asked(ready(tuning=tuning), range(3))
    assert got.refused == ()
    want = {c: {"tuned": by_hand(c, start(), tuning)} for c in (0, 2)}
    assert {c: x for c, x in got.answers.items() if c != 1} == want
    assert got.answers[1]["tuned"].units == 0  # it has no test rows


def test_a_mix_of_nothing_is_the_shared_adapter():
    got = asked(ready(tuning=Tuning(True, 0.0)), range(3), ("test", "tuned"))
    for answer in got.answers.values():
        # In fp32, of which the tail is one more sum.
        assert answer["tuned"].loss == pytest.approx(answer["test"].loss, rel=1e-5)


def test_other_parts_of_the_same_request_are_of_the_adapter_as_it_was_sent():
    both = asked(ready(), range(3), ("test", "tuned", "train"))
    alone = asked(ready(), range(3), ("test", "train"))
    for client in range(3):
        assert both.answers[client]["test"] == alone.answers[client]["test"]
        assert both.answers[client]["train"] == alone.answers[client]["train"]
    assert both.answers[2]["tuned"] != both.answers[2]["test"]


def test_a_client_trains_on_from_its_own_parts():
    rule = personal(FactorMean(), ("*/b",))
    here = ready(rule=rule, store=ClientStore())
    fleet, _, _ = gathered(here, 3, rule)
    state = one_round(fleet, range(3), rule=rule)[0].state
    got = evaluate(fleet, state, dict.fromkeys(range(3), RANK), dict.fromkeys(range(3), ("tuned",)), 5.0)
    kept = here.store.load(2, 1)
    own = state.adapter.put({"q/b": kept["personal/q/b"]})
    one = Tuning().of(2, 1, derive(3, "personal", 2), own, {}, start())
    (done,) = Tuner().train_many([one.job])
    (want,) = LinearTrainer().evaluate_many([one.trial(done.trained)])
    assert got.answers[2]["tuned"] == want
    assert want != by_hand(2, state.adapter)


def test_nothing_that_is_trained_is_kept_or_sent():
    store = ClientStore()
    got = asked(ready(store=store), range(3))
    assert [store.load(c, 99) for c in range(3)] == [None] * 3
    assert set(got.answers[0]) == {"tuned"}


def test_a_client_whose_training_fails_is_refused_alone():
    got = asked(ready(Tuner(fails=frozenset({0}), raises=frozenset({3}))), range(5))
    assert sorted(got.answers) == [1, 2, 4]
    assert got.refused == ((0, "out of memory"), (3, "RuntimeError: client 3 broke"))
    assert got.answers[4]["tuned"] == by_hand(4, start())


def test_clients_train_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(results, "TOGETHER", 2)
    tuner = Tuner()
    got = asked(ready(tuner), range(6))
    assert got.answers[5]["tuned"] == by_hand(5, start())
    assert tuner.seen == [0, 2, 3, 4, 5]


def test_a_client_without_training_rows_is_evaluated_as_it_is():
    here = replace(ready(), examples=lambda c: Counts(0, 6, 6) if c == 2 else counts(c))
    got = asked(here, range(3), ("test", "tuned"))
    assert got.answers[2]["tuned"] == got.answers[2]["test"]
    assert got.answers[0]["tuned"] != got.answers[0]["test"]


@pytest.mark.parametrize("lacks", ["tuning", "tuner"])
def test_clients_whose_settings_say_nothing_of_it_refuse(lacks):
    got = asked(replace(ready(), **{lacks: None}), range(2))
    assert not got.answers
    assert {why for _, why in got.refused} == {"the settings let no client train for itself (personal.finetune)"}


def test_what_was_kept_at_another_rank_is_taken_as_far_as_both_go():
    shared = start()
    layer = shared.layers["q"]
    wide = {"q/a": np.full((5, 4), 2.0, np.float32), "q/b": np.full((5, 5), 3.0, np.float32)}
    got = with_own(shared, wide, frozenset({"q/a", "q/b"})).layers["q"]
    np.testing.assert_array_equal(got.a, wide["q/a"][:3])
    np.testing.assert_array_equal(got.b, wide["q/b"][:, :3])
    narrow = {"q/a": wide["q/a"][:1], "q/b": wide["q/b"][:, :2], "bias": np.ones(5, np.float32)}
    mine = with_own(shared, narrow, frozenset({"q/a", "q/b"}))
    np.testing.assert_array_equal(mine.layers["q"].a, np.vstack([wide["q/a"][:1], layer.a[1:]]))
    np.testing.assert_array_equal(mine.layers["q"].b, np.hstack([wide["q/b"][:, :2], layer.b[:, 2:]]))
    assert not mine.dense["bias"].any()  # it is not among the names


def test_what_a_client_did_not_train_of_its_own_stays_as_it_was():
    names = frozenset({"q/b", "bias"})
    had = {"q/b": np.full((5, 3), 3.0, np.float32), "q/a": np.ones((3, 4), np.float32)}
    for rank in (1, 2, 3, 5):
        wide = start()
        trained = replace(wide, layers={n: x.pad(5).cut(rank) for n, x in wide.layers.items()})
        mine = its_own(trained, had, names)
        assert mine.keys() == names
        assert mine["bias"] is trained.dense["bias"]
        np.testing.assert_array_equal(mine["q/b"][:, :rank], trained.layers["q"].b)
        np.testing.assert_array_equal(mine["q/b"][:, rank:], had["q/b"][:, rank:])
        np.testing.assert_array_equal(its_own(trained, {}, names)["q/b"], trained.layers["q"].b)
    both = its_own(start().cut(1), had, frozenset({"q/a", "q/b"}))
    np.testing.assert_array_equal(both["q/a"], np.vstack([start().layers["q"].a[:1], had["q/a"][1:]]))
