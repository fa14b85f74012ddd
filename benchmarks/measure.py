"""What the benchmarks share: an experiment in this process, the machine's description, results as JSON."""

import json
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from fedpeft.training.environment import cores, prepare

prepare()

from fedpeft.adapters import Adapter  # noqa: E402  # after the thread settings
from fedpeft.flower import Participant  # noqa: E402
from fedpeft.rounds import Done, Failed, Job, Metrics, Trainer, Trial  # noqa: E402

HERE = Path(__file__).parent
Rows = Sequence[Mapping[str, Any]]


@dataclass(slots=True)
class Timed:
    """A trainer, and the seconds spent inside it: of the clock, and of the processor in this process."""

    inner: Trainer
    seconds: float = field(default=0.0)
    busy: float = field(default=0.0)

    @property
    def base(self) -> str:
        return self.inner.base

    def start(self) -> Adapter:
        return self.inner.start()

    def train_many(self, jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        results = self.inner.train_many(jobs)
        for _ in jobs:
            began, worked = perf_counter(), process_time()
            result = next(results)
            self.seconds += perf_counter() - began
            self.busy += process_time() - worked
            yield result

    def evaluate_many(self, trials: Sequence[Trial]) -> Iterator[Metrics | Failed]:
        return self.inner.evaluate_many(trials)


def timed(participant: Participant) -> tuple[Participant, Timed]:
    """The participant with a clock in its trainer."""
    clock = Timed(participant.trainer)
    return replace(participant, trainer=clock), clock


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    return {
        "processor": model,
        "cores": cores(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "flwr", "numpy")},
        "commit": commit.stdout.strip(),
    }


def save(name: str, rows: Rows, more: Mapping[str, Rows] | None = None) -> None:
    """Print the rows, and keep them as results/NAME.json, from which ``tables.py`` makes the tables of README.md.

    more: further tables, by name.
    """
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    found = {"machine": machine(), "command": f"python benchmarks/{name}.py", "rows": list(rows)} | dict(more or {})
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
