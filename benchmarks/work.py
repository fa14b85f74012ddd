"""The work that all ways of training are given: 16 clients with the same number of rows each, and their order."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from fedpeft.config import experiment
from fedpeft.data import Federation
from fedpeft.rounds import Job, derive
from fedpeft.run.workshop import workshop
from fedpeft.training.cohort import CohortTrainer
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.passes import groups

CLIENTS = 16
SEED = 1
RANK, ALPHA, LR, CLIP = 8, 16, 1e-3, 1.0


@dataclass(frozen=True, slots=True)
class Case:
    """A model, its data, and each client's share: ``steps`` batches of ``batch`` rows of at most ``length`` tokens."""

    model: str
    data: str
    targets: tuple[str, ...]
    batch: int
    length: int
    steps: int

    @property
    def rows(self) -> int:
        """Of each client."""
        return self.batch * self.steps


CASES = {
    "minilm-8x32": Case("minilm", "wiki11", ("query", "value"), 8, 32, 4),
    "minilm-16x64": Case("minilm", "wiki11", ("query", "value"), 16, 64, 1),
    "smollm2-4x128": Case("smollm2", "chitchat", ("q_proj", "v_proj"), 4, 128, 1),
    "tiny": Case("tiny-bert", "wiki11", ("query", "value"), 4, 16, 2),
}
"""By name; "tiny" is for trying the scripts out, and is in no table. Steps are as many as a few minutes allow."""


def trainer(case: Case, precision: str) -> CohortTrainer:
    """The cohort engine with this work; ``alone`` gives the loop on the same model."""
    found = experiment(
        {
            "seed": SEED,
            "model": {"name": case.model},
            "data": {"name": case.data, "examples": CLIENTS * (case.rows + case.rows // 8 + 8)},
            "partition": {"name": "iid", "clients": CLIENTS},
            "split": {"central": 0.0, "validation": 0.0, "test": 0.0},
            "evaluation": {"central": False},
            "adapter": {"method": "lora", "rank": RANK, "alpha": ALPHA, "targets": list(case.targets)},
            "training": {
                "batch": case.batch,
                "length": case.length,
                "lr": LR,
                "clip": CLIP,
                "epochs": 1,
                "precision": precision,
            },
        }
    )
    whole = workshop(found.settings_json).trainer
    assert isinstance(whole, CohortTrainer)
    shares = tuple(np.sort(whole.rows(client, "train").index[: case.rows]) for client in range(CLIENTS))
    assert all(len(x) == case.rows for x in shares), "a client has too few rows; raise data.examples"
    none = (np.zeros(0, np.int64),) * CLIENTS
    names = tuple(str(i) for i in range(CLIENTS))
    same = Federation(whole.federation.table, names, shares, none, none, none[0])
    return whole.over(same, whole.training)


def alone(whole: CohortTrainer) -> TorchTrainer:
    """The loop over clients on the model of a cohort trainer."""
    start = whole.start()
    return TorchTrainer(whole.frozen, whole.bridge, whole.training, whole.federation, whole.place, start, whole.store)


def jobs(whole: TorchTrainer) -> Sequence[Job]:
    """Each client's job: one epoch of its rows from the same start."""
    return [Job(client, 0, derive(SEED, "train", 0, client), whole.start()) for client in range(CLIENTS)]


def batches(whole: TorchTrainer, job: Job) -> list[list[int]]:
    """The rows of each of a job's steps, as the engines take them."""
    plan = groups(whole.rows(job.client, "train"), whole.training, np.random.default_rng(job.seed))
    return [batch.tolist() for group in plan for batch in group]


def write(case: Case, folder: Path) -> None:
    """What a way without this library needs, as files: rows as tokens, the order of the first pass, the start."""
    from peft import get_peft_model_state_dict

    whole = trainer(case, "fp32")
    base = whole.frozen
    clients = []
    for job in jobs(whole):
        mine = whole.rows(job.client, "train")
        ids = [mine.store.row(i).tolist() for i in mine.index.tolist()]
        clients.append({"ids": ids, "targets": mine.targets.tolist(), "plan": batches(whole, job)})
    whole.bridge.write(whole.start())  # this model may have been trained in this process
    state = {name: x.contiguous() for name, x in get_peft_model_state_dict(whole.bridge.model).items()}
    save_file(state, folder / "start.safetensors")
    facts = {
        **asdict(case),
        "folder": base.origin,
        "task": base.task,
        "classes": len(base.classes),
        "pad": base.words.pad_token_id,
        "rank": RANK,
        "alpha": ALPHA,
        "lr": LR,
        "clip": CLIP,
        "clients": clients,
    }
    (folder / "work.json").write_text(json.dumps(facts), encoding="utf8")
