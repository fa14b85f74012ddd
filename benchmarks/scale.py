"""A run's cost against the number of its clients, up to a million with 100 a round.  Run: python benchmarks/scale.py"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import matplotlib
from measure import HERE, save, timed

from fedpeft.config import experiment
from fedpeft.flower import in_process
from fedpeft.report import RoundRecord, RunFolder, history
from fedpeft.run import Lines, participant
from fedpeft.run.coordinate import Coordinator

SIZES = (10, 100, 1_000, 10_000, 1_000_000)
ROUNDS, COHORT = 3, 100


class Silent(Lines):
    """A view that says nothing."""

    def note(self, text: str) -> None:
        pass

    def round(self, record: RoundRecord, rounds: int) -> None:
        pass


def settings(clients: int) -> dict[str, object]:
    """Eight rows to train on a client, of 16 tokens at most; personal parts, so that clients have state to keep."""
    return {
        "rounds": ROUNDS,
        "model": {"name": "minilm"},
        "data": {"name": "wiki11", "examples": 4000},
        "partition": {"name": "sampled", "clients": clients, "size": 10, "alpha": 3.0},
        "adapter": {"rank": 8, "targets": ["query", "value"]},
        "rule": {"name": "fedsa"},
        "training": {"batch": 8, "length": 16},
        "simulation": {"group": 16},
        "selection": {"count": COHORT, "deadline": 1e9},
        "evaluation": {"clients": False, "central": False},
        "baselines": {"base": False},
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one_run(clients: int, path: Path) -> dict[str, Any]:
    """A whole run in this process, without its report."""
    found = experiment(settings(clients))
    folder = RunFolder.create(path, "")
    began = perf_counter()
    working, clock = timed(participant(found.settings_json, {"partition-id": 0, "state": str(path / "clients")}))
    working.examples(0)
    loaded, ready, worked = peak_bytes(), perf_counter(), process_time()
    Coordinator(found, folder, Silent()).run(in_process(lambda s, c: working, clients), clients)
    total, busy = perf_counter() - ready, process_time() - worked - clock.busy
    rounds = history(path).rounds
    visits = sum(len(x.survivors) for x in rounds)
    training = sum(x.seconds_training or 0.0 for x in rounds)
    return {
        "registered": clients,
        "in each round": min(COHORT, clients),
        "client-rounds": visits,
        "seconds a client-round": training / visits,
        "of these not training, ms": 1e3 * (training - clock.seconds) / visits,
        "processor ms not training": 1e3 * busy / visits,
        "seconds to load": ready - began,
        "seconds of all rounds": total,
        "MB, base loaded": loaded / 1e6,
        "MB, at the peak": peak_bytes() / 1e6,
        "disk, MB": sum(x.stat().st_size for x in path.rglob("*") if x.is_file()) / 1e6,
        "of these the registry, MB": (path / "fleet.sqlite").stat().st_size / 1e6,
    }


def draw(rows: list[dict[str, Any]]) -> None:
    """All sizes on one curve: time, memory and disk."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [x["registered"] for x in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for key, label, scale in (
        ("seconds a client-round", "client-round", 1e3),
        ("of these not training, ms", "of these not training", 1.0),
        ("processor ms not training", "processor time, not training", 1.0),
    ):
        left.plot(sizes, [scale * x[key] for x in rows], marker="o", label=label)
    for key, label in (
        ("MB, at the peak", "peak memory"),
        ("MB, base loaded", "of these with the base loaded"),
        ("disk, MB", f"disk after {ROUNDS} rounds"),
    ):
        right.plot(sizes, [x[key] for x in rows], marker="o", label=label)
    for axes, title in ((left, "milliseconds"), (right, "MB")):
        axes.set(xscale="log", title=title, xlabel="registered clients, 100 at most in a round")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(HERE / "results" / "scale.svg", metadata={"Date": None})


def main() -> None:
    """Each size in a process of its own, since a peak never falls."""
    rows = []
    for clients in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            out = subprocess.run(
                [sys.executable, __file__, str(clients), str(Path(folder) / "run")],
                capture_output=True,
                text=True,
                check=True,
            )
        rows.append(json.loads(out.stdout.splitlines()[-1]))
    save("scale", rows)
    draw(rows)


if __name__ == "__main__":
    print(json.dumps(one_run(int(sys.argv[1]), Path(sys.argv[2])))) if len(sys.argv) > 1 else main()
