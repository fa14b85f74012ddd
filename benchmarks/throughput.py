"""Tokens per second of five ways to train the same 16 clients.  Run: python benchmarks/throughput.py

Real tokens are counted, not pads. Each way has a process of its own, and they take turns, so that whatever else the
machine does disturbs all alike; the last way, which is Ray's, comes after the others. The first run of each, of a few
clients, is not timed: it is on the same batches in the same order, so that losses are compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OWN = ("OMP_WAIT_POLICY", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")
PLAIN = {name: value for name, value in os.environ.items() if name not in OWN}

from flops import Sizes  # noqa: E402  # what a user's process has in its environment is settled above
from measure import HERE, save  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from work import CASES, CLIENTS, RANK, Case, write  # noqa: E402

WAYS = {
    "plain": "plain torch + peft, one after another",
    "loop": "loop",
    "cohort-fp32": "cohort, fp32",
    "cohort-bf16": "cohort, bf16",
    "flowertune": "FlowerTune's way",
}
CHECKED = 4  # clients in the first run, which is not timed
SAME = {"loop": 1e-4, "cohort-fp32": 1e-3, "cohort-bf16": 0.1}
"""How far a client's mean loss in its first epoch may be from plain torch and peft's: rounding, which training then
amplifies. In bf16 a logit has three digits."""


@dataclass(slots=True)
class Way:
    """A process that trains, and its best run so far."""

    name: str
    process: "subprocess.Popen[str]"
    facts: Mapping[str, Any]
    check: Mapping[str, Any]
    best: Mapping[str, Any]

    def ask(self, line: str) -> dict[str, Any]:
        """What it answers to a line. RuntimeError if it has ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return _answer(self.name, self.process)


def _answer(name: str, process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("{", "[")):
            found = json.loads(line)
            return found if isinstance(found, dict) else {"rows": found}
    raise RuntimeError(f"{name} ended with {process.wait()}; its errors are above")


@contextmanager
def started(case: str, folder: Path) -> Iterator[list[Way]]:
    """The four ways that have no Ray, each ready and warm."""
    ways: list[Way] = []
    try:
        for name in ("plain", "loop", "cohort-fp32", "cohort-bf16"):
            plain = name == "plain"
            script = ["plain.py", str(folder)] if plain else ["engines.py", case, name]
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", HERE / script[0], *script[1:]],
                env=PLAIN if plain else None,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            way = Way(name, process, {}, {}, {})
            ways.append(way)
            way.facts = _answer(name, process)
            way.check = way.ask(f"plan {CHECKED}")
        yield ways
    finally:
        for way in ways:
            assert way.process.stdin is not None
            way.process.stdin.close()
            way.process.wait()


def flowertune(folder: Path, rounds: int) -> dict[str, Any]:
    """The best of Flower's simulation rounds, with as many clients at once as there are cores: the faster setting."""
    out = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "flowertune.py", str(folder), str(rounds)],
        env=PLAIN | {"RAY_DISABLE_DOCKER_CPU_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [x for x in out.stdout.splitlines() if x.startswith('{"start"')]
    if not lines:
        raise RuntimeError(f"flowertune.py ended with {out.returncode}:\n{out.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def measured(name: str, case: Case, repeats: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """A case's rows, the profile of the cohort engine in bf16, and the aims."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run([sys.executable, "-W", "ignore", __file__, "--write", str(folder), "--case", name], check=True)
        work = json.loads((folder / "work.json").read_text(encoding="utf8"))
        roof = {"fp32": 0.0, "bf16": 0.0}
        with started(name, folder) as ways:
            for _ in range(repeats):
                roof = {kind: max(rate, roof[kind]) for kind, rate in ways[-1].ask("roof").items()}
                for way in ways:
                    now = way.ask(f"random {CLIENTS}")
                    way.best = min((x for x in (way.best, now) if x), key=lambda x: x["seconds"])
            profile = ways[-1].ask("profile")["rows"]
        ray = flowertune(folder, repeats)
    rows = [_row(name, way, work, ways[0], roof) for way in ways]
    tokens = rows[0]["real tokens"]
    _need_same(ways, work, ray["loss"])
    fastest = rows[-1]["tokens/s"]
    ray_rate = tokens / min(ray["seconds"])
    rows.append(
        {
            "case": name,
            "way": WAYS["flowertune"],
            "tokens/s": ray_rate,
            "ratio": ray_rate / rows[0]["tokens/s"],
            "seconds": min(ray["seconds"]),
            "real tokens": tokens,
            "peak MB": ray["peak MB"],
            "start, seconds": ray["start"],
            "loading the model, seconds a client": ray["loading"],
        }
    )
    aims = {
        "case": name,
        "bf16 cohort : plain": fastest / rows[0]["tokens/s"],
        "bf16 cohort : FlowerTune's way": fastest / ray_rate,
        "share of the bf16 roof, cohort": rows[3]["share of the roof"],
        "roof fp32, GFLOP/s": roof["fp32"],
        "roof bf16, GFLOP/s": roof["bf16"],
    }
    return rows, [{"case": name, **row} for row in profile], aims


def _row(name: str, way: Way, work: Mapping[str, Any], plain: Way, roof: Mapping[str, float]) -> dict[str, Any]:
    clients = work["clients"]
    lengths = [len(ids) for mine in clients for ids in mine["ids"]]
    predicted = sum(len(ids) - max(before, 1) for mine in clients for ids, before in _pairs(mine))
    sizes = Sizes.of(AutoConfig.from_pretrained(work["folder"]), RANK, work["task"] == "lm")
    needed = sizes.step(lengths, predicted)
    kind = "bf16" if way.name.endswith("bf16") else "fp32"
    row = {
        "case": name,
        "way": WAYS[way.name],
        "tokens/s": sum(lengths) / way.best["seconds"],
        "ratio": plain.best["seconds"] / way.best["seconds"],
        "seconds": way.best["seconds"],
        "processor seconds": way.best["cpu seconds"],
        "real tokens": sum(lengths),
        "padded tokens": way.best.get("padded tokens", 0),
        "share of the roof": needed / way.best["seconds"] / 1e9 / roof[kind],
        "peak MB": way.best["peak MB"],
    }
    if way is not plain:
        passes = [length for rows, length in way.best["passes"] for _ in range(rows)]
        row["padded tokens"] = sum(passes)
        row["share of the roof, with pads"] = sizes.step(passes, predicted) / way.best["seconds"] / 1e9 / roof[kind]
        row["loss differs by"] = max(_differences(way, plain, work))
        row["attention"] = way.facts["attention"]
    return row


def _pairs(mine: Mapping[str, Any]) -> Iterator[tuple[list[int], int]]:
    return zip(mine["ids"], mine["targets"], strict=True)


def _differences(way: Way, plain: Way, work: Mapping[str, Any]) -> list[float]:
    """Of each client's mean loss over its first epoch, in the same order of rows."""
    is_dialogue = work["task"] == "lm"
    units = [
        sum(len(ids) - max(before, 1) for ids, before in _pairs(mine)) if is_dialogue else len(mine["ids"])
        for mine in work["clients"][:CHECKED]
    ]
    losses = zip(way.check["losses"], plain.check["losses"], units, strict=True)
    return [abs(x - y) / n for x, y, n in losses]


def _need_same(ways: Sequence[Way], work: Mapping[str, Any], ray: float) -> None:
    """RuntimeError unless all did the same work: the padded tokens of plain and loop, and everyone's losses.

    ray: the mean over clients of their sums of losses, in FlowerTune's way.
    """
    plain, loop = ways[0], ways[1]
    tokens = sum(rows * length for rows, length in loop.check["passes"])
    if plain.check["padded tokens"] != tokens:
        raise RuntimeError(f"in the same order plain took {plain.check['padded tokens']} tokens and the loop {tokens}")
    mean = sum(loop.best["losses"]) / CLIENTS
    if abs(ray - mean) > 1e-4 * mean:
        raise RuntimeError(f"in FlowerTune's way the clients' loss is {ray}; want the loop's {mean}")
    for way in ways[1:]:
        worst = max(_differences(way, plain, work))
        if worst > SAME[way.name]:
            raise RuntimeError(f"{way.name}: a client's mean loss differs by {worst}; want {SAME[way.name]} at most")


def main() -> None:
    """All cases, or one, which is not saved."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--case", choices=list(CASES), help="one case, to look at: its results are not saved")
    asked.add_argument("--repeats", type=int, default=2)
    asked.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.write:
        write(CASES[given.case], given.write)
        return
    rows, profile, aims = [], [], []
    for name in [given.case] if given.case else [x for x in CASES if x != "tiny"]:
        found = measured(name, CASES[name], given.repeats)
        rows += found[0]
        profile += found[1]
        aims.append(found[2])
        for row in (*found[0], *found[1][:8], found[2]):
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    if given.case is None:
        save("throughput", rows, {"profile": profile, "aims": aims})


if __name__ == "__main__":
    main()
