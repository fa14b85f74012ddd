"""SmolLM2's LoRA training (rank 8, 128 tokens) in a process that may have so much memory and no more, enforced by the
kernel, beside the same job without a limit and the same in half of it, which must fail.
Run: python benchmarks/budget.py [--try]
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Literal

MB = 1_000_000
SEED = 1


@dataclass(frozen=True, slots=True)
class Case:
    """What a client runs, and how many MB it may take. recompute: activations again in the backward pass."""

    name: str
    runtime: Literal["torch", "onnx"]
    budget: int
    quantise: Literal["none", "int8", "nf4", "int4"]
    model: str = "smollm2"
    recompute: bool = False
    steps: int = 20


CASES = (
    Case("onnx-int8", "onnx", 512, "int8", recompute=True),
    Case("torch-int8", "torch", 768, "int8", recompute=True),
    Case("torch-nf4", "torch", 768, "nf4", recompute=True),
)
TRIES = (
    Case("try-torch", "torch", 2000, "int8", model="tiny-llama", steps=3),
    Case("try-onnx", "onnx", 1000, "int8", model="tiny-llama", steps=3),
)

WITHOUT = ("torch", "transformers", "peft", "onnx", "onnxscript", "accelerate", "bitsandbytes")
"""What is not installed on a device."""


@dataclass(frozen=True, slots=True)
class Result:
    """A job's figures. losses: of the client's own rows before and after, and their mean in training; peaks in MB."""

    before: float
    after: float
    training: float
    peak: float
    anonymous: float
    loading: float
    load_seconds: float
    step_seconds: float


class BudgetError(Exception):
    """A process that did not end well, with what it said last."""


def settings(case: Case) -> dict[str, object]:
    """One client's job of the case."""
    return {
        "seed": SEED,
        "model": {"name": case.model, "quantise": case.quantise},
        "data": {"name": "chitchat", "examples": 40},
        "partition": {"name": "iid", "clients": 4},
        "split": {"central": 0.0, "validation": 0.0, "test": 0.0},
        "evaluation": {"central": False},
        "simulation": {"engine": "loop"},
        "adapter": {"rank": 8, "targets": ["q_proj", "v_proj"]},
        "training": {
            "batch": 1,
            "length": 128,
            "steps": case.steps,
            "lr": 1e-3,
            "device": "cpu",
            "threads": 1,
            "checkpointing": case.recompute,
        },
    }


def kit_of_case(case: Case) -> Path:
    """The kit that a device would be sent, made here if it was not before."""
    from fedpeft.config import experiment
    from fedpeft.run.kits import kit_of
    from fedpeft.run.workshop import workshop

    return kit_of(workshop(experiment(settings(case)).settings_json), case.quantise).folder


def without_torch(folder: Path) -> Path:
    """A folder with links to all packages that are installed here but those that a device has not: for ``run``."""
    folder.mkdir()
    for path in (Path(x) for x in sys.path if Path(x).name == "site-packages"):
        for package in path.iterdir():
            if package.name.partition("-")[0] not in WITHOUT and not (folder / package.name).exists():
                (folder / package.name).symlink_to(package)
    return folder


def run(case: Case, limit: int | None, kit: Path | None = None, packages: Path | None = None) -> Result:
    """The case in a process of its own. limit: MB of private memory that the kernel lets it have; None for no limit;
    kit: what a client on onnxruntime trains from; packages: all that is installed for it (unset: as here).

    BudgetError if it fails.
    """
    surroundings = {n: x for n, x in os.environ.items() if not n.startswith("MALLOC_")}
    surroundings["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable]
    if packages is not None:
        surroundings["PYTHONPATH"] += f":{packages}"
        command += ["-S"]
    command += [__file__, "child", json.dumps(asdict(case)), str(limit or 0), str(kit or "")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=900.0,
        env=surroundings | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise BudgetError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def child(case: Case, limit: int, kit: str) -> Result:
    """The job in this process, within the limit from the first import on."""
    if case.runtime == "onnx":
        assert find_spec("torch") is None, "torch is installed"
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit * MB, limit * MB))
    from fedpeft.training.environment import prepare, sparing

    prepare(threads=1)
    sparing()
    from status import status

    from fedpeft.config import experiment
    from fedpeft.rounds import Done, Job, Metrics, Trial
    from fedpeft.run import participant

    began = process_time()
    node = {"partition-id": 0} | ({"runtime": "onnx", "kit": kit} if case.runtime == "onnx" else {})
    trainer = participant(experiment(settings(case)).settings_json, node).trainer
    start = trainer.start()
    loaded, loading = process_time() - began, status("VmHWM")

    def loss(adapter: object) -> float:
        (metrics,) = trainer.evaluate_many([Trial(0, "train", adapter)])  # type: ignore[arg-type]
        assert isinstance(metrics, Metrics), metrics
        return metrics.mean_loss

    before = loss(start)
    began = process_time()
    (done,) = trainer.train_many([Job(0, 0, SEED, start)])
    if not isinstance(done, Done):
        raise SystemExit(done.reason)
    seconds = (process_time() - began) / case.steps
    return Result(
        before,
        loss(done.trained),
        done.metrics.mean_loss,
        status("VmHWM"),
        status("RssAnon"),
        loading,
        loaded,
        seconds,
    )


def measured(case: Case, device: Path) -> dict[str, object]:
    """A row: the figures within the budget, those of the same job without a limit, and what half the budget says.

    device: the packages of a device without torch.
    """
    kit, packages = (kit_of_case(case), device) if case.runtime == "onnx" else (None, None)
    run(case, None, kit, packages)  # so that the packed base is there
    free = run(case, None, kit, packages)
    whole = run(replace(case, runtime="torch", quantise="none", recompute=False), None)
    within = run(case, case.budget, kit, packages)
    try:
        run(case, case.budget // 2, kit, packages)
        half = "it trains"
    except BudgetError as error:
        half = str(error).replace(f"{kit}/", "")[:160]
    return {
        "runtime": case.runtime,
        "base": case.quantise,
        "activations": "computed again" if case.recompute else "kept",
        "budget MB": case.budget,
        "peak MB": within.peak,
        "of it private, at the end": within.anonymous,
        "loss before": within.before,
        "loss after": within.after,
        "the same without a limit": free.after,
        "fp32 without a limit": whole.after,
        "its peak MB": whole.peak,
        "processor s to load": within.load_seconds,
        "processor s a step": within.step_seconds,
        "in half the budget": half,
    }


def main(cases: tuple[Case, ...]) -> None:
    """A row for each case."""
    with TemporaryDirectory() as scratch:
        device = without_torch(Path(scratch) / "packages")
        rows = [measured(case, device) for case in cases]
    if cases == CASES:
        from measure import save

        save("budget", rows)
    else:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main(CASES)
        case ["--try"]:
            main(TRIES)
        case ["child", which, most, where]:
            print(json.dumps(asdict(child(Case(**json.loads(which)), int(most), where))))
        case _:
            raise SystemExit("usage: python benchmarks/budget.py [--try]")
