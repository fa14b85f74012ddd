"""What a device has to install, with torch and without, and how long its client takes to start.

Run: python benchmarks/device_env.py [ENVIRONMENT], a virtual environment with fedpeft[onnx] alone; else one is made.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path
from typing import Any

from measure import save
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedpeft.config import experiment
from fedpeft.run.kits import kit_of
from fedpeft.run.workshop import workshop

HERE = Path(__file__).parent.parent
REPEATS = 3
MEGA = 1e6
ROWS = [{"prompt": f"How much is {i} and {i + 1}?", "reply": f"That is {2 * i + 1}, I think."} for i in range(40)]
MODELS = {"tiny-llama": "none", "smollm2": "int8"}
"""The models that are started, and the format of their base: the first takes no time of its own."""

SIZES = """
import json, os
from importlib.metadata import distributions
def size(found):
    paths = [str(found.locate_file(x)) for x in found.files or ()]
    return sum(os.path.getsize(x) for x in paths if os.path.isfile(x))
print(json.dumps({x.metadata["Name"]: size(x) for x in distributions()}))
"""
START = """
import json, sys, time
began, seen = time.perf_counter(), {}
def lap(name):
    status = open("/proc/self/status").read()
    told = {x.partition(":")[0]: int(x.split()[1]) / 1000 * 1.024 for x in status.splitlines() if x.startswith("VmHWM")}
    seen[name] = [time.perf_counter() - began, told["VmHWM"]]
from clients import %(app)s as app
lap("app")
from fedpeft.rounds import Job
made = (getattr(app, "build", None) or app.participant)(open(sys.argv[1]).read(), json.loads(sys.argv[2]))
lap("participant")
assert type(next(iter(made.trainer.train_many([Job(0, 0, 1, made.trainer.start())])))).__name__ == "Done"
lap("step")
print(json.dumps([seen, "torch" in sys.modules]))
"""


def main() -> None:
    """Both environments, what they consist of, and the start of a client in each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = interpreter(folder, Path(sys.argv[1]) if sys.argv[1:] else None)
        sizes = json.loads(subprocess.run([small, "-c", SIZES], check=True, capture_output=True, text=True).stdout)
        mine = {canonicalize_name(x): size for x, size in sizes.items()}
        mine = {x: size for x, size in mine.items() if x not in ("pip", "setuptools", "wheel")}
        here = {canonicalize_name(x.metadata["Name"]): bytes_of(x) for x in distributions()}
        rows: list[dict[str, Any]] = []
        for runtime, extra, have in (("onnx", "onnx", mine), ("torch", "torch", here)):
            names = needed("fedpeft", extra)
            assert names <= have.keys(), f"not installed: {sorted(names - have.keys())}"
            total = sum(have[x] for x in names if x != "fedpeft") + mine["fedpeft"]
            rows.append({"client": runtime, "packages": len(names), "MB on disk": total / MEGA})
            python = small if runtime == "onnx" else sys.executable
            for model, quantise in MODELS.items():
                rows[-1] |= {f"{model}: {k}": v for k, v in start(folder, python, runtime, model, quantise).items()}
        save("device_env", rows, {"parts": list(parts(mine))})


def interpreter(folder: Path, given: Path | None) -> str:
    """Of the given environment, or of a new one with fedpeft[onnx] at the versions of constraints.txt."""
    place = folder / "environment" if given is None else given
    python = str(place / "bin" / "python")
    if given is None:
        venv.create(place, with_pip=True)
        command = [python, "-m", "pip", "install", "-q", "--constraint", "constraints.txt", ".[onnx]"]
        subprocess.run(command, cwd=HERE, check=True)
    return python


def bytes_of(found: Distribution) -> int:
    """Of all files that a distribution has installed, with what Python has compiled of them."""
    paths = (str(found.locate_file(x)) for x in found.files or ())
    return sum(os.path.getsize(x) for x in paths if os.path.isfile(x))


def needed(name: str, extra: str = "") -> set[str]:
    """A distribution's name and those of all that it needs, with an extra of its own."""
    found: set[str] = set()
    left = [(name, extra)]
    seen = set(left)
    while left:
        one, more = left.pop()
        found.add(canonicalize_name(one))
        for wanted in map(Requirement, _own(more) if one == "fedpeft" else distribution(one).requires or ()):
            if wanted.marker is None or wanted.marker.evaluate({"extra": more}):
                for x in (wanted.name, ""), *((wanted.name, y) for y in wanted.extras):
                    if x not in seen:
                        seen.add(x)
                        left.append(x)
    return found


def _own(extra: str) -> list[str]:
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf8"))["project"]
    return [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else ())]


def parts(have: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """What the small environment consists of, each package counted once, where it is first needed."""
    left = dict(have)
    for what, roots in (
        ("fedpeft", []),
        ("numpy", ["numpy"]),
        ("onnxruntime and what it needs", ["onnxruntime"]),
        ("cryptography, for secure aggregation", ["cryptography"]),
        (
            "zstandard, safetensors, tomli-w, typing_extensions",
            ["zstandard", "safetensors", "tomli-w", "typing_extensions"],
        ),
        ("jinja2, for chat templates", ["jinja2"]),
        ("typer and rich, the command line", ["typer", "rich"]),
        ("tokenizers", []),
        ("Flower and what it needs", ["flwr"]),
        ("what tokenizers needs: huggingface_hub", ["tokenizers"]),
    ):
        names = set().union(*(needed(x) for x in roots)) if roots else {what}
        if what.startswith("what tokenizers"):
            names.discard("tokenizers")
        mine = {x: left.pop(x) for x in names & left.keys()}
        most = sorted(mine, key=lambda x: -mine[x])[:6]
        told = ", ".join(f"{x} {mine[x] / MEGA:.0f}" for x in most if len(mine) > 1)
        yield {"part": what, "packages": len(mine), "MB": sum(mine.values()) / MEGA, "largest": told}
    assert not left, f"nobody needs {sorted(left)}"


def start(folder: Path, python: str, runtime: str, model: str, quantise: str) -> dict[str, float]:
    """Seconds from the first line of a client's process to its first step done, and its peak memory; medians."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(x) + "\n" for x in ROWS), encoding="utf8")
    found = experiment(
        {
            "model": {"name": model, "quantise": quantise},
            "data": {"name": str(data)},
            "partition": {"name": "iid", "clients": 1},
            "evaluation": {"central": False},
            "adapter": {"rank": 8, "targets": ["q_proj", "v_proj"]},
            "training": {"batch": 4, "length": 64, "steps": 1, "threads": 1},
        }
    )
    settings = folder / f"{model}.json"
    settings.write_text(found.settings_json, encoding="utf8")
    config: dict[str, Any] = {"partition-id": 0, "runtime": runtime, "state": str(folder / "state")}
    if runtime == "onnx":
        config["kit"] = str(kit_of(workshop(found.settings_json), found.model.quantise).folder)
    code = START % {"app": "app" if runtime == "torch" else "onnx_app"}
    command = [python, "-c", code, str(settings), json.dumps(config)]
    seen: list[dict[str, Sequence[float]]] = []
    for i in range(REPEATS + 1):
        done = subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True)
        stages, has_torch = json.loads(done.stdout.splitlines()[-1])
        assert has_torch == (runtime == "torch")
        if i:  # the first fills the caches
            seen.append(stages)
    seconds = {
        f"{stage}, s": statistics.median(x[key][0] for x in seen)
        for stage, key in (("imported", "app"), ("ready", "participant"), ("first step done", "step"))
    }
    return seconds | {"peak, MB": statistics.median(x["step"][1] for x in seen)}


if __name__ == "__main__":
    main()
