"""Many clients on one base model in memory: lent to one client after another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Self, cast, get_args

import torch

from fedpeft.adapters import Adapter
from fedpeft.data import Federation, Part
from fedpeft.errors import ConfigError
from fedpeft.rounds import Done, Failed, Job, Metrics, Trial
from fedpeft.training.bases import Base, load_base
from fedpeft.training.batches import Encoded, encode
from fedpeft.training.bridge import Bridge, shape_fingerprint
from fedpeft.training.devices import Place, choose
from fedpeft.training.evaluate import measure
from fedpeft.training.methods import Method
from fedpeft.training.packaged import Progress
from fedpeft.training.settings import Model, Training
from fedpeft.training.steps import fit
from fedpeft.training.tails import beside


@dataclass(slots=True, eq=False)
class TorchTrainer:
    """A ``rounds.Trainer``. Make one with ``load``; the rows of a client are tokenised when first needed, and kept.

    A job's result depends on the job alone: not on the jobs before it, nor on who else is in the list.
    """

    frozen: Base
    bridge: Bridge
    training: Training
    federation: Federation
    place: Place
    _start: Adapter
    _rows: dict[tuple[int | None, str], Encoded] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        model: Model,
        method: Method,
        training: Training,
        federation: Federation,
        seed: int,
        progress: Progress | None = None,
    ) -> Self:
        """A trainer for a federation's clients. seed: of the adapter's start and a fresh head.

        ConfigError, naming the key, for a setting that this model or machine can't run.
        """
        place = choose(training.device, training.precision)
        if training.threads is not None:
            torch.set_num_threads(training.threads)
        table = federation.table
        frozen = load_base(model, table.task, table.classes, seed, place, progress)
        training = _fitting(frozen, training)
        bridge = Bridge.attach(frozen.model, method, table.task, seed)
        return cls(frozen, bridge, training, federation, place, bridge.read())

    def over(self, federation: Federation, training: Training) -> Self:
        """A trainer of other clients, or with other settings, on the same model in memory.

        Device, precision and threads stay this one's. It is what the baselines are made of: alone, each
        client trains for as many epochs as all rounds have; centralised, one client holds all rows.
        """
        training = _fitting(self.frozen, training)
        same = federation is self.federation and training.length == self.training.length
        return replace(self, federation=federation, training=training, _rows=self._rows if same else {})

    @property
    def base(self) -> str:
        """The fingerprint of the frozen base model and the adapter's shape."""
        return sha256(f"{self.frozen.fingerprint} {shape_fingerprint(self.bridge.spec)}".encode()).hexdigest()

    def start(self) -> Adapter:
        """The adapter before any training."""
        return self._start

    def train_many(self, jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        """Train each job, one after the other, when asked for; one that raises is ``Failed``, and the next goes on."""
        for job in jobs:
            try:
                yield self._train(job)
            except Exception as error:
                yield Failed(_reason(job.client, error))

    def evaluate_many(self, trials: Sequence[Trial]) -> Iterator[Metrics | Failed]:
        """Evaluate each trial; consecutive trials of one adapter set it up once. No rows give zeros."""
        loaded: Adapter | None = None
        for trial in trials:
            try:
                rows = self.rows(trial.client, trial.split)
                if trial.adapter is not loaded:
                    loaded = None
                    self.bridge.write(trial.adapter)
                    loaded = trial.adapter
                with beside(self.bridge.model, trial.tail, self.place.device):
                    yield measure(
                        self.bridge.model,
                        self.frozen,
                        rows,
                        self.training.batch,
                        self.training.image_size,
                        self.place,
                    )
            except Exception as error:
                yield Failed(_reason(trial.client, error))

    def rows(self, client: int | None, split: str) -> Encoded:
        """A client's split as tokens or pixels; the central test set for client None."""
        key = (client, split)
        if key not in self._rows:
            self._rows[key] = encode(self.federation.part(client, _part(split)), self.frozen, self.training.length)
        return self._rows[key]

    def _train(self, job: Job) -> Done:
        rows = self.rows(job.client, "train")
        self.bridge.write(job.start)
        parameters = self.bridge.trainable(job.trains)
        with beside(self.bridge.model, job.tail, self.place.device):
            metrics = fit(self.bridge.model, parameters, self.frozen, rows, self.training, job.seed, self.place)
        return Done(self.bridge.read(), metrics)


def _part(name: str) -> Part:
    for part in get_args(Part):
        if part == name:
            return cast(Part, part)
    raise ValueError(f"split: got {name!r}; want {', '.join(get_args(Part))}")


def _reason(client: int | None, error: Exception) -> str:
    who = "central" if client is None else f"client {client}"
    return f"{who}: {error}" if str(error) else f"{who}: {type(error).__name__}"


def _fitting(base: Base, training: Training) -> Training:
    """The settings with the side of images filled in; ConfigError for rows that the model can't take."""
    if base.pixels is not None:
        side = training.image_size or base.pixels.size
        if side % base.pixels.patch:
            patch = base.pixels.patch
            raise ConfigError(
                f"training.image_size: got {side}; want a multiple of the model's patch of {patch} pixels"
            )
        return replace(training, image_size=side)
    most = getattr(base.model.config, "max_position_embeddings", None)
    if most is not None and training.length > most:
        raise ConfigError(f"training.length: got {training.length}; the model takes at most {most} tokens")
    return training
