"""Rows that go through the model some at a time are trained on as if they went at once; and top layers alone."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.data import Encoded, Store
from fedpeft.errors import ConfigError
from fedpeft.rounds import Done, Job
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.passes import groups
from fedpeft.training.settings import Method, Model, Training

PLACE = {"device": "cpu", "threads": 1}


def rows_of(*lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    count = len(lengths)
    store = Store(np.ones(offsets[-1], np.int32), offsets, None, np.zeros(count, np.int64), np.zeros(count, np.uint8))
    return Encoded(store, np.arange(count))


def test_batches_come_in_parts_of_at_most_so_many_rows_and_steps_take_the_same_rows():
    rows = rows_of(*range(1, 12))
    training = Training(batch=5, accumulate=2, epochs=2)
    whole = list(groups(rows, training, np.random.default_rng(3)))
    cut = list(groups(rows, replace(training, micro=2), np.random.default_rng(3)))
    assert [np.concatenate(x).tolist() for x in whole] == [np.concatenate(x).tolist() for x in cut]
    assert sorted(len(x) for group in cut for x in group) == sorted([2, 2, 1, 2, 2, 1, 1] * 2)
    assert [len(x) for x in groups(rows, replace(training, micro=9), np.random.default_rng(3))] == [
        len(x) for x in whole
    ]


@pytest.mark.parametrize("micro", [1, 3])
def test_what_is_trained_is_what_the_uncut_batch_trains(micro, sentences, share):
    training = Training(batch=7, epochs=2, optimiser="sgd", lr=0.1, momentum=0.5, length=24, **PLACE)
    trainer = TorchTrainer.load(Model("tiny-bert"), Method(rank=2), training, share(sentences, 15, 15), 1)
    job = Job(0, 0, 5, trainer.start())
    (whole,) = trainer.train_many([job])
    (cut,) = trainer.over(trainer.federation, replace(training, micro=micro)).train_many([job])
    assert isinstance(whole, Done)
    assert isinstance(cut, Done)
    assert cut.travel == whole.travel
    assert cut.metrics.units == whole.metrics.units
    assert cut.metrics.loss == pytest.approx(whole.metrics.loss, rel=1e-5)
    for name, x in whole.trained.tensors().items():
        np.testing.assert_allclose(cut.trained.tensors()[name], x, atol=2e-6)  # rounding of sums in another order


def test_adapter_layers_adapts_the_top_ones_alone(sentences, share):
    training = Training(length=16, **PLACE)

    def layers(**change):
        found = TorchTrainer.load(Model("tiny-bert"), Method(rank=2, **change), training, share(sentences, 30), 1)
        return sorted(found.start().layers)

    assert all(".layer.1." in x for x in layers(layers=1))
    assert layers(layers=2) == layers()
    with pytest.raises(ConfigError, match=r"^adapter.layers: got 3; \w+ has 2: want at most that"):
        layers(layers=3)
    with pytest.raises(ValueError, match=r"^layers: got 1; want it or options.layers_to_transform, not both"):
        Method(layers=1, options={"layers_to_transform": [0]})
    with pytest.raises(ValueError, match=r"^layers: got 0; want at least 1"):
        Method(layers=0)
    with pytest.raises(ValueError, match=r"^micro: got 0; want at least 1 row"):
        Training(micro=0)
