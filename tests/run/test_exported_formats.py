"""A run of a language model with a tail, exported for llama.cpp and for onnxruntime."""

import gguf
import pytest

from fedpeft.config import experiment
from fedpeft.report import RunFolder
from fedpeft.run import Lines, export_run, simulate
from fedpeft.training import export_onnx

SETTINGS = {
    "rounds": 2,
    "model": {"name": "tiny-llama"},
    "data": {"name": "chitchat", "examples": 120},
    "partition": {"name": "iid", "clients": 2},
    "adapter": {"rank": 3, "alpha": 7, "targets": ["k_proj"]},
    "training": {"batch": 8, "length": 16, "lr": 1e-2},
    "evaluation": {"every": 2, "clients": False},
    "baselines": {"base": False},
    "rule": {"name": "flora", "largest": 5},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_language_models_adapter_and_tail_go_to_llama_cpp_and_onnxruntime(tmp_path, monkeypatch):
    folder = simulate(experiment(SETTINGS), tmp_path / "run", Lines())
    state = RunFolder.open(folder).checkpoints.load().state
    assert {x.rank for x in state.tail.values()} == {5}
    assert export_run(folder, "gguf", None) == folder / "gguf"
    file = gguf.GGUFReader(folder / "gguf" / "adapter.gguf")
    assert {x.name: x.data.shape for x in file.tensors} == {
        f"blk.{i}.attn_k.weight.lora_{x}": shape for i in (0, 1) for x, shape in (("a", (8, 24)), ("b", (12, 8)))
    }
    assert file.get_field("adapter.lora.alpha").contents() == 7.0
    asked = []
    monkeypatch.setattr(export_onnx, "export_onnx", lambda *arguments: asked.append(arguments))
    assert export_run(folder, "onnx", tmp_path / "out") == tmp_path / "out"
    assert export_run(folder, "onnx", None) == folder / "onnx"
    bridge, target, tokenizer, pixels, tail = asked[0]
    assert (target, pixels, tail.keys()) == (tmp_path / "out", None, state.tail.keys())
    assert tokenizer.pad_token_id == 0
    assert bridge.read().digest == state.adapter.digest
