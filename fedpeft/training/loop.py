"""Many clients on one base model in memory: lent to one client after another."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Self, cast, get_args

from torch import nn

from fedpeft.adapters import CORES, Adapter, LowRank, Tensors
from fedpeft.data import Encoded, Federation, Part, Rows, Store
from fedpeft.errors import ConfigError
from fedpeft.rounds import Done, Failed, Job, Metrics, Trial
from fedpeft.training.bases import Base, load_base, place_for
from fedpeft.training.bridge import Bridge
from fedpeft.training.cores import Core, cores, put_back
from fedpeft.training.devices import Place
from fedpeft.training.evaluate import measure, measure_each
from fedpeft.training.fidelity import pack_base
from fedpeft.training.formats import of_run
from fedpeft.training.forward_only import walk
from fedpeft.training.lower import lower
from fedpeft.training.methods import Method
from fedpeft.training.objectives import Extra, shifts
from fedpeft.training.packaged import Progress
from fedpeft.training.passes import each_of, reason, still_good, travel
from fedpeft.training.settings import Model, Training
from fedpeft.training.steps import fit
from fedpeft.training.tails import beside
from fedpeft.training.token_files import kept

_TRIALS = 64  # of one adapter that share passes: more would keep the first ones waiting


@dataclass(slots=True, eq=False)
class TorchTrainer:
    """A ``rounds.Trainer``. Make one with ``load``; the rows of all clients are tokenised together when first needed.

    A job's result depends on the job alone: not on the jobs before it, nor on who else is in the list.
    """

    frozen: Base
    bridge: Bridge
    training: Training
    federation: Federation
    place: Place
    _start: Adapter
    _store: Store | None = None

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
        place = place_for(model, training, progress)
        table = federation.table
        frozen = load_base(model, table.task, table.classes, seed, place, progress, method)
        training = _fitting(frozen, training)
        bridge = Bridge.attach(frozen.model, method, table.task, seed, frozen.fresh)
        pack_base(frozen, frozen.own, bridge, federation, training, place)
        frozen = replace(frozen, lower=lower(bridge, training))
        return cls(frozen, bridge, training, federation, place, bridge.read())

    def over(self, federation: Federation, training: Training) -> Self:
        """A trainer of other clients, or with other settings, on the same model in memory.

        Device, precision and threads stay this one's. It is what the baselines are made of: alone, each
        client trains for as many epochs as all rounds have; centralised, one client holds all rows.
        """
        training = _fitting(self.frozen, training)
        store = still_good(self._store, self.federation, federation, training.length == self.training.length)
        kept = [(x.lower, x.bytes_lower) for x in (self.training, training)]
        frozen = self.frozen if kept[0] == kept[1] else replace(self.frozen, lower=lower(self.bridge, training))
        return replace(self, frozen=frozen, federation=federation, training=training, _store=store)

    @property
    def base(self) -> str:
        """The fingerprint of the frozen base model and the adapter's shape."""
        return of_run(self.frozen.fingerprint, self.bridge.spec)

    def start(self) -> Adapter:
        """The adapter before any training."""
        return self._start

    def train_many(self, jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        """Train each job, one after the other, when asked for; one that raises is ``Failed``, and the next goes on."""
        return each_of(jobs, self._train)

    def evaluate_many(self, trials: Sequence[Trial]) -> Iterator[Metrics | Failed]:
        """Evaluate each trial; consecutive trials of one adapter set it up once, and share passes. No rows: zeros."""
        loaded: Adapter | None = None
        for (adapter, _), run in groupby(trials, key=lambda x: (x.adapter, x.tail)):
            for some in _cut(list(run), _TRIALS):
                results: dict[int, Metrics | Failed] = {}
                rows: dict[int, Encoded] = {}
                for number, trial in enumerate(some):
                    try:
                        rows[number] = self.rows(trial.client, trial.split)
                    except Exception as error:
                        results[number] = Failed(reason(trial.client, error))
                try:
                    if rows and adapter is not loaded:
                        loaded = None
                        self.bridge.write(adapter)
                        loaded = adapter
                    results |= self._measured(some, rows)
                except Exception as error:
                    results |= {number: Failed(reason(some[number].client, error)) for number in rows}
                yield from (results[number] for number in range(len(some)))

    @property
    def together(self) -> int:
        """How many clients are trained in one step."""
        return 1

    @property
    def refusal(self) -> str:
        """Why clients are trained one after another where more in one step were asked for; empty if they were not."""
        return ""

    def rows(self, client: int | None, split: str) -> Encoded:
        """A client's split as tokens or pixels; the central test set for client None."""
        return self.store.view(self.federation.rows(client, _part(split)))

    @property
    def store(self) -> Store:
        """The rows of all clients and the central test set as tokens or pixels: made when first needed, and kept."""
        if self._store is None:
            self._store = kept(self.federation.table, self.frozen, self.training.length, self.federation.used())
        return self._store

    def _measured(self, trials: Sequence[Trial], rows: Mapping[int, Encoded]) -> dict[int, Metrics | Failed]:
        """Metrics of the trials that have rows: in shared passes, or, where one breaks them, each by itself."""
        try:
            with self._beside(trials[0].tail):
                each = list(rows.values())
                found = measure_each(self.bridge.model, self.frozen, each, self.training, self.place) if each else []
            return dict(zip(rows, found, strict=True))
        except Exception as error:
            if len(rows) == 1:
                return {number: Failed(reason(trials[number].client, error)) for number in rows}
            return {n: x for number in rows for n, x in self._measured(trials, {number: rows[number]}).items()}

    def _train(self, job: Job) -> Done:
        rows = self.rows(job.client, "train")
        model, device = self.bridge.model, self.place.device
        self.bridge.write(job.start)
        if job.pool is not None:
            with self._beside(job.tail):
                return walk(job, rows, self.training, partial(self._losses, job.start, rows))
        with ExitStack() as around:
            found: Mapping[str, Core] = {}
            if job.trains in CORES:
                parameters, found = around.enter_context(cores(self.bridge, job.start, job.trains, device))
            else:
                parameters = self.bridge.trainable(job.trains)
            around.enter_context(self._beside(job.tail))
            extra = self._extra(job, parameters)
            metrics = fit(model, parameters, self.frozen, rows, self.training, job.seed, self.place, extra)
        trained = put_back(job.start, self.bridge.read(job.start), found)
        return Done(trained, metrics, travel=travel(self.training, len(rows)))

    def _beside(self, tail: Mapping[str, LowRank]) -> AbstractContextManager[None]:
        """The context in which the model runs a frozen tail."""
        if self.frozen.lower is not None:
            self.frozen.lower.need_above(tail)
        return beside(self.bridge.model, tail, self.place.device)

    def _losses(self, start: Adapter, rows: Encoded, tensors: Tensors, batch: Rows) -> Metrics:
        """The sums on a batch with these tensors in place of the start's."""
        self.bridge.write(start.put(tensors))
        some = Encoded(rows.store, rows.index[batch])
        return measure(self.bridge.model, self.frozen, some, self.training, self.place)

    def _extra(self, job: Job, parameters: Mapping[str, nn.Parameter]) -> Extra:
        """What the job's rule adds to the loss of these parameters."""
        if not job.objective.shift:
            return Extra.of(job.objective, parameters, {})
        whole = self.bridge.padded(shifts(job.start, job.objective.shift)).tensors()
        return Extra.of(job.objective, parameters, {n: whole[n] for n in parameters})


def _cut(trials: Sequence[Trial], size: int) -> Iterator[Sequence[Trial]]:
    return (trials[i : i + size] for i in range(0, len(trials), size))


def _part(name: str) -> Part:
    for part in get_args(Part):
        if part == name:
            return cast(Part, part)
    raise ValueError(f"split: got {name!r}; want {', '.join(get_args(Part))}")


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
    if most is not None and 0 < most < training.length:  # XLNet says -1: it has no limit
        raise ConfigError(f"training.length: got {training.length}; the model takes at most {most} tokens")
    return training
