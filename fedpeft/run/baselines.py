"""What a federation is compared with: no training, each client alone, and all rows in one place."""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fedpeft.adapters import Adapter
from fedpeft.config import Experiment
from fedpeft.data import Federation
from fedpeft.report import BaselineRecord, Score
from fedpeft.rounds import Done, Failed, Job, Metrics, Trainer, Trial, derive
from fedpeft.run.node import Workshop
from fedpeft.run.view import View
from fedpeft.training.settings import Training


def measure(
    found: Experiment, workshop: Workshop, start: Adapter, view: View, done: frozenset[str]
) -> Iterator[BaselineRecord]:
    """The baselines that the experiment asks for and that are not ``done``, one by one.

    Local and central training take the passes over each row that the federation takes on average,
    with one optimiser from beginning to end.
    """
    wanted = found.baselines
    for name, asked, make in (
        ("base", wanted.base, _base),
        ("local", wanted.local, _local),
        ("central-training", wanted.central, _central),
    ):
        if asked and name not in done:
            began = time.monotonic()
            yield replace(make(found, workshop, start, view), seconds=time.monotonic() - began)


def alone(found: Experiment, clients: int) -> Training:
    """The training of a client that never meets the others: as much as a client has in the federation on average."""
    share = found.rounds * found.selection.wanted(clients) / clients
    if found.training.steps is not None:
        return replace(found.training, steps=max(1, round(share * found.training.steps)), prox=0.0)
    return replace(found.training, epochs=max(1, round(share * found.training.epochs)), prox=0.0)


def _base(found: Experiment, workshop: Workshop, start: Adapter, view: View) -> BaselineRecord:
    clients = range(workshop.federation.clients)
    view.work("base", len(clients) + 1)
    each = {n: _score(workshop.trainer, Trial(n, "test", start), view) for n in clients}
    return BaselineRecord("base", _central_score(found, workshop, workshop.trainer, start, view), _known(each))


def _local(found: Experiment, workshop: Workshop, start: Adapter, view: View) -> BaselineRecord:
    """Every client trains alone; central is the mean over the clients."""
    clients = range(workshop.federation.clients)
    trainer = workshop.trainer.over(workshop.federation, alone(found, len(clients)))
    view.work("clients alone", len(clients))
    own: dict[int, Metrics] = {}
    central: list[Metrics] = []
    for n, adapter in zip(clients, _trained(trainer, found, start, list(clients)), strict=True):
        own[n] = _score(trainer, Trial(n, "test", adapter), None)
        if found.evaluation.central:
            central.append(_score(trainer, Trial(None, "test", adapter), None))
        view.advance()
    mean = None
    if central:
        loss, accuracy = (float(np.mean([getattr(x, key) for x in central])) for key in ("mean_loss", "accuracy"))
        mean = Score(loss, accuracy, round(central[0].examples))
    return BaselineRecord("local", mean, _known(own))


def _central(found: Experiment, workshop: Workshop, start: Adapter, view: View) -> BaselineRecord:
    """One client holds all rows."""
    whole = workshop.federation
    rows = (np.sort(np.concatenate(whole.train)),)
    pooled: Federation = replace(
        whole, names=("all",), train=rows, validation=(rows[0][:0],), test=(rows[0][:0],), first=0
    )
    trainer = workshop.trainer.over(pooled, alone(found, whole.clients))
    view.work("all rows in one place", whole.clients + 1)
    (adapter,) = _trained(trainer, found, start, [0])
    each = {n: _score(workshop.trainer, Trial(n, "test", adapter), view) for n in range(whole.clients)}
    return BaselineRecord(
        "central-training", _central_score(found, workshop, workshop.trainer, adapter, view), _known(each)
    )


def _trained(trainer: Trainer, found: Experiment, start: Adapter, clients: list[int]) -> Iterator[Adapter]:
    jobs = [Job(n, 0, derive(found.seed, "baseline", n), start) for n in clients]
    for job, result in zip(jobs, trainer.train_many(jobs), strict=True):
        if isinstance(result, Failed):
            raise RuntimeError(f"a baseline could not be trained: client {job.client}: {result.reason}")
        assert isinstance(result, Done)
        yield result.trained


def _central_score(
    found: Experiment, workshop: Workshop, trainer: Trainer, adapter: Adapter, view: View
) -> Score | None:
    if not found.evaluation.central:
        return None
    return Score.of(_score(trainer, Trial(None, "test", adapter), view))


def _score(trainer: Trainer, trial: Trial, view: View | None) -> Metrics:
    (result,) = trainer.evaluate_many([trial])
    if view is not None:
        view.advance()
    return Metrics() if isinstance(result, Failed) else result


def _known(metrics: dict[int, Metrics]) -> dict[int, Score]:
    return {n: Score.of(x) for n, x in metrics.items() if x.units}
