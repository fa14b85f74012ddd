"""A client's step in torch and in onnxruntime, on a frozen base in fp32, bf16, int8, nf4 and int4: time, gradients,
loss and memory, each in a process of its own.  Run: python benchmarks/device.py [--try]
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time
from typing import TYPE_CHECKING, Any

import numpy as np
from measure import save
from status import status

from fedpeft.config import Experiment, experiment
from fedpeft.data import Encoded, Rows, padded
from fedpeft.rounds import Done, Job, Metrics, Trial
from fedpeft.run import participant
from fedpeft.run.kits import kit_of
from fedpeft.run.workshop import workshop
from fedpeft.training.kit import BASE, STEP

if TYPE_CHECKING:
    from fedpeft.ondevice.trainer import OnnxTrainer
    from fedpeft.training.loop import TorchTrainer

WAYS = {
    "fp32": ("none", "fp32"),
    "bf16": ("none", "bf16"),
    "int8": ("int8", "fp32"),
    "nf4": ("nf4", "fp32"),
    "int4": ("int4", "fp32"),
    "onnx fp32": ("none", "fp32"),
    "onnx int8": ("int8", "fp32"),
    "onnx nf4": ("nf4", "fp32"),
    "onnx int4": ("int4", "fp32"),
}
"""What the base is held in, and the precision of its arithmetic; in torch, but where it says onnx."""

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


def described(case: Case, way: str) -> Experiment:
    """One client of the case, on one thread."""
    quantise, precision = WAYS[way]
    return experiment(
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


def trainer(case: Case, way: str, kit: str) -> "TorchTrainer | OnnxTrainer":
    """What trains it, and imports nothing that a client of its kind does not."""
    found = described(case, way)
    node = {"partition-id": 0} | ({"runtime": "onnx", "kit": kit} if kit else {})
    made: Any = participant(found.settings_json, node).trainer
    return made


def slopes(engine: "TorchTrainer | OnnxTrainer") -> dict[str, np.ndarray]:
    """The adapter's gradients on the client's first rows, near its start."""
    rows = engine.rows(0, "train")
    some = np.arange(min(8, len(rows)))
    from fedpeft.training.batches import collate
    from fedpeft.training.fidelity import _CHANGE, gradients

    if hasattr(engine, "kit"):
        return device_slopes(engine, rows, some, _CHANGE)
    engine.bridge.write(engine.start())
    batch = collate(rows, some, engine.frozen, engine.training.image_size, engine.place.device)
    found = gradients(engine.frozen, engine.bridge, batch, engine.place)
    return {n: x.cpu().numpy() for n, x in found.items()}


def device_slopes(engine: "OnnxTrainer", rows: Encoded, some: Rows, change: float) -> dict[str, np.ndarray]:
    """The same, from the graph: at the point where ``fidelity.gradients`` takes them."""
    start, rng = engine.start(), np.random.default_rng(0)
    near = start.moved({n: change * rng.standard_normal(x.shape) for n, x in start.tensors().items()})
    batch = padded(rows.store, rows.index[some], engine.kit.facts.pad, engine.kit.facts.task == "lm")
    names = list(near.tensors())
    feeds = {n: x.astype(np.float32) for n, x in near.tensors().items()}
    losses, *found = engine.graph(STEP).run(batch, feeds, ["losses", *(f"grad/{n}" for n in names)])
    return {n: x / len(losses) for n, x in zip(names, found, strict=True)}


def loss(engine: "TorchTrainer | OnnxTrainer", adapter: Any) -> float:
    """On the client's own rows."""
    (metrics,) = engine.evaluate_many([Trial(0, "train", adapter)])
    assert isinstance(metrics, Metrics), metrics
    return metrics.mean_loss


def child(name: str, way: str, out: str, kit: str) -> dict[str, float]:
    """All figures of one way in this process; the gradients go into a file."""
    from dataclasses import replace

    case = CASES[name]
    engine = trainer(case, way, kit)
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
    np.savez(out, **{n.replace("/", "|"): x for n, x in slopes(engine).items()})
    return {
        "base MB": held(engine) / 1e6,
        "processor s a step": median(times[1:]),
        "loss before": loss(engine, start),
        "loss after": loss(engine, trained.trained),
        "peak MB loading": loading,
        "resident MB loaded": before,
        "peak MB training": peak,
    }


def held(engine: "TorchTrainer | OnnxTrainer") -> int:
    """Bytes of the frozen base and the adapter."""
    if hasattr(engine, "kit"):
        return engine.kit.path(BASE).stat().st_size + sum(x.nbytes for x in engine.start().tensors().values())
    model = engine.bridge.model
    return sum({x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}.values())


def off(file: Path, reference: Path) -> float:
    """The largest difference between two files' gradients, as a share of the largest gradient."""
    x, y = np.load(file), np.load(reference)
    return float(max(abs(x[n] - y[n]).max() for n in y.files) / max(abs(y[n]).max() for n in y.files))


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
                here = workshop(described(CASES[name], way).settings_json)
                kit = str(kit_of(here, here.found.model.quantise).folder) if way.startswith("onnx") else ""
                command = [sys.executable, __file__, name, way, str(out), kit]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{name} in {way}: {done.stderr}")
                found = json.loads(done.stdout.splitlines()[-1])
                first = first or found
                ratio = found["processor s a step"] / first["processor s a step"]
                row = {"model": CASES[name].model, "base": way, **found, "ratio of time to fp32": ratio}
                row["gradient cosine"] = cosine(out, Path(scratch) / f"{name}-fp32.npz")
                if way.startswith("onnx"):
                    row["off from torch"] = off(out, Path(scratch) / f"{name}-{way.removeprefix('onnx ')}.npz")
                rows.append(row)
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
        case [name, way, out, kit]:
            print(json.dumps(child(name, way, out, kit)))
        case _:
            raise SystemExit("usage: python benchmarks/device.py [--try]")
