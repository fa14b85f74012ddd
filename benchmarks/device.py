"""A client's step on a frozen base in fp32, bf16, int8, nf4 and int4: time, gradients, loss and memory, each in a
process of its own.  Run: python benchmarks/device.py [--try]
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np
from measure import save

from fedpeft.config import experiment
from fedpeft.rounds import Done, Job, Metrics, Trial
from fedpeft.run.node import workshop
from fedpeft.training.fidelity import gradients
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.memory import estimate

WAYS = {
    "fp32": ("none", "fp32"),
    "bf16": ("none", "bf16"),
    "int8": ("int8", "fp32"),
    "nf4": ("nf4", "fp32"),
    "int4": ("int4", "fp32"),
}
"""What the base is held in, and the precision of its arithmetic."""

SEED, TIMED = 1, 5


@dataclass(frozen=True, slots=True)
class Case:
    """A model and a client with so many rows of at most ``length`` tokens, who trains for ``steps`` steps."""

    model: str
    data: str
    targets: tuple[str, ...]
    batch: int
    length: int
    steps: int


CASES = {
    "minilm": Case("minilm", "wiki11", ("query", "value"), 8, 64, 20),
    "smollm2": Case("smollm2", "chitchat", ("q_proj", "v_proj"), 1, 128, 20),
    "tiny-bert": Case("tiny-bert", "wiki11", ("query", "value"), 4, 16, 3),
    "tiny-llama": Case("tiny-llama", "chitchat", ("q_proj", "v_proj"), 2, 48, 3),
}
REAL, TINY = ("minilm", "smollm2"), ("tiny-bert", "tiny-llama")


def trainer(case: Case, way: str) -> TorchTrainer:
    """One client of the case, on one thread."""
    quantise, precision = WAYS[way]
    found = experiment(
        {
            "seed": SEED,
            "model": {"name": case.model, "quantise": quantise},
            "data": {"name": case.data, "examples": 200},
            "partition": {"name": "iid", "clients": 4},
            "split": {"central": 0.0, "validation": 0.0, "test": 0.0},
            "evaluation": {"central": False},
            "simulation": {"engine": "loop"},
            "adapter": {"rank": 8, "targets": list(case.targets)},
            "training": {
                "batch": case.batch,
                "length": case.length,
                "steps": case.steps,
                "lr": 1e-3,
                "precision": precision,
                "device": "cpu",
                "threads": 1,
            },
        }
    )
    return workshop(found.settings_json).trainer


def status(name: str) -> float:
    """A figure of /proc/self/status, in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024 / 1e6


def slopes(engine: TorchTrainer) -> dict[str, np.ndarray]:
    """The adapter's gradients on the client's first rows."""
    from fedpeft.training.batches import collate

    rows = engine.rows(0, "train")
    batch = collate(rows, np.arange(min(8, len(rows))), engine.frozen, engine.training.image_size, engine.place.device)
    found = gradients(engine.frozen, engine.bridge, batch, engine.place)
    return {n: x.cpu().numpy() for n, x in found.items()}


def loss(engine: TorchTrainer, adapter: Any) -> float:
    """On the client's own rows."""
    (metrics,) = engine.evaluate_many([Trial(0, "train", adapter)])
    assert isinstance(metrics, Metrics), metrics
    return metrics.mean_loss


def child(name: str, way: str, out: str) -> dict[str, float]:
    """All figures of one way in this process; the gradients go into a file."""
    from dataclasses import replace

    case = CASES[name]
    engine = trainer(case, way)
    loading = status("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, start = status("VmRSS"), engine.start()
    one = engine.over(engine.federation, replace(engine.training, steps=1))
    times = []
    for number in range(TIMED + 1):
        began = process_time()
        (done,) = one.train_many([Job(0, 0, number, start)])
        times.append(process_time() - began)
        assert isinstance(done, Done), done
    (trained,) = engine.train_many([Job(0, 0, SEED, start)])
    assert isinstance(trained, Done), trained
    peak = status("VmHWM")
    model, base = engine.bridge.model, engine.frozen
    held = {x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}
    np.savez(out, **{n.replace("/", "|"): x for n, x in slopes(engine).items()})
    return {
        "model MB": sum(held.values()) / 1e6,
        "processor s a step": median(times[1:]),
        "loss before": loss(engine, start),
        "loss after": loss(engine, trained.trained),
        "peak MB loading": loading,
        "resident MB loaded": before,
        "peak MB training": peak,
        "foretold MB": estimate(base.model.config, base.parameters, start.spec, engine.training, base.quantise) / 1e6,
    }


def cosine(file: Path, reference: Path) -> float:
    """The mean over tensors of the cosine of two files' gradients."""
    x, y = np.load(file), np.load(reference)
    each = [float(np.vdot(x[n], y[n]) / max(np.linalg.norm(x[n]) * np.linalg.norm(y[n]), 1e-30)) for n in y.files]
    return float(np.mean(each))


def main(cases: tuple[str, ...]) -> None:
    """A row for each model and way, with the cosine of its gradients with those in fp32."""
    rows = []
    with TemporaryDirectory() as scratch:
        for name in cases:
            first: dict[str, float] = {}
            for way in WAYS:
                out = Path(scratch) / f"{name}-{way}.npz"
                command = [sys.executable, __file__, name, way, str(out)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{name} in {way}: {done.stderr}")
                found = json.loads(done.stdout.splitlines()[-1])
                first = first or found
                ratio = found["processor s a step"] / first["processor s a step"]
                row = {"model": CASES[name].model, "base": way, **found, "ratio of time to fp32": ratio}
                rows.append(row | {"gradient cosine": cosine(out, Path(scratch) / f"{name}-fp32.npz")})
    if cases == REAL:
        save("device", rows)
    else:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main(REAL)
        case ["--try"]:
            main(TINY)
        case [name, way, out]:
            print(json.dumps(child(name, way, out)))
        case _:
            raise SystemExit("usage: python benchmarks/device.py [--try]")
