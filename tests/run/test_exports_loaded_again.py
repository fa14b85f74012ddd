"""Exports of runs are loaded again before the command says done; of a packed base the packed weights are merged."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedpeft.config import experiment
from fedpeft.errors import ConfigError
from fedpeft.run import Lines, export_run, simulate
from fedpeft.run.simulate import stored
from fedpeft.run.workshop import workshop
from fedpeft.training import reload
from fedpeft.training.bases import load_base
from fedpeft.training.quantised import FrozenLinear

SETTINGS = {
    "rounds": 1,
    "model": {"name": "tiny-llama", "quantise": "nf4"},
    "data": {"name": "chitchat", "examples": 40},
    "partition": {"name": "iid", "clients": 2},
    "adapter": {"rank": 3, "targets": ["k_proj"]},
    "training": {"batch": 8, "length": 16, "lr": 1e-1},
    "evaluation": {"clients": False},
    "baselines": {"base": False},
    "rule": {"name": "flora", "largest": 5},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return simulate(experiment(SETTINGS), tmp_path_factory.mktemp("runs") / "run", Lines())


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 12)[None]).logits


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_merged_model_of_a_packed_base_has_its_packed_weights_expanded(run, tmp_path, monkeypatch):
    trainer = workshop(stored(run).settings_json).trainer
    seen = []
    monkeypatch.setattr(reload, "said", lambda model, batch: seen.append(model) or said(model, batch))
    export_run(run, "peft", tmp_path / "peft")
    assert seen[0] is trainer.bridge.model
    name = "model.layers.1.mlp.down_proj"  # which has no adapter on it
    again, here = (x.get_base_model().get_submodule(name) for x in seen[::-1])
    assert isinstance(again, FrozenLinear)
    assert again is not here
    assert torch.equal(again.codes, here.codes)
    export_run(run, "merged", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.get_submodule(name).weight, here.weight)
    plain = load_base(stored(run).model, "lm", (), 0, trainer.place).model
    off = (merged.get_submodule(name).weight - plain.get_submodule(name).weight).abs().max()
    assert off > 0.01 * plain.get_submodule(name).weight.abs().max()  # four bits a number
    beside = logits(PeftModel.from_pretrained(plain, tmp_path / "peft"))
    assert not torch.allclose(logits(merged), beside, atol=1e-3)  # so which of the two it is makes a difference


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_that_says_other_things_when_it_is_loaded_again_is_an_error(run, tmp_path, monkeypatch):
    def spoiled(*arguments):
        base = load_base(*arguments)
        with torch.no_grad():
            base.model.model.norm.weight.mul_(1.01)
        return base

    monkeypatch.setattr(reload, "load_base", spoiled)
    with pytest.raises(ConfigError, match=r"lora, loaded again from .*peft, gives logits that are off by .*; want at"):
        export_run(run, "peft", tmp_path / "peft")


said = reload.said
