"""A client that can't be trained in a cohort fails alone, with the loop's words."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import LowRank
from fedpeft.rounds import Failed
from fedpeft.training.pool import Pool
from fedpeft.training.settings import Method
from tests.training.cohort_cases import (
    LINEARS,
    ROUNDING,
    SGD,
    broken,
    by_client,
    distance,
    jobs,
    sentences,
    stacked,
    trainers,
    with_tails,
)
from tests.training.peft_cases import PEFT_WARNINGS

pytestmark = [pytest.mark.filterwarnings(x) for x in PEFT_WARNINGS]


@pytest.fixture(scope="module")
def words():
    return sentences()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_client_whose_loss_is_not_finite_fails_alone(words, value):
    _, cohort = words
    some = jobs(cohort)
    clean = by_client(cohort, [x for x in some if x.client != 2])
    spoiled = by_client(cohort, [broken(x, value) if x.client == 2 else x for x in some])
    failed = spoiled.pop(2)
    assert failed == Failed("client 2: the loss is nan at step 1: lower training.lr, or set training.clip")
    for client, done in spoiled.items():
        assert distance(done.trained, clean[client].trained) <= ROUNDING
        assert done.metrics.loss == pytest.approx(clean[client].metrics.loss, rel=1e-6)


def test_a_row_of_state_that_a_failed_client_leaves_behind_is_as_new():
    """The group is 2 and the window 4: those behind it get the rows of those that failed."""
    training = replace(SGD, momentum=0.5, accumulate=2)
    loop, cohort = trainers("tiny-bert", None, training, group=2)
    some = [broken(x) if x.client in (0, 1, 2) else x for x in jobs(cohort)]
    apart, together = by_client(loop, some), by_client(cohort, some)
    assert [c for c, x in together.items() if isinstance(x, Failed)] == [0, 1, 2]
    for client, want in apart.items():
        if isinstance(want, Failed):
            assert together[client] == want
        else:
            assert distance(together[client].trained, want.trained) <= ROUNDING


def test_a_client_that_diverges_late_says_at_which_step_as_in_the_loop():
    training = replace(SGD, lr=1e5, clip=None, epochs=6, batch=2)
    loop, cohort = trainers("tiny-llama", None, training)
    apart, together = list(loop.train_many(jobs(loop))), stacked(cohort, jobs(loop))
    steps = [x.reason.split(" at step ")[1].split(":")[0] for x in apart if isinstance(x, Failed)]
    assert max(map(int, steps), default=0) > 1, "nobody diverged after the first step"
    for want, got in zip(apart, together, strict=True):
        assert isinstance(want, Failed) == isinstance(got, Failed)
        if isinstance(want, Failed):
            assert got.reason.split(" at step ")[1] == want.reason.split(" at step ")[1]


def test_clients_that_can_not_begin_fail_with_the_loops_words_and_the_others_go_on():
    loop, cohort = trainers("tiny-bert", Method(rank=4, targets=LINEARS["tiny-bert"]), SGD, (4, 0, 5, 3))
    good = jobs(loop)
    name = next(iter(good[2].start.layers))
    scale = {n: replace(x, scale=3.0) for n, x in good[2].start.layers.items()}
    higher = {n: x.pad(9) for n, x in good[2].start.layers.items()}
    some = [
        good[0],
        good[1],
        replace(good[2], start=replace(good[2].start, layers=scale)),
        replace(good[2], client=77),
        replace(good[3], start=replace(good[3].start, dense={})),
        replace(good[2], start=replace(good[2].start, layers=higher)),
        good[2],
        good[3],
    ]
    apart, together = list(loop.train_many(some)), stacked(cohort, some)
    assert together[1] == Failed("client 1: no rows to train on")
    assert together[5].reason.startswith(
        f"client 2: {name}: got 24 x 24 of rank 9 and scale 4.0; want 24 x 24 of rank 4"
    )
    for want, got in zip(apart, together, strict=True):
        if isinstance(want, Failed):
            assert got == want
        else:
            assert distance(got.trained, want.trained) <= ROUNDING
    assert [isinstance(x, Failed) for x in together] == [False, True, True, True, True, True, False, False]


def test_where_nobody_can_begin_all_fail():
    _, cohort = trainers("tiny-bert", None, SGD, (0, 0, 3))
    assert [x.reason for x in cohort.train_many(jobs(cohort, 0, 1))] == [
        "client 0: no rows to train on",
        "client 1: no rows to train on",
    ]


def test_replies_that_are_all_cut_off_fail_alone_and_say_so():
    sizes = (4, 5, 3)
    loop, cohort = trainers("tiny-llama", None, replace(SGD, length=9), sizes)
    apart, together = list(loop.train_many(jobs(loop))), stacked(cohort, jobs(loop))
    for want, got in zip(apart, together, strict=True):
        assert type(want) is type(got)
        if isinstance(want, Failed):
            assert got == want
            assert "were cut before their reply; raise training.length" in got.reason


@pytest.mark.filterwarnings("ignore:.* clients could not train in one step")
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_path_that_does_not_fit_fails_its_job_alone(words, where):
    loop, cohort = words
    some = with_tails(jobs(loop), 2, 1, 3, 2, 1, 2)
    at = 0 if where == "first" else 5
    name = next(iter(some[at].tail))
    some[at] = replace(some[at], tail=dict(some[at].tail) | {name: LowRank(np.ones((2, 5)), np.ones((24, 2)), 1.0)})
    apart, together = list(loop.train_many(some)), list(cohort.train_many(some))
    assert apart[at] == together[at] == Failed(f"client {at}: tail: {name} is (24, 24); got (24, 5)")
    for number in set(range(6)) - {at}:
        assert distance(together[number].trained, apart[number].trained) <= ROUNDING


@pytest.mark.filterwarnings("ignore:.* clients could not train in one step")
def test_a_path_beside_a_layer_that_there_is_not_fails_like_in_the_loop(words):
    _, cohort = words
    small = LowRank(np.ones((2, 5)), np.ones((24, 2)), 1.0)
    results = list(cohort.train_many([replace(x, tail={"nowhere": small}) for x in jobs(cohort, 0, 2)]))
    assert results == [Failed(f"client {i}: tail: the model has no layer 'nowhere'") for i in (0, 2)]


def test_what_breaks_a_whole_pass_does_not_break_a_client(words, monkeypatch):
    """Such as too little memory for so many at once: with fewer, and at last by the loop, it goes."""
    loop, cohort = words
    whole = Pool._pass
    sizes = []

    def scarce(self, state, going):
        sizes.append(self.group)
        if self.group > 3 or len(sizes) > 8:
            raise RuntimeError("not enough memory")
        return whole(self, state, going)

    monkeypatch.setattr(Pool, "_pass", scarce)
    with pytest.warns(RuntimeWarning) as said:
        found = list(cohort.sized(6, 1).train_many(jobs(loop)))
    for want, got in zip(loop.train_many(jobs(loop)), found, strict=True):
        assert distance(got.trained, want.trained) <= ROUNDING
    assert "6 clients could not train in one step (RuntimeError: not enough memory)" in str(said[0].message)
    assert (sizes[0], set(sizes)) == (6, {6, 3})
    assert len(sizes) > 8, "the loop has not had its turn"
