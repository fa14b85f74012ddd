"""How many clients train at once, in what order they are done, and when the loop does it."""

from dataclasses import replace

import pytest

from fedpeft.adapters import same
from fedpeft.training import cohort as engine
from fedpeft.training.pool import Member, Pool
from fedpeft.training.settings import Method
from tests.training.cohort_cases import (
    LINEARS,
    ROUNDING,
    SGD,
    TRAINING,
    distance,
    jobs,
    sentences,
    stacked,
    trainers,
)
from tests.training.peft_cases import PEFT_WARNINGS

pytestmark = [pytest.mark.filterwarnings(x) for x in PEFT_WARNINGS]


@pytest.fixture(scope="module")
def words():
    return sentences()


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 3},
        {"epochs": 2, "accumulate": 2},
        {"epochs": 1, "accumulate": 9},
        {"steps": 1},
        {"steps": 4},
        {"steps": 4, "accumulate": 2},
        {"steps": 5, "accumulate": 2, "batch": 2},
        {"steps": 3, "accumulate": 9},
        {"batch": 50},
    ],
    ids=str,
)
def test_the_passes_that_a_client_still_needs_are_counted_right(words, changes):
    """By which those with most to do are not left behind."""
    training = replace(TRAINING, **changes)
    for job in jobs(words[0]):
        member = Member.of(job, words[0].rows(job.client, "train"), training, 0)
        assert member.left == sum(map(len, Member.of(job, member.rows, training, 0).plan))


@pytest.mark.parametrize("group", [1, 2])
def test_more_jobs_than_there_is_room_for_come_in_their_order(words, group):
    loop, cohort = words
    narrow = cohort.sized(group, 1)
    order = (5, 0, 3, 2, 4, 1, 0, 5, 2)
    some = [replace(x, seed=70 + i) for i, x in enumerate(jobs(cohort, *order))]
    results = list(narrow.train_many(some)) if group == 1 else stacked(narrow, some)
    for want, got in zip(loop.train_many(some), results, strict=True):
        assert distance(got.trained, want.trained) <= ROUNDING
        assert got.metrics.examples == want.metrics.examples


def test_the_state_in_memory_is_of_twice_a_group(words, monkeypatch):
    _, cohort = words
    rows = []
    room = engine.Pool.train.__globals__["Members"].room
    monkeypatch.setattr(engine.Pool.train.__globals__["Members"], "room", lambda *a: rows.append(a[4]) or room(*a))
    assert len(list(cohort.sized(2, 1).train_many(jobs(cohort)))) == 6
    assert len(list(cohort.sized(5, 1).train_many(jobs(cohort)))) == 6
    assert rows == [4, 6]


def test_results_come_as_soon_as_all_before_them_are_there(words):
    _, cohort = words
    going = cohort.sized(2, 1).train_many(jobs(cohort, 3, 0, 2, 5))  # client 3 has one row
    passes = []
    forward = cohort.bridge.model.register_forward_hook(lambda *_: passes.append(1))
    try:
        next(going)
        first = len(passes)
        rest = len(list(going))
    finally:
        forward.remove()
    assert rest == 3
    assert (first, len(passes)) == (6, 9)  # client 2 has the most to do, and so is never left out


def test_one_by_itself_is_done_by_the_loop_bit_for_bit(words):
    loop, cohort = words
    (want,), (got,) = (list(x.train_many(jobs(loop, 2))) for x in words)
    assert same(got.trained, want.trained)
    assert list(cohort.train_many([])) == []


def test_a_method_that_can_not_be_stacked_is_trained_by_the_loop_bit_for_bit():
    loop, cohort = trainers("tiny-bert", Method("loha", rank=3), SGD)
    assert cohort.refusal.startswith(
        "RuntimeError: vmap: It looks like you're attempting to use a Tensor in some data-"
    )
    for want, got in zip(loop.train_many(jobs(loop)), cohort.train_many(jobs(loop)), strict=True):
        assert same(got.trained, want.trained)


def test_the_trial_is_made_once_and_lent_to_other_settings(monkeypatch):
    _, cohort = trainers("tiny-bert", Method("ia3"), SGD)
    calls = []
    monkeypatch.setattr(engine, "disagreement", lambda *a: calls.append(a) or "")
    assert (cohort.refusal, cohort.refusal) == ("", "")
    other = cohort.over(cohort.federation, replace(SGD, epochs=1))
    assert other.refusal == ""
    assert len(calls) == 1


def test_a_plain_adapter_on_a_known_family_needs_no_trial(words, monkeypatch):
    _, cohort = trainers("tiny-bert", None, SGD)
    monkeypatch.setattr(engine, "disagreement", lambda *_: "tried")
    assert cohort.refusal == ""
    cohort = replace(cohort, _refusal=None)
    monkeypatch.setattr(engine, "_FAMILIES", ("llama",))
    assert cohort.refusal == "tried"
    _, other = trainers("tiny-bert", Method("dora", targets=LINEARS["tiny-bert"]), SGD)
    assert other.refusal == "tried"


class TestRoom:
    """How many clients go into one step."""

    def test_is_what_was_asked_for(self, words):
        assert words[1].sized(17, 1).room() == 17

    @pytest.mark.parametrize(("batch", "length", "most"), [(8, 32, 16), (16, 64, 4), (3, 100, 13), (64, 128, 1)])
    def test_is_at_most_4096_tokens_where_memory_is_plenty(self, words, monkeypatch, batch, length, most):
        monkeypatch.setattr(engine, "memory", lambda: {"total": 2.0**50})
        cohort = words[1].sized(None, 1).over(words[1].federation, replace(SGD, batch=batch, length=length))
        assert cohort.room() == most

    def test_of_images_counts_patches(self, monkeypatch):
        monkeypatch.setattr(engine, "memory", lambda: {"total": 2.0**50})
        _, cohort = trainers("tiny-vit", None, replace(SGD, batch=8), group=None)
        assert cohort.room() == 4096 // (8 * 17)  # 28 x 28 pixels in patches of 7, and one token for the class
        small = cohort.over(cohort.federation, replace(SGD, batch=8, image_size=14))
        assert small.room() == 4096 // (8 * 5)

    def test_is_the_most_whose_estimate_is_half_of_the_memory(self, words, monkeypatch):
        cohort = words[1].sized(None, 1)
        estimates = []
        monkeypatch.setattr(engine, "estimate", lambda *a: estimates.append(a) or 1000 * a[3].batch)
        monkeypatch.setattr(engine, "memory", lambda: {"total": 2.0 * 1000 * SGD.batch * 5})
        assert cohort.room() == 5
        monkeypatch.setattr(engine, "memory", lambda: {"total": 2.0 * 1000 * SGD.batch * 5 - 1})
        assert cohort.room() == 4
        monkeypatch.setattr(engine, "memory", lambda: {"total": 1.0})
        assert cohort.room() == 1
        assert all(x[1] == cohort.frozen.parameters for x in estimates)
        assert all(x[4] == "none" for x in estimates)

    def test_of_one_is_the_loop(self, words, monkeypatch):
        loop, cohort = words
        monkeypatch.setattr(Pool, "train", None)
        want, got = (list(x.train_many(jobs(loop, 0, 1))) for x in (loop, cohort.sized(1, 1)))
        assert all(same(x.trained, y.trained) for x, y in zip(want, got, strict=True))
