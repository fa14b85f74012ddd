"""Clients that train together: nobody's result depends on the company, and nothing is left behind."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeft.adapters import same
from fedpeft.rounds import Done, Trial
from fedpeft.training import cohort as engine
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.pool import Member, Pool
from fedpeft.training.settings import Method
from fedpeft.training.stack import Stack
from tests.training.cohort_cases import (
    LINEARS,
    ROUNDING,
    SGD,
    SIZES,
    assert_agree,
    broken,
    by_client,
    distance,
    jobs,
    sentences,
    trainers,
    with_ranks,
    with_tails,
)
from tests.training.peft_cases import PEFT_WARNINGS

pytestmark = [pytest.mark.filterwarnings(x) for x in PEFT_WARNINGS]


@pytest.fixture(scope="module")
def words():
    return sentences()


def test_the_same_call_twice_gives_the_same_bits(words):
    _, cohort = words
    first, again = (by_client(cohort, jobs(cohort)) for _ in range(2))
    torch.manual_seed(99)
    cohort.bridge.write(broken(jobs(cohort)[0]).start)
    later = by_client(cohort, jobs(cohort))
    for client, done in first.items():
        assert same(done.trained, again[client].trained)
        assert same(done.trained, later[client].trained)
        assert done.metrics == again[client].metrics == later[client].metrics


def test_a_clients_result_does_not_depend_on_its_companions(words):
    _, cohort = words
    many = by_client(cohort.sized(6, 1), jobs(cohort))
    for pair in ((0, 3), (5, 2), (4, 1)):
        for client, done in by_client(cohort.sized(2, 1), jobs(cohort, *pair)).items():
            assert distance(done.trained, many[client].trained) <= ROUNDING
            assert done.metrics.loss == pytest.approx(many[client].metrics.loss, rel=1e-6)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_pads_of_a_lower_rank_stay_exactly_zero(name, monkeypatch):
    training = replace(SGD, optimiser="adamw", lr=0.003, weight_decay=0.1, prox=0.2)
    _, cohort = trainers("tiny-bert", Method(name, rank=5, targets=LINEARS["tiny-bert"]), training)
    some = with_ranks(jobs(cohort), 2, 5, 3, 1, 4, 2)
    whole, adapter = [], Stack.adapter
    monkeypatch.setattr(Stack, "adapter", lambda *a: whole.append(adapter(*a[:2], cohort.start())) or adapter(*a))
    members = [Member.of(x, cohort.rows(x.client, "train"), training, number) for number, x in enumerate(some)]
    results = list(Pool(cohort.stack, cohort.frozen, training, cohort.place, 6).train(members))
    assert len(whole) == len(results) == 6
    for (number, done), padded in zip(results, whole, strict=True):
        assert distance(done.trained, some[number].start) > 1e-3
        for name, x in padded.layers.items():
            rank = some[number].start.layers[name].rank
            assert not x.a[rank:].any()
            assert not x.b[:, rank:].any()
            assert np.array_equal(x.b[:, :rank], done.trained.layers[name].b)


def test_jobs_of_different_kinds_in_one_list(words):
    loop, cohort = words
    a, b, tails = jobs(loop, 0, 1, trains="a"), jobs(loop, 2, 3, trains="b"), with_tails(jobs(loop, 4, 5), 2, 3)
    first = next(iter(tails[0].tail))
    fewer = [replace(x, tail={first: x.tail[first]}) for x in tails]
    assert_agree(loop, cohort, [*a, *b, *tails, *fewer, *jobs(loop, 0, 3), *b, *jobs(loop, 5, 4)], ROUNDING)


def test_equal_fixed_tensors_that_came_by_different_messages_share_a_pass():
    loop, cohort = trainers("tiny-bert", Method("vera"), SGD)
    some = [replace(x, start=replace(x.start, fixed=dict(x.start.fixed))) for x in jobs(loop)]
    assert len({id(x.start.fixed) for x in some}) == 6
    assert len(some[0].start.fixed) > 0
    assert len({engine._kind(x) for x in some}) == 1
    assert_agree(loop, cohort, some, ROUNDING)


def test_fixed_tensors_are_those_of_the_jobs_own_start():
    loop, cohort = trainers("tiny-bert", Method("vera"), SGD)
    other = {n: x[::-1].copy() for n, x in loop.start().fixed.items()}
    some = jobs(loop, 0, 2, 4, 5)
    mixed = [x if i < 2 else replace(x, start=replace(x.start, fixed=other)) for i, x in enumerate(some)]
    assert_agree(loop, cohort, mixed, ROUNDING)
    plain = by_client(loop, some)
    for client, done in by_client(cohort, mixed).items():
        assert (distance(done.trained, plain[client].trained) > 1e-4) == (client in (4, 5))


def test_fixed_tensors_are_the_jobs_own_even_if_others_are_written_between_results():
    loop, cohort = trainers("tiny-bert", Method("vera"), SGD, group=2)
    start = loop.start()
    other = replace(start, fixed={n: x[::-1].copy() for n, x in start.fixed.items()})
    undisturbed = by_client(cohort, jobs(loop))
    going = cohort.train_many(jobs(loop))
    for client in range(6):
        done = next(going)
        assert same(done.trained, undisturbed[client].trained)
        list(loop.evaluate_many([Trial(None, "test", other)]))


def test_the_model_is_as_it_was_between_results_and_after_all(words):
    """So that another client, or an evaluation, may come in between."""
    loop, cohort = words
    start = loop.start()
    (before,) = loop.evaluate_many([Trial(None, "test", start)])
    (alone,) = loop.train_many(jobs(loop, 1))
    undisturbed = by_client(cohort.sized(2, 1), jobs(loop))
    results = {}
    state = torch.get_rng_state()
    going = cohort.sized(2, 1).train_many(jobs(loop))
    for client in range(6):
        results[client] = next(going)
        assert torch.equal(torch.get_rng_state(), state)
        (during,) = loop.evaluate_many([Trial(None, "test", start)])
        assert during == before
        (other,) = loop.train_many(jobs(loop, 1))
        assert same(other.trained, alone.trained)
        assert not any(x.training for x in loop.bridge.model.modules())
    for client, done in results.items():
        assert same(done.trained, undisturbed[client].trained)


def test_a_generator_that_is_left_behind_leaves_nothing_behind(words):
    loop, cohort = words
    (alone,) = loop.train_many(jobs(loop, 1))
    going = cohort.sized(2, 1).train_many(jobs(loop))
    next(going)
    going.close()
    (again,) = loop.train_many(jobs(loop, 1))
    assert same(alone.trained, again.trained)
    assert not any("forward" in vars(x) for x in loop.bridge.model.modules())
    assert not any(x.training for x in loop.bridge.model.modules())


def test_evaluation_after_a_cohort_is_of_the_adapter_it_is_given():
    loop, cohort = trainers("tiny-bert", Method("prompt_tuning"), SGD)
    (before,) = loop.evaluate_many([Trial(2, "train", loop.start())])
    list(cohort.train_many(jobs(loop)))
    (after,) = cohort.evaluate_many([Trial(2, "train", loop.start())])
    assert after == before


def test_training_leaves_the_base_the_starts_and_torchs_random_state_alone(words):
    _, cohort = words
    live = {id(x) for x in cohort.bridge.live.values()}
    base = {n: x.detach().clone() for n, x in cohort.bridge.model.named_parameters() if id(x) not in live}
    some, state = jobs(cohort), torch.get_rng_state()
    kept = [{n: x.copy() for n, x in job.start.tensors().items()} for job in some]
    results = list(cohort.train_many(some))
    assert torch.equal(torch.get_rng_state(), state)
    now = dict(cohort.bridge.model.named_parameters())
    assert all(torch.equal(now[n], x) for n, x in base.items())
    for job, before, done in zip(some, kept, results, strict=True):
        assert all(np.array_equal(before[n], x) for n, x in job.start.tensors().items())
        assert not any(np.shares_memory(x, y) for x in done.trained.tensors().values() for y in before.values())


def test_results_do_not_share_memory_so_that_keeping_one_keeps_no_other(words):
    _, cohort = words
    one, two, *_ = (x.trained.tensors() for x in cohort.train_many(jobs(cohort)))
    sizes = sum(x.nbytes for x in one.values())
    whole = {id(x if x.base is None else x.base): (x if x.base is None else x.base).nbytes for x in one.values()}
    assert sum(whole.values()) == sizes
    assert not any(np.shares_memory(x, y) for x in one.values() for y in two.values())


def test_dropout_is_on_and_drawn_from_the_jobs_seeds():
    method = Method(rank=3, targets=LINEARS["tiny-bert"], dropout=0.4)
    _, cohort = trainers("tiny-bert", method, SGD)
    assert cohort.refusal == ""
    list(cohort.evaluate_many([Trial(0, "train", cohort.start())]))  # which leaves the model with its dropout off
    first, again = by_client(cohort, jobs(cohort)), by_client(cohort, jobs(cohort))
    assert all(same(first[c].trained, again[c].trained) for c in first)
    other = by_client(cohort, [replace(x, seed=x.seed + 50) for x in jobs(cohort)])
    assert not any(same(first[c].trained, other[c].trained) for c in first)
    quiet = by_client(trainers("tiny-bert", replace(method, dropout=0.0), SGD)[1], jobs(cohort))
    assert all(distance(first[c].trained, quiet[c].trained) > 1e-4 for c in first)


def test_the_sizes_here_are_as_unequal_as_the_tests_say(words):
    loop, _ = words
    assert tuple(len(loop.rows(i, "train")) for i in range(6)) == SIZES
    assert isinstance(loop, TorchTrainer)
    assert all(isinstance(x, Done) for x in loop.train_many(jobs(loop, 3)))
