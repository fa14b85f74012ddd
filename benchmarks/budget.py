"""SmolLM2's LoRA training (rank 8, 128 tokens) in a process that may have so much memory and no more, enforced by the
kernel, beside the same job without a limit and the same in half of it, which must fail.
Run: python benchmarks/budget.py [--try]
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
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
    Case("torch-int8", "torch", 768, "int8", recompute=True),
    Case("torch-nf4", "torch", 768, "nf4", recompute=True),
)
TRIES = (Case("try-torch", "torch", 2000, "int8", model="tiny-llama", steps=3),)


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


def run(case: Case, limit: int | None, timeout: float = 900.0) -> Result:
    """The case in a process of its own. limit: MB of private memory that the kernel lets it have; None for no limit.

    BudgetError if it fails.
    """
    surroundings = {n: x for n, x in os.environ.items() if not n.startswith("MALLOC_")}
    command = [sys.executable, __file__, "child", json.dumps(asdict(case)), str(limit or 0)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env=surroundings | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise BudgetError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def status(name: str) -> float:
    """A figure of /proc/self/status, in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024 / MB


def child(case: Case, limit: int) -> Result:
    """The job in this process, within the limit from the first import on."""
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit * MB, limit * MB))
    from fedpeft.training.environment import prepare, sparing

    prepare(threads=1)
    sparing()
    from fedpeft.config import experiment
    from fedpeft.rounds import Done, Job, Metrics, Trial
    from fedpeft.run import participant

    began = process_time()
    trainer = participant(experiment(settings(case)).settings_json, {"partition-id": 0}).trainer
    start = trainer.start()
    loaded, loading = process_time() - began, status("VmHWM")

    def loss(adapter: object) -> float:
        (metrics,) = trainer.evaluate_many([Trial(0, "train", adapter)])  # type: ignore[arg-type]
        assert isinstance(metrics, Metrics), metrics
        return metrics.mean_loss

    before = loss(start)
    began = process_time()
    (done,) = trainer.train_many([Job(0, 0, SEED, start)])
    assert isinstance(done, Done), done
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


def measured(case: Case) -> dict[str, object]:
    """A row: the figures within the budget, those of the same job without a limit, and what half the budget says."""
    run(case, None)  # so that the packed base is there
    free = run(case, None)
    whole = run(replace(case, quantise="none", recompute=False), None)
    within = run(case, case.budget)
    try:
        run(case, case.budget // 2)
        half = "it trains"
    except BudgetError as error:
        half = str(error)[:100]
    return {
        "runtime": case.runtime,
        "base": case.quantise,
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
    rows = [measured(case) for case in cases]
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
        case ["child", which, most]:
            print(json.dumps(asdict(child(Case(**json.loads(which)), int(most)))))
        case _:
            raise SystemExit("usage: python benchmarks/budget.py [--try]")
