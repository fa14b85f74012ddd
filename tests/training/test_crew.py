"""Worker processes on one base model in shared memory."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.rounds import Done, Failed, Metrics, Trial
from fedpeft.training.crew import share, shares, usual
from tests.training.cohort_cases import distance, jobs, trainers


@given(st.lists(st.integers(0, 50)), st.integers(1, 5))
def test_every_job_goes_to_one_worker_and_no_worker_has_much_more_than_another(weights, size):
    parts = shares(weights, size)
    assert len(parts) == size
    assert sorted(i for part in parts for i in part) == list(range(len(weights)))
    sums = [sum(weights[i] for i in part) for part in parts]
    assert max(sums) - min(sums) <= max(weights, default=0)
    assert all(part == sorted(part) for part in parts)


def test_the_number_of_workers_is_what_was_asked_for_or_follows_from_the_cores():
    assert usual(3) == 3
    assert 1 <= usual(None) <= (os.cpu_count() or 1)


def test_shared_weights_are_the_same_and_tied_ones_stay_tied():
    first = torch.nn.Linear(3, 5)
    model = torch.nn.ModuleDict({"a": first, "b": torch.nn.Linear(3, 5), "norm": torch.nn.BatchNorm1d(4)})
    model["b"].weight = first.weight
    before = {n: x.clone() for n, x in model.state_dict().items()}
    share(model)
    assert model["b"].weight is first.weight
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name
        assert x.is_shared(), name
    assert first.weight.untyped_storage().data_ptr() == model["norm"].running_mean.untyped_storage().data_ptr()


@pytest.mark.slow
def test_workers_give_the_loops_results_in_order_and_one_that_dies_is_replaced():
    loop, cohort = trainers("tiny-bert")
    two = cohort.sized(2, 2)
    assert two.crew is not None
    want = list(loop.train_many(jobs(loop)))
    try:
        got = list(two.train_many(jobs(loop)))
        assert all(isinstance(x, Done) for x in got)
        for x, y in zip(want, got, strict=True):
            assert distance(x.trained, y.trained) <= 1e-5  # as one process does: the order of fp32 sums
            assert x.metrics.units == y.metrics.units
        assert next(two.train_many(jobs(loop))).metrics == got[0].metrics  # and nobody asks for the rest
        other = two.over(two.federation, replace(two.training, steps=1))
        assert all(x.metrics.units <= 3 for x in other.train_many(jobs(loop)))

        trials = [Trial(None, "test", loop.start()), *(Trial(c, "train", loop.start()) for c in range(6))]
        for x, y in zip(loop.evaluate_many(trials), two.evaluate_many(trials), strict=True):
            assert isinstance(y, Metrics)
            np.testing.assert_allclose(y.vector(), x.vector(), rtol=1e-5)

        going = two.train_many(jobs(loop))
        first = next(going)
        assert isinstance(first, Done)
        pids = [x.process.pid for x in two.crew._workers]
        if sys.platform == "linux":
            mapped = [Path(f"/proc/{pid}/maps").read_text() for pid in pids]
            assert not any("bitsandbytes" in x for x in mapped), "nobody has asked for it"
        os.kill(pids[0], signal.SIGKILL)
        two.crew._workers[0].process.join(30)  # a process takes a while to die, and until then it is taken for alive
        rest = list(going)
        assert len(rest) == len(want) - 1
        assert all(isinstance(x, Done) or "its worker process ended" in x.reason for x in rest)
        again = list(two.train_many(jobs(loop)))
        assert all(isinstance(x, Done) for x in again), [x for x in again if isinstance(x, Failed)]
        assert {x.process.pid for x in two.crew._workers} != set(pids)
    finally:
        two.crew.close()
    assert not any(x.process.is_alive() for x in two.crew._workers)
