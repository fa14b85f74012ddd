"""A run whose rule keeps part of the model in a tail: its adapter folder, its merged model and its digest have it."""

import json

import pytest
from safetensors.numpy import load_file

from fedpeft.config import experiment
from fedpeft.report import RunFolder, history
from fedpeft.run import Lines, export_run, simulate

SETTINGS = {
    "rounds": 2,
    "model": {"name": "tiny-bert"},
    "data": {"name": "wiki11", "examples": 260},
    "partition": {"name": "iid", "clients": 2},
    "adapter": {"rank": 3, "targets": ["query"]},
    "training": {"batch": 8, "length": 16, "lr": 1e-2},
    "evaluation": {"every": 2, "clients": False},
    "baselines": {"base": False},
    "rule": {"name": "flora", "largest": 5},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_exported_has_the_tail_in_it(tmp_path):
    folder = simulate(experiment(SETTINGS), tmp_path / "run", Lines())
    state = RunFolder.open(folder).checkpoints.load().state
    assert {x.rank for x in state.tail.values()} == {5}
    final = history(folder).final
    assert final.adapter_digest == state.digest != state.adapter.digest
    again = export_run(folder, "peft", tmp_path / "again")
    for place in (folder / "adapter", again):
        assert set(json.loads((place / "adapter_config.json").read_text())["rank_pattern"].values()) == {3 + 5}
        shapes = {x.shape for n, x in load_file(place / "adapter_model.safetensors").items() if "lora_A" in n}
        assert shapes == {(8, 24)}
    export_run(folder, "merged", tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").is_file()
