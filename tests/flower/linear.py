"""A trainer with real gradients on a tiny linear model, in numpy: y = (W + scale · b @ a) x + bias."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedpeft.adapters import Adapter, LowRank
from fedpeft.channel import PlainChannel
from fedpeft.flower import ClientStore, Counts, Participant
from fedpeft.rounds import Done, Failed, Job, Metrics, Trial
from fedpeft.rules import Examples, FactorMean, Rule

D, K, RANK, STEPS = 5, 4, 3, 2


def start() -> Adapter:
    rng = np.random.default_rng(7)
    pair = LowRank(
        rng.normal(size=(RANK, K)).astype(np.float32), rng.normal(size=(D, RANK)).astype(np.float32) / 10, 2.0
    )
    return Adapter({"q": pair}, {"bias": np.zeros(D, np.float32)}, {"fixed": np.arange(6, dtype=np.int64)})


@dataclass(frozen=True, slots=True)
class LinearTrainer:
    """fails: clients whose job is a Failed; raises: those at which train_many raises; nan: those that diverge."""

    base: str = "linear-5x4"
    fails: frozenset[int] = frozenset()
    raises: frozenset[int] = frozenset()
    nan: frozenset[int] = frozenset()
    seen: list[int] = field(default_factory=list)

    def start(self) -> Adapter:
        return start()

    def train_many(self, jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        for job in jobs:
            self.seen.append(job.client)
            if job.client in self.raises:
                raise RuntimeError(f"client {job.client} broke")
            if job.client in self.fails:
                yield Failed("out of memory")
                continue
            yield self._train(job)

    def evaluate_many(self, trials: Sequence[Trial]) -> Iterator[Metrics | Failed]:
        for trial in trials:
            x, y = data(trial.client, trial.split)
            yield measure(trial.adapter, trial.tail, x, y)

    def _train(self, job: Job) -> Done:
        assert job.start.fixed["fixed"].tolist() == [0, 1, 2, 3, 4, 5]
        x, y = data(job.client, "train")
        rng = np.random.default_rng(job.seed)
        now = job.start
        for _ in range(STEPS):
            pick = rng.permutation(len(x))[: len(x) // 2 + 1]
            now = step(now, job.trains, job.tail, x[pick], y[pick])
        if job.client in self.nan:
            now = now.put({"q/b": np.full((D, now.layers["q"].rank), np.nan, np.float32)})
        count = job.kept.get("rounds", np.zeros(1, np.float32)) + np.float32(1)
        return Done(now, measure(now, job.tail, x, y), {"rounds": count})


def data(client: int | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    number = 999 if client is None else client
    rng = np.random.default_rng([number, ("train", "validation", "test").index(split)])
    n = counts(number).train if split == "train" else 6
    x = rng.normal(size=(n, K))
    return x, x @ (np.ones((K, D)) + number % 3) + 0.1 * rng.normal(size=(n, D))


def counts(client: int) -> Counts:
    return Counts(train=8 + client % 5, validation=6, test=0 if client == 1 else 6)


def predict(adapter: Adapter, tail: Mapping[str, LowRank], x: np.ndarray) -> np.ndarray:
    weight = np.ones((D, K)) / 2 + adapter.layers["q"].product()
    for layer in tail.values():
        weight = weight + layer.product()
    return x @ weight.T + adapter.dense["bias"]


def measure(adapter: Adapter, tail: Mapping[str, LowRank], x: np.ndarray, y: np.ndarray) -> Metrics:
    error = np.square(predict(adapter, tail, x) - y).mean(axis=1)
    return Metrics(float(error.sum()), float(len(x)), float((error < 1).sum()), float(len(x)))


def step(adapter: Adapter, trains: str, tail: Mapping[str, LowRank], x: np.ndarray, y: np.ndarray) -> Adapter:
    q, bias = adapter.layers["q"], adapter.dense["bias"]
    error = 2 * (predict(adapter, tail, x) - y) / len(x)
    slope = error.T @ x * q.scale
    lr = 0.01
    a = q.a - lr * q.b.T @ slope if "a" in trains else q.a
    b = q.b - lr * slope @ q.a.T if "b" in trains else q.b
    layer = replace(q, a=a.astype(np.float32), b=b.astype(np.float32))
    return replace(adapter, layers={"q": layer}, dense={"bias": (bias - lr * error.sum(axis=0)).astype(np.float32)})


def participant(
    trainer: LinearTrainer | None = None,
    rule: Rule | None = None,
    store: ClientStore | None = None,
    holds_central: bool = True,
) -> Participant:
    return Participant(
        trainer if trainer is not None else LinearTrainer(),
        rule if rule is not None else FactorMean(),
        PlainChannel(),
        Examples(),
        seed=3,
        store=store if store is not None else ClientStore(),
        examples=counts,
        holds_central=holds_central,
    )
