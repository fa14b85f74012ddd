"""Seconds from a fresh process to its first training step.  Run: python benchmarks/startup.py [OTHER CHECKOUT]"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import tomli_w
from measure import save

HERE = Path(__file__).parent.parent
REPEATS = 3
DEMO = tomllib.loads((HERE / "fedpeft" / "demo.toml").read_text(encoding="utf8"))
ONE_STEP = {
    "rounds": 1,
    "selection": {"fraction": 0.01},
    "evaluation": {"clients": False, "central": False},
    "baselines": {"base": False, "local": False},
}
RUNS: dict[str, dict[str, Any]] = {
    "minilm": {**DEMO, **ONE_STEP, "training": {**DEMO["training"], "steps": 1}},
    "smollm2": {
        **ONE_STEP,
        "model": {"name": "smollm2"},
        "data": {"name": "chitchat", "examples": 1500},
        "partition": {"name": "iid", "clients": 20},
        "adapter": {"rank": 8, "targets": ["q_proj", "v_proj"]},
        "training": {"batch": 4, "length": 64, "steps": 1},
    },
}
STAGES = """
import json, sys, time
began, seen = time.perf_counter(), {}
def lap(name):
    global began
    seen[name], began = time.perf_counter() - began, time.perf_counter()
from pathlib import Path
from fedpeft.training.environment import prepare, starting
prepare()
with starting():
    from fedpeft import cli
    lap("import: command line")
    from fedpeft import config, run
    from fedpeft.run.workshop import workshop
    lap("import: flwr, rounds, report")
    found = config.read(Path(sys.argv[1]), [])
    here = workshop(found.settings_json)
    lap("settings, data, partition")
    import torch
    lap("import: torch")
    import transformers
    lap("import: transformers")
    import fedpeft.training.bases
    lap("import: its model classes")
    import peft
    lap("import: peft")
    import fedpeft.training.cohort
    lap("import: the rest")
trainer = here.trainer
lap("base model and adapter")
rows = trainer.rows(0, "train")
lap("tokens, from the cache")
from fedpeft.rounds import Job
assert type(next(iter(trainer.train_many([Job(0, 0, 1, trainer.start())])))).__name__ == "Done"
lap("the first step")
print(json.dumps(seen))
"""


def main() -> None:
    """Each run several times, in turns with another checkout's if one is given, and the stages of this one's."""
    trees = {"here": HERE} | {Path(x).name: Path(x).resolve() for x in sys.argv[1:]}
    rows: list[dict[str, Any]] = []
    parts: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for model, settings in RUNS.items():
            experiment = Path(name, f"{model}.toml")
            experiment.write_text(tomli_w.dumps(settings), encoding="utf8")
            first_step(HERE, experiment)  # fills the caches
            seen: dict[str, list[tuple[float, float]]] = {tree: [] for tree in trees}
            for _ in range(REPEATS):
                for tree, path in trees.items():
                    seen[tree].append(first_step(path, experiment))
            load = os.getloadavg()[1]  # of the last five minutes; a run by itself makes about 1
            for tree, times in seen.items():
                begun, done = zip(*times, strict=True)
                measured = spread("round begins", begun) | spread("step done", done)
                rows.append({"model": model, "tree": tree, **measured, "load of the machine": load})
            parts[model] = stages(experiment)
    stage = [{"stage": name} | {m: x[name] for m, x in parts.items()} for name in parts["minilm"]]
    save("startup", rows, {"stages": stage})


def spread(name: str, seconds: tuple[float, ...]) -> dict[str, float]:
    """The median, and the shortest."""
    return {f"{name}, median": statistics.median(seconds), f"{name}, best": min(seconds)}


def first_step(tree: Path, experiment: Path) -> tuple[float, float]:
    """From starting ``fedpeft run`` to when its round begins, with the model loaded, and to when its step is done."""
    with tempfile.TemporaryDirectory() as name:
        metrics = Path(name, "run", "metrics.jsonl")
        command = [sys.executable, "-m", "fedpeft", "run", str(experiment), "--folder", f"{name}/run"]
        started = time.time()
        with subprocess.Popen(command, cwd=tree, stdout=subprocess.DEVNULL) as running:
            while (record := round_of(metrics)) is None:
                if running.poll() not in (None, 0):
                    raise SystemExit(f"{shlex.join(command)} failed in {tree}")
                time.sleep(0.05)
            running.terminate()  # what comes after is not start-up
    begun = float(record["started"]) - started
    return begun, begun + float(record["seconds_training"])


def round_of(metrics: Path) -> dict[str, Any] | None:
    """The record of the run's round, once it is there."""
    lines = metrics.read_text(encoding="utf8").splitlines(keepends=True) if metrics.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return next((x for x in records if x["kind"] == "round"), None)


def stages(experiment: Path) -> dict[str, float]:
    """The same by parts, in a process that does no more than them; the best of each of several."""
    command = [sys.executable, "-c", STAGES, str(experiment)]
    seen = [
        json.loads(subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True).stdout)
        for _ in range(REPEATS)
    ]
    return {name: min(x[name] for x in seen) for name in seen[0]}


if __name__ == "__main__":
    main()
