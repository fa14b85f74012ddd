"""What a federation is compared with: no training, each client alone, and all rows in one place."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from fedpeft.adapters import Adapter
from fedpeft.config import Experiment
from fedpeft.data import Federation
from fedpeft.report import BaselineRecord, Score
from fedpeft.rounds import Failed, Job, Metrics, Trainer, Trial, derive
from fedpeft.run.panel import panel
from fedpeft.run.view import View
from fedpeft.run.virtual import assigned
from fedpeft.run.workshop import Workshop
from fedpeft.training.settings import Training


def measure(
    found: Experiment, workshop: Workshop, start: Adapter, view: View, done: frozenset[str]
) -> Iterator[BaselineRecord]:
    """The baselines that the experiment asks for and that are not ``done``, one by one.

    Local and central training take the passes over each row that the federation takes on average,
    with one optimiser from beginning to end. A client that can't be trained or evaluated alone is left
    out of its baseline, and ``view`` is told. Of more than ``evaluation.sample`` clients those stand for all with which
    the run is evaluated at the end; that is told too.
    """
    wanted = found.baselines
    count, clients = workshop.federation.clients, len(_clients(found, workshop))
    if clients < count and (wanted.local or wanted.base or wanted.central):
        sampled = count > found.evaluation.sample
        which = f"a sample of the {count:,} (evaluation.sample)" if sampled else f"those of the {count:,} not hostile"
        view.note(f"baselines are of {clients} clients, {which}")
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
    return _longer(found.training, found.rounds * found.selection.wanted(clients) / clients)


def together(found: Experiment, clients: int) -> Training:
    """The training on all rows in one place: as many epochs as ``alone``, or the steps of all clients."""
    asked = found.rounds * found.selection.wanted(clients)
    return _longer(found.training, asked if found.training.steps is not None else asked / clients)


def _longer(training: Training, times: float) -> Training:
    if training.steps is not None:
        return replace(training, steps=max(1, round(times * training.steps)), prox=0.0)
    return replace(training, epochs=max(1, round(times * training.epochs)), prox=0.0)


def _base(found: Experiment, workshop: Workshop, start: Adapter, view: View) -> BaselineRecord:
    clients = _clients(found, workshop)
    view.work("base", len(clients) + 1)
    each = {n: _own(workshop, n, start, view) for n in clients}
    return BaselineRecord("base", _central_score(found, workshop, start, view), _known(each))


def _local(found: Experiment, workshop: Workshop, start: Adapter, view: View) -> BaselineRecord:
    """Every client trains alone, at its own rank; central is the mean over the clients that could."""
    clients = _clients(found, workshop)
    trainer = workshop.fleet.over(workshop.federation, alone(found, workshop.federation.clients))
    view.work("clients alone", len(clients))
    own: dict[int, Metrics] = {}
    central: list[Metrics] = []
    ranks = assigned(found, workshop)
    for n, adapter in _trained(trainer, found, {n: start.cut(ranks(n, 0)) for n in clients}, view):
        own[n] = _score(trainer, Trial(n, "test", adapter), view)
        if _has_central(found, workshop):
            central.append(_score(trainer, Trial(None, "test", adapter), view))
        view.advance()
    mean = None
    central = [x for x in central if x.units]
    if central:
        loss, accuracy = (float(np.mean([getattr(x, key) for x in central])) for key in ("mean_loss", "accuracy"))
        mean = Score(loss, accuracy, round(central[0].examples))
    return BaselineRecord("local", mean, _known(own))


def _central(found: Experiment, workshop: Workshop, start: Adapter, view: View) -> BaselineRecord:
    """One client holds all rows, on torch; each client's own rows are evaluated on its own runtime."""
    whole = workshop.federation
    rows = (whole.union("train"),)
    none = (rows[0][:0],)
    pooled: Federation = replace(whole, names=("all",), train=rows, validation=none, test=none, first=0, drawn=None)
    trainer = workshop.trainer.over(pooled, together(found, whole.clients))
    clients = _clients(found, workshop)
    view.work("all rows in one place", len(clients) + 1)
    for _, adapter in _trained(trainer, found, {0: start}, view):
        each = {n: _own(workshop, n, adapter, view) for n in clients}
        return BaselineRecord("central-training", _central_score(found, workshop, adapter, view), _known(each))
    return BaselineRecord("central-training")


def _clients(found: Experiment, workshop: Workshop) -> tuple[int, ...]:
    """Those whose own rows are looked at."""
    return panel(found, range(workshop.federation.clients))


def _trained(
    trainer: Trainer, found: Experiment, starts: Mapping[int, Adapter], view: View
) -> Iterator[tuple[int, Adapter]]:
    """Each client's adapter, trained from its start, but for those whose training failed."""
    jobs = [Job(n, 0, derive(found.seed, "baseline", n), start) for n, start in starts.items()]
    for job, result in zip(jobs, trainer.train_many(jobs), strict=True):
        if isinstance(result, Failed):
            view.note(f"left out of a baseline: {result.reason}")
        else:
            yield job.client, result.trained


def _has_central(found: Experiment, workshop: Workshop) -> bool:
    return found.evaluation.central and len(workshop.federation.central) > 0


def _central_score(found: Experiment, workshop: Workshop, adapter: Adapter, view: View) -> Score | None:
    if not _has_central(found, workshop):
        return None
    metrics = _score(workshop.fleet, Trial(None, "test", adapter), view)
    view.advance()
    return Score.of(metrics) if metrics.units else None


def _own(workshop: Workshop, client: int, adapter: Adapter, view: View) -> Metrics:
    metrics = _score(workshop.fleet, Trial(client, "test", adapter), view)
    view.advance()
    return metrics


def _score(trainer: Trainer, trial: Trial, view: View) -> Metrics:
    """The trial's metrics; none where it failed, of which ``view`` is told."""
    (result,) = trainer.evaluate_many([trial])
    if isinstance(result, Failed):
        view.note(f"left out of a baseline: {result.reason}")
        return Metrics()
    return result


def _known(metrics: dict[int, Metrics]) -> dict[int, Score]:
    return {n: Score.of(x) for n, x in metrics.items() if x.units}
