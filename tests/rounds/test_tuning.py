"""What clients train for themselves after a run: from what, beside what, and how much of it counts."""

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, same
from fedpeft.rounds import Tuning
from tests.laws.cohorts import adapter

TAIL = {"q": LowRank(np.ones((4, 5)), np.ones((7, 4)), 3.0)}
SHARED, START, TRAINED = adapter(1), adapter(2), adapter(3)


def test_by_default_a_client_trains_on_and_is_evaluated_with_what_comes_of_it():
    asked = Tuning().of(7, 3, 11, SHARED, TAIL, START)
    job = asked.job
    assert (job.client, job.round, job.seed, job.trains, dict(job.kept)) == (7, 3, 11, "ab", {})
    assert same(job.start, SHARED)
    assert dict(job.tail) == TAIL
    trial = asked.trial(TRAINED)
    assert (trial.client, trial.split) == (7, "test")
    assert trial.adapter is TRAINED
    assert dict(trial.tail) == TAIL


def test_a_personal_adapter_starts_from_nothing_beside_the_shared_one():
    """Of as many directions as the shared one has, which may be fewer than the server's."""
    shared = SHARED.cut(2)
    asked = Tuning(dual=True).of(7, 3, 11, shared, TAIL, START)
    job = asked.job
    assert (job.client, job.round, job.seed, job.trains) == (7, 3, 11, "ab")
    for name, x in job.start.layers.items():
        np.testing.assert_array_equal(x.a, START.layers[name].a[:2])
        assert not x.b.any()
        assert (x.b.shape, x.scale) == (shared.layers[name].b.shape, shared.layers[name].scale)
    for name, leaf in job.start.dense.items():
        np.testing.assert_array_equal(leaf, shared.dense[name])
    assert job.start.fixed is shared.fixed
    want = {"q": TAIL["q"].product() + shared.layers["q"].product(), "v": shared.layers["v"].product()}
    assert job.tail.keys() == want.keys()
    for name, x in job.tail.items():
        np.testing.assert_allclose(x.product(), want[name], atol=1e-12)
    assert list(TAIL) == ["q"]
    assert TAIL["q"].rank == 4


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0])
def test_the_mix_says_how_much_of_the_personal_one_counts(mix):
    asked = Tuning(True, mix).of(7, 3, 11, SHARED, TAIL, START)
    trial = asked.trial(TRAINED)
    assert (trial.client, trial.split) == (7, "test")
    assert trial.tail is asked.job.tail
    for name, x in trial.adapter.layers.items():
        np.testing.assert_allclose(x.product(), mix * TRAINED.layers[name].product(), atol=1e-12)
    for name, leaf in trial.adapter.dense.items():
        want = SHARED.dense[name] + mix * (TRAINED.dense[name] - SHARED.dense[name])
        np.testing.assert_allclose(leaf, want, atol=1e-12)
    if mix in (0.0, 1.0):  # to the last bit
        for name, leaf in trial.adapter.dense.items():
            np.testing.assert_array_equal(leaf, (SHARED, TRAINED)[int(mix)].dense[name])


def test_precision_stays():
    shared, start, trained = (adapter(seed, np.float32) for seed in (1, 2, 3))
    asked = Tuning(True, 0.3).of(0, 1, 2, shared, {}, start)
    found: list[Adapter] = [asked.job.start, asked.trial(trained).adapter, Adapter(layers=asked.job.tail)]
    assert {x.dtype for each in found for x in each.tensors().values()} == {np.dtype(np.float32)}
