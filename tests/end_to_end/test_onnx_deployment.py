"""Devices without torch beside one with it, on a real SuperLink: the kit comes by its digest, or is refused."""

import os
from pathlib import Path

import pytest

from fedpeft.report import exceeded, history
from tests.end_to_end.fleet import ROOT, environment, fleet
from tests.end_to_end.runs import EXPERIMENT, survivors_of
from tests.ondevice.small_kit import write

WITHOUT = Path(__file__).parent / "without_torch"
"""For a PYTHONPATH: hides torch, transformers, peft and onnx from a process."""


@pytest.mark.slow
def test_a_device_without_torch_is_sent_the_kit_and_trains_and_one_with_another_kit_is_refused(tmp_path: Path) -> None:
    folder, kits, other = tmp_path / "run", tmp_path / "kits", tmp_path / "other"
    other_digest = write(other).digest
    changes = "fleet.kit='none'; partition.clients=3; evaluation.clients=false; evaluation.every=2"
    with fleet(tmp_path / "flower", ("partition-id=0",)) as flower:
        without = {"PYTHONPATH": os.pathsep.join([str(WITHOUT), environment(flower.folder)["PYTHONPATH"]])}
        flower.start_node(1, f'partition-id=1 kits="{kits}" memory="1GB"', without)
        flower.start_node(2, f'partition-id=2 kit="{other}"', without)
        config = {"experiment": str(EXPERIMENT), "changes": changes, "folder": str(folder)}
        said = " ".join(flower.run(ROOT, config, seconds=500).split())
    (kit,) = kits.iterdir()
    size = sum(x.stat().st_size for x in kit.iterdir())
    assert {"kit.json", "base.safetensors", "step.onnx", "start.safetensors"} <= {x.name for x in kit.iterdir()}
    assert f"gets the kit {kit.name[:16]}…, {size / 1e6:.1f} MB (has none)" in said
    assert f"kit.json has digest {other_digest[:16]}…; the coordinator wants {kit.name[:16]}…" in said
    assert survivors_of(folder) == [(0, 1)] * 2
    one, two = history(folder).rounds
    assert one.train is not None
    assert two.train is not None
    assert two.train.loss < one.train.loss
    assert size < one.bytes_down - two.bytes_down < size + 20_000  # the kit is in the run's bytes, once
    memory = history(folder).memory
    assert memory is not None
    assert memory.unknown == ()
    told = {x.clients: (x.rank, x.runtime, x.quantise, x.budget) for x in memory.devices}
    assert told == {(0,): (4, "torch", "none", None), (1,): (4, "onnx", "none", 1_000_000_000)}
    for x in memory.devices:
        assert x.ratio is not None
        assert 0.8 < x.ratio < 1.25  # of a model of no size it is all libraries, which differ from machine to machine
    assert exceeded(memory) in said
    assert "<h2>Memory of devices</h2>" in (folder / "report.html").read_text(encoding="utf8")
