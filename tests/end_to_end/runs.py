"""Runs of the smallest experiment, and what they ended in."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fedpeft.adapters import Array
from fedpeft.report import RunFolder, history
from tests.end_to_end.fleet import ROOT, environment

EXPERIMENT = ROOT / "simulations" / "tiny.toml"


def run_in_process(folder: Path, changes: Sequence[str]) -> None:
    """What ``fedpeft run`` does with the experiment, in a process with a fleet's environment."""
    pairs = [word for change in (*changes, "baselines.base=false") for word in ("-c", change)]
    done = subprocess.run(
        [sys.executable, "-m", "fedpeft", "run", str(EXPERIMENT), "--folder", str(folder), *pairs],
        env=environment(folder.parent),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def adapter_of(folder: Path) -> dict[str, Array]:
    """The tensors of a run's last adapter."""
    return RunFolder.open(folder).checkpoints.load().state.adapter.tensors()


def survivors_of(folder: Path) -> list[tuple[int, ...]]:
    """Whose answers each round of a run has taken, as far as it got."""
    if not (folder / "metrics.jsonl").exists():
        return []
    return [record.survivors for record in history(folder).rounds]
