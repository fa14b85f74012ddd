"""An experiment's data and trainer in one process: what a node, a simulation and a coordinator work with."""

import json
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fedpeft.config import Experiment, experiment
from fedpeft.config.ranks import largest_rank
from fedpeft.config.runtimes import Runtime
from fedpeft.data import Federation, Source, Table, federate, own
from fedpeft.errors import ConfigError, ProtocolError
from fedpeft.flower import Counts
from fedpeft.rounds import Column, derive
from fedpeft.run.kits import kit_of
from fedpeft.run.own import Own
from fedpeft.run.ranks import check_column
from fedpeft.run.runtimes import Lent, mixed, on_device
from fedpeft.run.tables import table
from fedpeft.training.environment import starting
from fedpeft.training.kit import Kit
from fedpeft.training.settings import Quantise

if TYPE_CHECKING:
    from fedpeft.training.loop import TorchTrainer

NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Workshop:
    """An experiment's data and trainer in this process; the base model is loaded when first asked for, and once.

    own: what a deployed node trains with, where it is not the process of a simulation or of a coordinator.
    """

    found: Experiment
    federation: Federation
    own: Own | None = None

    @cached_property
    def fleet(self) -> Lent:
        """What trains this process's clients: ``trainer``, a kit's, or each client's own."""
        if self.own is not None and self.own.engine == "onnx" and self.own.kit is not None:
            frugal = self.own.frugal or None
            return on_device(self.found, self.federation, Kit.open(self.own.kit), self.own.quantise, frugal)
        return mixed(self.found, self.federation.clients, self.on) if self.found.simulation.runtimes else self.trainer

    @cached_property
    def trainer(self) -> "TorchTrainer":
        """A trainer on torch, of all clients: it is what models are evaluated and exported with."""
        with starting():
            from fedpeft.training.cohort import CohortTrainer
            from fedpeft.training.crew import usual
            from fedpeft.training.loop import TorchTrainer

        found, seed = self.found, derive(self.found.seed, "start")
        if found.simulation.engine == "loop":
            return TorchTrainer.load(found.model, found.adapter, found.training, self.federation, seed)
        trainer = CohortTrainer.load(found.model, found.adapter, found.training, self.federation, seed)
        return trainer.sized(found.simulation.group, usual(found.simulation.workers))

    def on(self, runtime: Runtime) -> Lent:
        """A trainer of all clients on a runtime; that of torch in the experiment's own format is ``trainer``."""
        if runtime.engine == "onnx":
            return on_device(self.found, self.federation, kit_of(self, runtime.quantise))
        return self.held_in(runtime.quantise).trainer

    def held_in(self, quantise: Quantise) -> "Workshop":
        """This workshop, with the base in another format."""
        if quantise == self.found.model.quantise:
            return self
        return Workshop(replace(self.found, model=replace(self.found.model, quantise=quantise)), self.federation)

    @cached_property
    def tuner(self) -> Lent:
        """What trains each client for itself when the run is over, on the same base."""
        settings = replace(self.found.training, epochs=self.found.personal.finetune, steps=None, prox=0.0)
        return self.fleet.over(self.federation, settings)

    def counts(self, client: int) -> Counts:
        """How many rows a client has of each part. Raises ProtocolError for one that is not here."""
        federation = self.federation
        if not 0 <= client - federation.first < federation.clients:
            raise ProtocolError(
                f"node: client {client} is none of this data's {federation.clients}; "
                f"start as many nodes as there are clients, or change partition.clients"
            )
        return Counts(*federation.size(client))


def workshop(settings_json: str, data: str | None = None, client: int = 0, own: Own | None = None) -> Workshop:
    """The workshop for these settings; one is kept, so that a node's messages and a run's baselines share a base.

    data: a data set of this node's own, held by ``client``; own: what it trains with. Raises ConfigError, DataError.
    """
    return _workshop(settings_json, data, client, None if own == Own() else own)


@lru_cache(maxsize=1)  # which tells apart a default that is given and one that is not, so that is settled above
def _workshop(settings_json: str, data: str | None, client: int, mine: Own | None) -> Workshop:
    found = experiment(json.loads(settings_json))
    if mine is not None:
        found = mine.settle(found)
    if data is not None:
        rows = _rows(found, replace(found.data, name=data))
        return Workshop(found, own(rows, found.split, found.seed, client, found.data.examples), mine)
    if found.fleet.own_data:
        raise ConfigError('data: fleet.own_data is set, and this node\'s config has no data; want data = "FILE" in it')
    with starting():
        federation = federate(_rows(found, found.data), found.partition, found.split, found.seed, found.data.examples)
    missing = federation.missing_classes()
    if missing:
        raise ConfigError(
            f"data: no client trains on {len(missing)} of the classes: {', '.join(missing[:5])}; "
            f"use more rows (data.examples), another seed, or rows without these classes"
        )
    return Workshop(found, federation, mine)


def _rows(found: Experiment, source: Source) -> Table:
    """The data set, with the column of ranks where these are in it."""
    rows = table(source, found.ranks.column if isinstance(found.ranks, Column) else "")
    check_column(found.ranks, largest_rank(found.adapter), rows.ranks)
    return rows


def without_data(found: Experiment) -> Workshop:
    """A coordinator's workshop where every node has data of its own: a model and its adapter, and no rows.

    data.task "auto" is taken as "classify"; for images of the nodes' own, data.task = "image" says so.
    """
    task = "classify" if found.data.task == "auto" else found.data.task
    inputs = np.zeros((0, 1, 1), np.uint8) if task == "image" else ()
    targets = () if task == "lm" else np.zeros(0, np.int64)
    return Workshop(found, Federation(Table(task, inputs, targets, found.data.classes), (), (), (), (), NONE))
