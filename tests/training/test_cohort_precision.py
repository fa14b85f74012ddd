"""The cohort engine in bf16, and on models that people use."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.rounds import Done
from fedpeft.training.settings import Method
from tests.training.cohort_cases import (
    LINEARS,
    MODELS,
    TRAINING,
    assert_agree,
    jobs,
    stacked,
    trainers,
    with_ranks,
    with_tails,
)

SGD = replace(TRAINING, optimiser="sgd", lr=0.05)
BF16 = replace(SGD, precision="bf16")
SIZES = (4, 2, 1)


def far(x, y):
    """The norm of the difference of two adapters."""
    other = y.tensors()
    return np.sqrt(sum(float(((v - other[n]).astype(np.float64) ** 2).sum()) for n, v in x.tensors().items()))


def assert_near(loop, cohort, some, part=0.05):
    """The changes agree to this part of their size, the losses to a tenth of it.

    A number in bf16 has 8 bits, 0.4 %, and the loop and the cohort add up in another order: a client's two results
    are two roundings of what it would come to in fp32, and differ by no more than each does from that.
    """
    for job, want, got in zip(some, loop.train_many(some), stacked(cohort, some), strict=True):
        assert isinstance(want, Done), want
        assert isinstance(got, Done), got
        assert far(got.trained, want.trained) <= part * far(want.trained, job.start)
        assert got.metrics.mean_loss == pytest.approx(want.metrics.mean_loss, rel=part / 10)
        assert (got.metrics.units, got.metrics.examples) == (want.metrics.units, want.metrics.examples)
        assert {x.dtype for x in got.trained.tensors().values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("model", MODELS)
def test_in_bf16_the_two_agree_to_its_rounding(model, name):
    loop, cohort = trainers(model, Method(name, rank=6, targets=LINEARS[model]), BF16)
    assert_near(loop, cohort, with_tails(with_ranks(jobs(loop), 2, 6, 3, 1, 4, 5), 2, 1, 3, 2, 1, 2))


def test_in_bf16_both_are_as_far_from_fp32():
    loop, cohort = trainers("tiny-bert", None, BF16)
    whole, _ = trainers("tiny-bert", None, SGD)
    some = jobs(loop)
    for job, exact, want, got in zip(
        some, whole.train_many(some), loop.train_many(some), stacked(cohort, some), strict=True
    ):
        rounding = far(want.trained, exact.trained)
        assert 0 < rounding < 0.05 * far(exact.trained, job.start)
        assert far(got.trained, exact.trained) < 2 * rounding


REAL = {"minilm": ("query", "value"), "smollm2": ("q_proj", "v_proj"), "dinov2-small": ("q_proj", "v_proj")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name"), [("minilm", "lora"), ("minilm", "dora"), ("smollm2", "dora"), ("dinov2-small", "lora")]
)
def test_real_models_with_ranks_of_2_to_32_in_one_pass(model, name):
    training = replace(SGD, lr=0.01, batch=2, steps=2, length=64, prox=0.1)
    loop, cohort = trainers(model, Method(name, rank=32, alpha=32.0, targets=REAL[model]), training, SIZES)
    some = with_tails(with_ranks(jobs(loop, size=0.01), 2, 32, 8), 2, 1, 4)
    assert_agree(loop, cohort, some, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "part"), [("minilm", 0.05), ("smollm2", 0.25)])
def test_real_models_in_bf16(model, part):
    """SmolLM2 has 30 layers to MiniLM's 6, each of which rounds: either way is 6 to 13 % from fp32 in two steps."""
    training = replace(BF16, lr=0.01, batch=2, steps=2, length=64)
    loop, cohort = trainers(model, Method(rank=8, targets=REAL[model]), training, SIZES)
    assert_near(loop, cohort, jobs(loop, size=0.01), part)


@pytest.mark.slow
def test_a_real_model_with_adamw():
    """Of 150,000 numbers a few have gradients next to nothing, whose rounding grows, to a part of lr."""
    training = replace(TRAINING, lr=1e-3, batch=2, steps=2, length=64)
    loop, cohort = trainers("minilm", Method(rank=8, targets=REAL["minilm"]), training, SIZES)
    some = jobs(loop, size=0.01)
    for want, got in zip(loop.train_many(some), stacked(cohort, some), strict=True):
        other = got.trained.tensors()
        off = np.concatenate([np.abs(x - other[n]).ravel() for n, x in want.trained.tensors().items()])
        assert np.quantile(off, 0.999) <= 1e-5
        assert off.max() <= training.lr / 5
        assert abs(got.metrics.mean_loss - want.metrics.mean_loss) <= 1e-5
