"""Adapters on real models as an ONNX graph and as a GGUF file, and what runs them says what the run says."""

import json

import gguf
import numpy as np
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedpeft.adapters import LowRank
from fedpeft.training.bridge import Bridge
from fedpeft.training.export_gguf import export_gguf, read
from fedpeft.training.export_onnx import export_onnx
from fedpeft.training.methods import Method
from fedpeft.training.packaged import folder
from fedpeft.training.tails import beside

pytestmark = [pytest.mark.slow]
CPU = torch.device("cpu")
TEXTS = ["Rain fell on the harbour for three days.", "Why?"]


def moved(model, method, task, size):
    """A bridge whose trained tensors are all off their start, of both signs, and a tail beside two layers."""
    bridge = Bridge.attach(model, method, task, seed=1)
    rng = np.random.default_rng(2)
    start = bridge.read()
    bridge.write(start.moved({n: rng.normal(0, size, x.shape).astype(np.float32) for n, x in start.tensors().items()}))
    tail = {}
    for name, x in list(start.layers.items())[:2]:
        a, b = rng.normal(0, size, (3, x.a.shape[1])), rng.normal(0, size, (len(x.b), 3))
        tail[name] = LowRank(a.astype(np.float32), b.astype(np.float32), -1.5)
    return bridge, tail


@torch.no_grad()
def said(bridge, tail, rows):
    with beside(bridge.model, tail, CPU):
        return [bridge.model.eval()(input_ids=torch.tensor([x])).logits[0].numpy() for x in rows]


def graph(folder, rows):
    """Logits of rows that are padded together; the padding's are cut off a language model's."""
    width = max(map(len, rows))
    tokens = np.array([x + [0] * (width - len(x)) for x in rows])
    mask = np.array([[1] * len(x) + [0] * (width - len(x)) for x in rows])
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"input_ids": tokens, "attention_mask": mask})[0]
    return [x[: len(row)] if x.ndim == 2 else x for x, row in zip(logits, rows, strict=True)]


def near(got, want, share):
    largest = max(float(np.abs(x).max()) for x in want)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=share * largest)


def test_minilm_with_a_new_head_as_a_graph(tmp_path):
    origin = folder("minilm")
    labels = {i: f"class {i}" for i in range(4)}
    torch.manual_seed(3)  # the head is new
    model = AutoModelForSequenceClassification.from_pretrained(origin, num_labels=4, id2label=labels)
    bridge, tail = moved(model, Method(rank=5, alpha=7), "classify", 0.05)
    assert export_onnx(bridge, tmp_path, AutoTokenizer.from_pretrained(origin), None, tail) < 1e-5
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.no_padding()
    rows = [tokenizer.encode(x).ids for x in TEXTS]
    want = said(bridge, tail, rows)
    near(graph(tmp_path, rows), want, 1e-5)
    # The tail is seen: its part is hundreds of times what the two ways may differ by.
    assert np.abs(want[0] - said(bridge, {}, rows)[0]).max() > 3e-3 * np.abs(want).max()
    assert json.loads((tmp_path / "labels.json").read_text()) == list(labels.values())


@pytest.fixture(scope="module")
def smollm2():
    model = AutoModelForCausalLM.from_pretrained(folder("smollm2"), dtype=torch.float32)
    method = Method(
        rank=5, alpha=7, targets=("q_proj", "k_proj", "down_proj"), options={"alpha_pattern": {"k_proj": 3}}
    )
    return moved(model, method, "lm", 0.01)


def test_smollm2_as_a_graph(smollm2, tmp_path):
    bridge, tail = smollm2
    tokenizer = AutoTokenizer.from_pretrained(folder("smollm2"))
    assert export_onnx(bridge, tmp_path, tokenizer, None, tail) < 1e-4
    rows = [tokenizer(x)["input_ids"] for x in TEXTS]
    near(graph(tmp_path, rows), said(bridge, tail, rows), 1e-4)
    assert "tokens, at most 8192 long" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_smollm2s_adapter_as_gguf(smollm2, tmp_path):
    bridge, tail = smollm2
    assert export_gguf(bridge, tmp_path, tail) < 1e-4
    file = gguf.GGUFReader(tmp_path / "adapter.gguf")
    shapes = {x.name: x.data.shape for x in file.tensors}
    assert len(shapes) == 30 * 3 * 2
    assert shapes["blk.29.attn_k.weight.lora_b"] == (192, 5)
    assert shapes["blk.29.ffn_down.weight.lora_a"] == (5, 1536)
    assert {x[0] for n, x in shapes.items() if n.endswith("lora_a")} == {5, 5 + 3}
    rows = [AutoTokenizer.from_pretrained(folder("smollm2"))(TEXTS[0])["input_ids"]]
    want = said(bridge, tail, rows)
    layers = read(tmp_path / "adapter.gguf", bridge.model)
    with bridge.model.disable_adapter():
        near(said(bridge, layers, rows), want, 1e-4)
