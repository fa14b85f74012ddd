"""A run that is killed at any moment and resumed ends in the same adapter, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedpeft.flower import ClientStore
from fedpeft.report import RunFolder, history

EXPERIMENT = Path(__file__).parents[2] / "simulations" / "tiny.toml"
CHANGES = ["rounds=4", "data.examples=150", "training.length=12", "partition.clients=3", "selection.fraction=0.7"]


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "fedpeft", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


def run(folder, *changes):
    pairs = [x for change in (*CHANGES, *changes) for x in ("-c", change)]
    return start("run", str(EXPERIMENT), "--folder", str(folder), *pairs)


def finish(process):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


def kill_when(process, there):
    """SIGKILL as soon as ``there()``; False if the process ended first."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if there():
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    process.kill()
    raise AssertionError("nothing happened in 300 seconds")


def untimed(folder):
    """All that a run recorded, but for times, memory, the run's own name, and bytes: each request has that name in it,
    compressed, so two runs differ by a few."""
    records = [json.loads(x) for x in (folder / "metrics.jsonl").read_text(encoding="utf8").splitlines()]
    drop = {
        "processes",
        "seconds",
        "seconds_training",
        "timeline",
        "started",
        "command",
        "settings",
        "bytes_up",
        "bytes_down",
    }
    return [{k: v for k, v in record.items() if k not in drop} for record in records]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """By rule, the folder of a run that nobody has killed; the two go on at the same time."""
    folders = {rule: tmp_path_factory.mktemp("whole") / rule for rule in ("fedit", "fedsa")}
    for process in [run(folder, f"rule.name={rule}") for rule, folder in folders.items()]:
        finish(process)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fedit", "fedsa"])
def test_a_killed_run_ends_in_the_same_adapter(tmp_path, rule, wholes):
    whole, broken = wholes[rule], tmp_path / "broken"

    def there(pattern):
        return lambda: any(broken.glob(pattern))

    process = run(broken, f"rule.name={rule}")
    kills = [kill_when(process, there("checkpoints/round-00001.safetensors"))]  # between rounds 1 and 2, or soon after
    process = start("resume", str(broken))
    lines = len(untimed(broken))
    kills.append(kill_when(process, lambda: len((broken / "metrics.jsonl").read_bytes().splitlines()) > lines))
    if rule == "fedsa":  # within round 3: a client has its new personal part, and the server no new adapter
        process = start("resume", str(broken))
        store = ClientStore(broken / "clients")
        kills.append(kill_when(process, lambda: any(store.at(client, 2) for client in range(3))))
        assert not (broken / "checkpoints" / "round-00003.safetensors").exists()
    assert all(kills)
    finish(start("resume", str(broken)))

    assert history(broken).final.adapter_digest == history(whole).final.adapter_digest
    mine, other = (RunFolder.open(x).checkpoints.files()[-1] for x in (broken, whole))
    assert mine.read_bytes() == other.read_bytes()
    assert untimed(broken) == untimed(whole)
    adapters = [(x / "adapter" / "adapter_model.safetensors").read_bytes() for x in (broken, whole)]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_said_aloud_and_the_one_before_it_leads_to_the_same_adapter(tmp_path, wholes):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(run(whole))
    process = run(broken)
    assert kill_when(process, lambda: (broken / "checkpoints" / "round-00002.safetensors").exists())
    newest = RunFolder.open(broken).checkpoints.files()[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(bytes(content))
    process = start("resume", str(broken))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert newest.name in said
    assert "damaged" in said
    assert history(broken).final.adapter_digest == history(whole).final.adapter_digest
