"""The client's half of an experiment, built from its settings: what a node runs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedpeft.config import Experiment, experiment
from fedpeft.config.ranks import largest_rank
from fedpeft.config.runtimes import Runtime
from fedpeft.data import Federation, Source, Table, federate, own
from fedpeft.errors import ConfigError, ProtocolError
from fedpeft.flower import ClientStore, Counts, Participant
from fedpeft.rounds import Column, Tuning, derive
from fedpeft.run.footing import Footing
from fedpeft.run.kits import kit_of
from fedpeft.run.members import member
from fedpeft.run.own import Own
from fedpeft.run.plan import keep_within
from fedpeft.run.ranks import check_column, said_by_node
from fedpeft.run.runtimes import Lent, mixed, on_device
from fedpeft.run.shipped import mend
from fedpeft.run.tables import table
from fedpeft.secagg import Protocol
from fedpeft.training.environment import cache_folder, sparing, starting
from fedpeft.training.kit import Kit
from fedpeft.training.settings import Quantise

if TYPE_CHECKING:
    from fedpeft.training.loop import TorchTrainer

Scalar = bool | int | float | str
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


def participant(settings_json: str, node_config: Mapping[str, Scalar]) -> Participant:
    """What serves the coordinator's messages on this node.

    node_config: "partition-id", the client's number; "data", a data set of its own; "rank", how many directions it
    trains, or "memory", bytes or such as "512MB" that training may take, where the experiment's ranks are for clients
    to say; "runtime", "torch" or "onnx", with the folder of its "kit" or of "kits" that it is sent, and "quantise",
    what it holds the base in; "state", a folder for what the client keeps between messages (in the cache folder, by
    run, if not given); "trust", the file with its key, roster and policy for secure aggregation.
    """
    if "memory" in node_config:
        sparing()
    data = node_config.get("data")
    number = int(node_config.get("partition-id", 0))
    mine = Own.said(node_config, settings_json)
    here = workshop(settings_json, None if data is None else str(data), 0 if data is None else number, mine)
    found, state = here.found, _state(here.found, node_config)
    secure = member(here, node_config, state)  # first: what it refuses need not load a model
    keep_within(found, here.federation.table, node_config, mine.engine, _texts(here, node_config))
    return Participant(
        trainer=_fleet(here, node_config),
        rule=found.rule,
        channel=found.plain,
        weighting=found.weighting,
        seed=found.seed,
        store=ClientStore(state),
        examples=here.counts,
        rank=lambda client: said_by_node(here, node_config, client),
        holds_central=found.evaluation.central and len(here.federation.central) > 0,
        exactness=found.evaluation.exactness,
        tuning=Tuning(found.personal.dual, found.personal.mix) if found.personal.finetune else None,
        tuner=lambda: here.tuner,
        secure=secure,
        up=found.compression.codec_up,
        down=found.compression.codec_down,
        footprint=Footing(here, node_config),
    )


def _texts(here: Workshop, node_config: Mapping[str, Scalar]) -> int | None:
    """The texts that a client here trains and is evaluated on, at most, which a refusal may tell of; None where it
    makes no difference, and under secure aggregation, where their number is for nobody to know."""
    found = here.found
    if "memory" not in node_config or not found.training.bytes_lower or isinstance(found.secagg, Protocol):
        return None
    return max(sum(x) for x in here.federation.sizes())  # which client is here, other messages may say otherwise


def _fleet(here: Workshop, node_config: Mapping[str, Scalar]) -> Lent:
    """What trains a node's clients. KitMissingError for a kit that was sent, and that has been damaged since."""
    try:
        return here.fleet
    except ConfigError:
        if here.own is not None and here.own.kit is not None:
            mend(node_config, here.own.kit)
        raise


def _state(found: Experiment, node_config: Mapping[str, Scalar]) -> Path | None:
    if "state" in node_config:
        return Path(str(node_config["state"]))
    return cache_folder() / "state" / found.run if found.run else None
