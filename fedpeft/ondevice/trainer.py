"""Many clients on one kit: ``fit`` of ``fedpeft.training.steps`` again, in numpy, around a graph."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from math import isfinite
from typing import Self, cast

import numpy as np

from fedpeft.adapters import Adapter, Array, Tensors, drawn
from fedpeft.data import Encoded, Federation, Padded, Part, Rows, Store, by_length, padded
from fedpeft.errors import ConfigError
from fedpeft.ondevice.feeds import Fed, need_fit
from fedpeft.ondevice.objective import Extra
from fedpeft.ondevice.optimise import clip, optimiser, proximal, scale
from fedpeft.ondevice.session import Graph, limited
from fedpeft.ondevice.tokens import tokenise
from fedpeft.rounds import Done, Failed, Job, Metrics, Trial
from fedpeft.training.environment import cores
from fedpeft.training.formats import of_run, packed_fingerprint
from fedpeft.training.forward_only import walk
from fedpeft.training.kit import EVALUATE, STEP, Kit
from fedpeft.training.methods import Method
from fedpeft.training.passes import diverged, each_of, groups, need_rows, reason, still_good, travel
from fedpeft.training.settings import Model, Training


@dataclass(slots=True, eq=False)
class OnnxTrainer:
    """A ``rounds.Trainer`` without torch. Make one with ``open``; rows are tokenised and graphs opened when needed.

    A job's result depends on the job alone, and is torch's to rounding. One graph is open at a time: the weights of
    two would share the file that they are mapped from, but not what onnxruntime has made of them.
    """

    kit: Kit
    training: Training
    federation: Federation
    base: str
    threads: int
    frugal: bool
    _start: Adapter
    _store: Store | None = None
    _opened: dict[str, Graph] = field(default_factory=dict[str, Graph])

    @classmethod
    def open(
        cls,
        kit: Kit,
        training: Training,
        federation: Federation,
        model: Model,
        threads: int | None = None,
        method: Method | None = None,
        frugal: bool | None = None,
    ) -> Self:
        """A trainer for a federation's clients. threads: of onnxruntime (unset: as ``training`` has it, or all cores);
        method: as the experiment has it, to be compared with the kit's; frugal: as in ``Graph.open`` (unset: where the
        process's memory is limited).

        ConfigError, naming the key, for a setting that the kit was not made for or that its graph can't honour.
        """
        _check(kit, training, federation, model, method)
        base = of_run(packed_fingerprint(kit.facts.plain, kit.facts.quantise, model.formats), kit.spec)
        frugal = limited() if frugal is None else frugal
        return cls(kit, training, federation, base, threads or training.threads or cores(), frugal, kit.start())

    def over(self, federation: Federation, training: Training) -> Self:
        """A trainer of other clients, or with other settings, on the same kit. ConfigError as ``open``."""
        _check_length(self.kit, training)
        store = still_good(self._store, self.federation, federation, training.length == self.training.length)
        return replace(self, federation=federation, training=training, _store=store)

    def start(self) -> Adapter:
        """The adapter before any training."""
        return self._start

    def train_many(self, jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        """Train each job, one after the other, when asked for; one that raises is ``Failed``, and the next goes on."""
        return each_of(jobs, self._train)

    def evaluate_many(self, trials: Sequence[Trial]) -> Iterator[Metrics | Failed]:
        """Evaluate each trial; consecutive trials of one adapter set it up once. No rows: zeros."""
        for (adapter, tail), run in groupby(trials, key=lambda x: (x.adapter, x.tail)):
            fed: Fed | None = None
            for trial in run:
                try:
                    fed = fed or Fed.of(self._fitting(adapter), tail)
                    yield self._measured(fed, self.rows(trial.client, trial.split))
                except Exception as error:
                    yield Failed(reason(trial.client, error))

    def rows(self, client: int | None, split: str) -> Encoded:
        """A client's split as tokens; the central test set for client None."""
        return self.store.view(self.federation.rows(client, cast(Part, split)))

    @property
    def store(self) -> Store:
        """The rows of all clients and the central test set as tokens: made when first needed, and kept."""
        if self._store is None:
            self._store = tokenise(self.kit, self.federation.table, self.training.length, self.federation.used())
        return self._store

    def graph(self, name: str) -> Graph:
        """A graph of the kit, opened if it is not; the one that was open is closed first."""
        if name not in self._opened:
            self.close()
            self._opened[name] = Graph.open(self.kit, name, self.threads, self.frugal)
        return self._opened[name]

    def close(self) -> None:
        """Give back the memory of the graph that is open; it is opened again when it is needed."""
        self._opened.clear()

    def _train(self, job: Job) -> Done:
        rows, training = self.rows(job.client, "train"), self.training
        self._fitting(job.start)
        if job.pool is not None:
            return walk(job, rows, training, partial(self._losses, job, rows))
        need_rows(rows)
        fed = Fed.of(job.start, job.tail, self._trains(job.trains))
        now, extra = fed.values, Extra.of(job.objective, job.start, fed.values)
        before = {n: x.copy() for n, x in now.items()} if training.prox else {}
        steps = optimiser(training, now)
        done = Metrics(examples=len(rows))
        for number, group in enumerate(groups(rows, training, np.random.default_rng(job.seed))):
            slopes, sums = self._slopes(fed, [self._batch(rows.store, rows.index[x]) for x in group], number)
            done += sums
            if training.prox:
                proximal(slopes, now, before, training.prox)
            extra.penalise(slopes, now)
            if training.clip is not None:
                clip(slopes, training.clip)
            extra.shift(slopes)
            steps.step(slopes)
            fed.settle()
        return Done(fed.adapter(), done, travel=travel(training, len(rows)))

    def _losses(self, job: Job, rows: Encoded, tensors: Tensors, batch: Rows) -> Metrics:
        """The sums on a batch with these tensors in place of the start's, by the smaller graph."""
        return self._measured(Fed.of(job.start.put(tensors), job.tail), Encoded(rows.store, rows.index[batch]))

    def _slopes(self, fed: Fed, batches: Sequence[Padded], number: int) -> tuple[dict[str, Array], Metrics]:
        """The gradient of the mean loss over all units of these batches, and their sums."""
        graph, wanted = self.graph(STEP), ["losses", "hits", *(f"grad/{n}" for n in fed.slopes_of)]
        slopes: dict[str, Array] = {}
        sums = Metrics()
        for batch in batches:
            if not len(batch.targets):  # texts of one token, before which there is nothing
                continue
            losses, hits, *found = graph.run(batch, fed.inputs, wanted)
            total = float(losses.sum())
            if not isfinite(total):
                raise FloatingPointError(diverged(total, number + 1))
            sums += Metrics(total, len(losses), int(hits.sum()))
            here = fed.slopes(dict(zip(fed.slopes_of, found, strict=True)))
            del found
            for name, x in here.items():
                if name in slopes:
                    slopes[name] += x
                else:
                    slopes[name] = x
        if not slopes:  # no unit in all of them, and a mean over none is without gradient, as in torch
            return {n: np.zeros_like(x) for n, x in fed.values.items()}, sums
        scale(slopes.values(), 1 / sums.units)
        return slopes, sums

    def _measured(self, fed: Fed, rows: Encoded) -> Metrics:
        done = Metrics(examples=len(rows))
        for chosen in by_length(rows.lengths, self.training.rows):
            losses, hits = self.graph(EVALUATE).run(
                self._batch(rows.store, rows.index[chosen]), fed.inputs, ["losses", "hits"]
            )
            done += Metrics(float(losses.sum(dtype=np.float64)), len(losses), int(hits.sum()))
        return done

    def _batch(self, store: Store, rows: Rows) -> Padded:
        return padded(store, rows, self.kit.facts.pad, self.kit.facts.task == "lm")

    def _fitting(self, adapter: Adapter) -> Adapter:
        """The adapter; ValueError if it is not one of the kit's."""
        need_fit(adapter, self.kit.spec)
        if adapter.fixed is not self._start.fixed and _bytes(drawn(adapter)) != _bytes(self._start.fixed):
            raise ValueError("the method's frozen draws are not the kit's, which are part of its graph: export it anew")
        return adapter

    def _trains(self, trains: str) -> str:
        """What a job trains; ValueError for what the graph has no gradients of."""
        if self.kit.facts.trains == "b" and trains != "b":
            raise ValueError(
                f"the job trains {trains!r}, and the kit's graph has gradients of b alone; export it with both factors"
            )
        return trains


def _check(kit: Kit, training: Training, federation: Federation, model: Model, method: Method | None) -> None:
    facts, table = kit.facts, federation.table
    formats = model.formats or (model.quantise,)
    dropout = 0.0 if method is None else method.dropout
    name = facts.method if method is None else method.name
    here = f"the kit in {kit.folder}"
    for key, good, got, want in (
        ("model.name", model.name == facts.model, model.name, f"{facts.model}, which {here} was made of"),
        ("model.quantise", facts.quantise in formats, " or ".join(formats), f"{facts.quantise}, as {here} is"),
        ("model.dropout", not model.dropout, "true", "false: a client without torch has no dropout"),
        ("adapter.dropout", not dropout, str(dropout), "0: a client without torch has no dropout"),
        ("adapter.method", name == facts.method, name, f"{facts.method}, which {here} was made for"),
        ("data", table.task == facts.task, table.task, f"{facts.task}, the task of {here}"),
        ("data", table.classes == facts.classes, ", ".join(table.classes), f"the classes of {here}: {facts.classes}"),
        ("training.precision", training.precision != "bf16", training.precision, "auto, fp32 or fastest without torch"),
        ("training.device", training.device in ("auto", "cpu"), training.device, "auto or cpu without torch"),
    ):
        if not good:
            raise ConfigError(f"{key}: got {got}; want {want}")
    _check_length(kit, training)


def _check_length(kit: Kit, training: Training) -> None:
    if training.length > kit.facts.longest:
        raise ConfigError(f"training.length: got {training.length}; the model takes at most {kit.facts.longest} tokens")


def _bytes(fixed: Mapping[str, Array]) -> dict[str, tuple[str, bytes]]:
    return {n: (f"{x.shape} {x.dtype}", x.tobytes()) for n, x in fixed.items()}
