"""Baselines are as long as the federation, and one that fails takes neither the run nor the others with it."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from fedpeft.adapters import Adapter
from fedpeft.config import experiment
from fedpeft.data import Federation, Table
from fedpeft.rounds import Done, Failed, Metrics
from fedpeft.run import Lines
from fedpeft.run.baselines import alone, measure, together


def made(**training):
    return experiment(
        {
            "rounds": 6,
            "data": {"name": "x"},
            "training": training,
            "selection": {"fraction": 0.5},
            "partition": {"name": "iid", "clients": 4},
            "baselines": {"local": True, "central": True},
        }
    )


@pytest.mark.parametrize("train", [alone, together])
def test_epochs_are_a_clients_share_of_all_rounds_alone_and_together(train):
    assert train(made(epochs=2, prox=0.1), 4).epochs == 6  # 6 rounds, half of the clients in each, 2 epochs
    assert train(made(epochs=2, prox=0.1), 4).prox == 0


def test_steps_are_a_clients_share_alone_and_those_of_all_clients_together():
    assert alone(made(steps=5), 4).steps == 15  # half of 6 rounds, 5 steps each
    assert together(made(steps=5), 4).steps == 60  # 2 clients in each of 6 rounds


@dataclass
class Trainer:
    """Client 1 can't be trained, nor anybody evaluated on the rows of client 2."""

    federation: Federation
    log: list[str] = field(default_factory=list)

    def over(self, federation, training):
        return Trainer(federation)

    def train_many(self, jobs):
        for job in jobs:
            yield Failed("client 1: the loss is nan") if job.client == 1 else Done(job.start, Metrics())

    def evaluate_many(self, trials):
        for trial in trials:
            yield Failed("client 2: no memory") if trial.client == 2 else Metrics(4.0, 8.0, 6.0, 8.0)


class Heard(Lines):
    def __init__(self):
        self.notes, self.steps, self.total = [], 0, 0

    def note(self, text):
        self.notes.append(text)

    def work(self, what, total):
        self.total += total

    def advance(self):
        self.steps += 1


def federation(central=3):
    table = Table("classify", tuple(map(str, range(20))), np.arange(20) % 2, ("u", "v"))
    rows = [np.arange(5 * i, 5 * i + 5) for i in range(4)]
    parts = [tuple(x[part] for x in rows) for part in (slice(0, 3), slice(3, 4), slice(4, 5))]
    return Federation(table, tuple("abcd"), *parts, np.arange(central))


def measured(central=3):
    view, whole = Heard(), federation(central)
    trainer = Trainer(whole)
    workshop = SimpleNamespace(federation=whole, trainer=trainer, fleet=trainer)
    return list(measure(made(epochs=1), workshop, Adapter(), view, frozenset())), view


def test_a_client_that_fails_is_left_out_of_its_baseline_and_said_aloud():
    found, view = measured()
    assert [(x.name, sorted(x.clients)) for x in found] == [
        ("base", [0, 1, 3]),
        ("local", [0, 3]),
        ("central-training", [0, 1, 3]),
    ]
    assert all(x.central.accuracy == 0.75 and x.central.loss == 0.5 for x in found)
    assert "left out of a baseline: client 1: the loss is nan" in view.notes
    assert view.notes.count("left out of a baseline: client 2: no memory") == 3


def test_without_a_central_test_set_baselines_have_no_score_on_it():
    found, view = measured(central=0)
    assert [x.central for x in found] == [None, None, None]
    assert not any("central" in x for x in view.notes)
