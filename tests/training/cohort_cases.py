"""Small federations of unequal clients, and the two trainers of one model that must agree: shared by tests of the
cohort engine."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np

from fedpeft.adapters import Adapter, LowRank
from fedpeft.data import Federation, Table
from fedpeft.rounds import Done, Failed, Job
from fedpeft.training.cohort import CohortTrainer
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.settings import Method, Model, Training

SIZES = (5, 2, 9, 1, 4, 7)
"""Rows of the six clients: none a multiple of a batch of 3 but one, and one client has a single row."""

TRAINING = Training(lr=0.003, batch=3, length=40, device="cpu", precision="fp32", attention="sdpa")
SGD = replace(TRAINING, optimiser="sgd", lr=0.05, epochs=2)
ROUNDING = 1e-6  # as in test_cohort_equals_loop
MODELS = ("tiny-bert", "tiny-llama", "tiny-vit")
LINEARS = {"tiny-bert": ("query", "value"), "tiny-llama": ("q_proj", "v_proj"), "tiny-vit": ("q_proj", "v_proj")}


def table(model: str, rows: int = sum(SIZES) + 3) -> Table:
    """Rows of unequal length for a tiny model: sentences, dialogues or pictures."""
    if "vit" in model or "dino" in model:
        noise = np.random.default_rng(5).integers(0, 60, (rows, 14, 14))
        labels = np.arange(rows) % 3
        pictures = (noise + 80 * labels[:, None, None]).astype(np.uint8)
        return Table("image", pictures, labels, ("dark", "grey", "light"))
    if "llama" in model or "smol" in model:
        prompts = tuple(f"say {i % 4}{' it' * (i % 3)}" for i in range(rows))
        return Table("lm", prompts, tuple("yes " * (1 + i * i % 5) + str(i) for i in range(rows)))
    colours = ("red", "green", "blue")
    texts = tuple(f"{colours[i % 3]} {'thing ' * (i * i % 5)}{i * i}" for i in range(rows))
    return Table("classify", texts, np.arange(rows) % 3, colours)


def federation(of: Table, sizes: tuple[int, ...] = SIZES) -> Federation:
    """Clients with so many training rows each; what is left is central."""
    none = np.arange(0)
    *train, rest = np.split(np.arange(len(of)), np.cumsum(sizes))
    names = tuple(f"client {i}" for i in range(len(sizes)))
    return Federation(of, names, tuple(train), (none,) * len(sizes), (none,) * len(sizes), rest)


def trainers(
    model: str,
    method: Method | None = None,
    training: Training = TRAINING,
    sizes: tuple[int, ...] = SIZES,
    group: int | None = 4,
) -> tuple[TorchTrainer, CohortTrainer]:
    """The loop and the cohort on one model in memory, with the same start."""
    method = method or Method(rank=3, alpha=6.0, targets=LINEARS.get(model, ()))
    loop = TorchTrainer.load(Model(model), method, training, federation(table(model, sum(sizes) + 3), sizes), 3)
    cohort = CohortTrainer(
        loop.frozen, loop.bridge, loop.training, loop.federation, loop.place, loop.start(), None, group
    )
    return loop, cohort


def start_of(trainer: TorchTrainer, client: int, size: float) -> Adapter:
    """A client's own start, no tensor of which is zero, so that all have a gradient from the first step on."""
    start, rng = trainer.start(), np.random.default_rng(100 + client)
    return start.moved({n: size * rng.standard_normal(x.shape) for n, x in start.tensors().items()})


def jobs(trainer: TorchTrainer, *clients: int, trains: str = "ab", size: float = 0.1) -> list[Job]:
    """A job for each of the clients (all, if none is named), from starts that differ by numbers of this size."""
    some = clients or tuple(range(trainer.federation.clients))
    return [Job(i, 0, 7 + i, start_of(trainer, i, size), trains) for i in some]


def with_ranks(found: list[Job], *ranks: int) -> list[Job]:
    """The jobs with their starts cut to these ranks."""
    return [replace(x, start=x.start.cut(rank)) for x, rank in zip(found, ranks, strict=True)]


def with_tails(found: list[Job], *ranks: int) -> list[Job]:
    """The jobs with a frozen path of another rank each beside all layers."""

    def tail(job: Job, rank: int) -> dict[str, LowRank]:
        rng = np.random.default_rng(job.client)
        return {
            n: LowRank(
                rng.standard_normal((rank, x.a.shape[1])).astype(np.float32),
                0.1 * rng.standard_normal((x.b.shape[0], rank)).astype(np.float32),
                0.5 + job.client / 10,
            )
            for n, x in job.start.layers.items()
        }

    return [replace(x, tail=tail(x, rank)) for x, rank in zip(found, ranks, strict=True)]


def distance(x: Adapter, y: Adapter) -> float:
    """The largest difference of two numbers of two adapters, which must have the same tensors."""
    mine, other = x.tensors(), y.tensors()
    assert {n: v.shape for n, v in mine.items()} == {n: v.shape for n, v in other.items()}
    return max(float(np.abs(v - other[n]).max()) for n, v in mine.items())


def stacked(cohort: CohortTrainer, some: list[Job]) -> list[Done | Failed]:
    """The cohort's results, none of which it had from the loop, to which it turns for what it can't do."""
    assert cohort.refusal == ""
    with patch.object(TorchTrainer, "_train", side_effect=AssertionError("the loop did it")):
        return list(cohort.train_many(some))


def assert_agree(loop: TorchTrainer, cohort: CohortTrainer, some: list[Job], atol: float = 1e-5) -> None:
    """The cohort's adapters and losses are the loop's, in the same order, and something was trained."""
    apart, together = list(loop.train_many(some)), stacked(cohort, some)
    assert len(together) == len(some)
    for job, want, got in zip(some, apart, together, strict=True):
        assert isinstance(want, Done), want
        assert isinstance(got, Done), got
        assert distance(job.start, want.trained) > 30 * atol, f"client {job.client}: nothing was trained"
        assert distance(got.trained, want.trained) <= atol, f"client {job.client}"
        assert got.trained.spec == want.trained.spec
        assert abs(got.metrics.mean_loss - want.metrics.mean_loss) <= atol * max(1, want.metrics.mean_loss)
        counted = (want.metrics.units, want.metrics.examples, want.metrics.correct)
        assert (got.metrics.units, got.metrics.examples, got.metrics.correct) == counted, f"client {job.client}"


def by_client(trainer: TorchTrainer, some: list[Job]) -> dict[int, Done | Failed]:
    """Results by client; those of the cohort engine without the loop's help."""
    results = stacked(trainer, some) if isinstance(trainer, CohortTrainer) else trainer.train_many(some)
    return {job.client: result for job, result in zip(some, results, strict=True)}


def broken(job: Job, value: float = np.nan) -> Job:
    """The job with a start whose loss is not a number."""
    return replace(job, start=job.start.put({n: np.full_like(x, value) for n, x in job.start.tensors().items()}))


def sentences() -> tuple[TorchTrainer, CohortTrainer]:
    """The loop and the cohort of sentences, whose rank is 5."""
    return trainers("tiny-bert", Method(rank=5, targets=LINEARS["tiny-bert"]), SGD)
