"""Made-up runs of realistic numbers, written by the same public writer as real ones."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fedpeft.report import (
    BaselineRecord,
    ClientData,
    FinalRecord,
    RoundRecord,
    RunFolder,
    RunRecord,
    Score,
    Scores,
)

TOPICS = (
    "People Geography History Arts Philosophy+and+religion Everyday+life Society Biology Physics Technology Mathematics"
)
SIZES = np.array([0.20, 0.12, 0.07, 0.07, 0.05, 0.05, 0.10, 0.15, 0.12, 0.04, 0.03])


@dataclass(frozen=True)
class Made:
    """What a made-up run is like. top: the accuracy it tends to; rounds_recorded: fewer, for one that was killed."""

    clients: int = 20
    rounds: int = 10
    fraction: float = 0.5
    seed: int = 1
    name: str = "wiki11"
    rule: str = "fedit"
    lr: float = 2e-3
    alpha: float = 0.3
    top: float = 0.82
    task: str = "classify"
    rounds_recorded: int | None = None
    baselines: bool = True
    refusals: bool = True


def settings(made: Made) -> dict[str, object]:
    return {
        "name": made.name,
        "seed": made.seed,
        "rounds": made.rounds,
        "model": {"name": "smollm2" if made.task == "lm" else "minilm"},
        "data": {"name": "chitchat" if made.task == "lm" else "wiki11", "examples": 2000},
        "partition": {"name": "dirichlet", "clients": made.clients, "alpha": made.alpha},
        "adapter": {"method": "lora", "rank": 8, "alpha": 16, "targets": ["query", "value"]},
        "training": {"optimiser": "adamw", "lr": made.lr, "batch": 16, "epochs": 1, "length": 48},
        "rule": {"name": made.rule},
        "server": {"name": "averaging", "lr": 1.0},
        "weighting": {"name": "examples", "cap": 100_000},
        "channel": {"name": "plain", "clip": None, "largest_norm": 1e4},
        "selection": {"fraction": made.fraction, "quorum": 0.5, "deadline": 3600.0},
    }


def population(made: Made, rng: np.random.Generator) -> dict[int, ClientData]:
    """Clients with Dirichlet label skew and log-normal sizes; no labels for a language model."""
    sizes = np.maximum(4, rng.lognormal(0, 0.6, made.clients) * 1600 / made.clients).astype(int)
    if made.task == "lm":
        return {n: ClientData(int(sizes[n])) for n in range(made.clients)}
    topics = [x.replace("+", " ") for x in TOPICS.split()]
    shares = rng.dirichlet(SIZES * made.alpha * 11, made.clients)
    counts = [rng.multinomial(sizes[n], shares[n]) for n in range(made.clients)]
    return {
        n: ClientData(int(sizes[n]), {t: int(c) for t, c in zip(topics, counts[n], strict=True) if c})
        for n in range(made.clients)
    }


def write(path: Path, made: Made) -> RunFolder:
    """A run with these facts, complete unless ``rounds_recorded`` says otherwise."""
    rng = np.random.default_rng(made.seed)
    folder = RunFolder.create(path, f'name = "{made.name}"\nseed = {made.seed}\n')
    people = population(made, rng)
    lm = made.task == "lm"
    low, high = (0.31, 0.31 + made.top / 6) if lm else (0.098, made.top)
    skill = rng.normal(0, 0.07, made.clients)  # how easy a client's own rows are
    losses = (lambda x: 5.2 - 5.2 * x) if lm else (lambda x: 0.25 + 2.4 * (1 - x))

    def score(mean: float, client: int) -> Score:
        accuracy = float(np.clip(mean + skill[client] + rng.normal(0, 0.03), 0.02, 0.99))
        return Score(losses(accuracy) + rng.normal(0, 0.02), accuracy, max(2, people[client].examples // 8))

    def central(mean: float) -> Score:
        return Score(losses(mean) + rng.normal(0, 0.015), float(np.clip(mean + rng.normal(0, 0.006), 0, 1)), 400)

    def everyone(mean: float) -> Scores:
        each = {n: score(mean, n) for n in people}
        accuracy = np.average(
            [x.accuracy or 0 for x in each.values()], weights=[x.examples or 1 for x in each.values()]
        )
        loss = np.average([x.loss or 0 for x in each.values()], weights=[x.examples or 1 for x in each.values()])
        return Scores(float(loss), float(accuracy), each)

    folder.append(
        RunRecord(
            name=made.name,
            settings=settings(made),
            versions={"fedpeft": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "peft": "0.21.2", "numpy": "2.4.6"},
            clients=people,
            bytes_per_round=2 * 4 * 295_691,
            task=made.task,
            started=1.79e9,
        )
    )
    if made.baselines:
        folder.append(BaselineRecord("base", central(low), {n: score(low, n) for n in people}, 3.1))
    asked = max(1, round(made.fraction * made.clients))
    clock = 0.0
    for t in range(1, (made.rounds if made.rounds_recorded is None else made.rounds_recorded) + 1):
        mean = low + (high - low) * (1 - np.exp(-3.2 * t / made.rounds)) / (1 - np.exp(-3.2))
        cohort = tuple(sorted(int(x) for x in rng.choice(made.clients, asked, replace=False)))
        lost = {cohort[0]: "no answer before the deadline"} if made.refusals and t == 4 and asked > 1 else {}
        if made.refusals and t == 7 and asked > 2:
            lost = {cohort[2]: "the update holds NaN or infinity"}
        at, bars = 0.2, []
        for client in cohort:
            seconds = float(people[client].examples * 0.012 + rng.uniform(0.02, 0.08))
            bars.append((client, round(at, 3), round(at + seconds, 3)))
            at += seconds
        folder.append(
            RoundRecord(
                round=t,
                asked=cohort,
                survivors=tuple(c for c in cohort if c not in lost),
                refused=tuple(lost.items()),
                train=Score(losses(mean) * 0.9, min(1.0, mean * 1.03)),
                validation=everyone(mean),
                central=central(mean),
                bytes_up=(asked - len(lost)) * 4 * 295_691,
                bytes_down=asked * 4 * 295_691,
                seconds=at + 1.4,
                seconds_training=at - 0.2,
                timeline=tuple(bars),
                started=1.79e9 + clock,
            )
        )
        clock += at + 1.4
    if made.baselines:
        alone = low + (high - low) * 0.52
        folder.append(BaselineRecord("local", central(alone - 0.08), {n: score(alone, n) for n in people}, 41.0))
        folder.append(
            BaselineRecord("central-training", central(high + 0.03), {n: score(high, n) for n in people}, 38.0)
        )
    if made.rounds_recorded is None:
        sent = made.rounds * asked * 4 * 295_691
        folder.append(
            FinalRecord(made.rounds, central(high), everyone(high), clock + 6, "5f0c" * 16, sent - 4 * 295_691, sent)
        )
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., RunFolder]:
    """Writes a made-up run into a new folder: ``run(clients=3, rounds=1)``."""
    count = iter(range(1000))

    def make(**facts: object) -> RunFolder:
        return write(tmp_path / f"run-{next(count)}", Made(**facts))

    return make
