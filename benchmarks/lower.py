"""A step on a model's top quarter, with what its lower layers make of texts kept and without, and on all of its layers.
Run: python benchmarks/lower.py [--try]
"""

import json
import sys
from dataclasses import replace
from statistics import median
from time import process_time
from typing import Any

from measure import save

from fedpeft.config import experiment
from fedpeft.rounds import Done, Job
from fedpeft.run.workshop import workshop
from fedpeft.training.loop import TorchTrainer

SEED, ROWS, EPOCHS = 1, 32, 3
BATCH, LENGTH = 4, 128
MODELS = {"smollm2": ("chitchat", 30), "tiny-llama": ("chitchat", 2)}


def trainer(model: str, layers: int) -> TorchTrainer:
    """One client with ``ROWS`` texts, and an adapter on so many top layers."""
    found = experiment(
        {
            "seed": SEED,
            "model": {"name": model},
            "data": {"name": MODELS[model][0], "examples": 4 * ROWS},
            "partition": {"name": "iid", "clients": 4},
            "split": {"central": 0.0, "validation": 0.0, "test": 0.0},
            "evaluation": {"central": False},
            "simulation": {"engine": "loop"},
            "adapter": {"rank": 8, "layers": layers, "targets": ["q_proj", "v_proj"]},
            "training": {"batch": BATCH, "length": LENGTH, "device": "cpu", "precision": "fp32", "threads": 1},
        }
    )
    made: TorchTrainer = workshop(found.settings_json).trainer
    return made


def timed(way: str, engine: TorchTrainer) -> dict[str, Any]:
    """Seconds of the processor that a step takes in the first epoch, and in the median one of those after it."""
    start, times = engine.start(), []
    steps = -(-len(engine.rows(0, "train")) // BATCH)
    for epoch in range(EPOCHS):
        began = process_time()
        (done,) = engine.train_many([Job(0, 0, epoch, start)])
        times.append((process_time() - began) / steps)
        assert isinstance(done, Done), done
    lower = engine.frozen.lower
    return {
        "way": way,
        "s a step, first epoch": times[0],
        "s a step, later": median(times[1:]),
        "kept MB": 0.0 if lower is None else lower.kept.size / 1e6,
        "mean loss": done.metrics.mean_loss,
    }


def main(model: str) -> list[dict[str, Any]]:
    """A row for each way; the first is warmed up with an epoch."""
    layers = MODELS[model][1]
    whole = trainer(model, layers)
    list(whole.train_many([Job(0, 0, SEED, whole.start())]))
    rows = [timed("all layers", whole)]
    top = trainer(model, max(1, layers // 4))
    rows.append(timed(f"the top {max(1, layers // 4)}", top))
    for kind in ("fp32", "bf16"):
        keeping = top.over(top.federation, replace(top.training, lower=kind))
        rows.append(timed(f"the same, lower ones kept in {kind}", keeping))
    first = rows[0]["s a step, later"]
    return [{"model": model, **x, "ratio of time to all layers": x["s a step, later"] / first} for x in rows]


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            save("lower", main("smollm2"))
        case ["--try"]:
            print(json.dumps(main("tiny-llama"), indent=1))
        case _:
            raise SystemExit("usage: python benchmarks/lower.py [--try]")
