"""A trained model as an ONNX graph, run by stock onnxruntime without torch."""

import json
import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fedpeft.adapters import LowRank, same
from fedpeft.errors import ConfigError
from fedpeft.training import export_onnx as module
from fedpeft.training.bridge import Bridge
from fedpeft.training.export import export_merged, probe_of, probes
from fedpeft.training.export_onnx import export_onnx
from fedpeft.training.methods import Method
from fedpeft.training.pixels import Pixels
from fedpeft.training.quantised import quantise
from fedpeft.training.tails import beside
from fedpeft.training.tiny import _tokenizer
from tests.training.peft_cases import PEFT_WARNINGS, TASKS, build, logits, spread

pytestmark = [pytest.mark.filterwarnings(x) for x in PEFT_WARNINGS]
METHODS = {
    "bert": Method("lora", 4, 7, ("query", "dense"), options={"rank_pattern": {"query": 6}}),
    "llama": Method("lora", 4, 7, ("q_proj", "down_proj"), options={"alpha_pattern": {"q_proj": 3}}),
    "gpt2": Method("lora", 4, 7, ("c_attn", "c_fc")),
    "vit": Method("lora", 4, 7, ("q_proj",)),
}


def attached(model, method=None, base=None):
    """A trained adapter on a tiny model, every trained tensor of both signs, its head's too."""
    bridge = Bridge.attach(base or build(model), method or METHODS[model], TASKS[model], seed=1)
    bridge.write(spread(bridge.read(), seed=3))
    return bridge


def some_tail(bridge):
    """Frozen directions beside the first layer, of a rank and scale that are not the adapter's."""
    name, x = next(iter(bridge.read().layers.items()))
    rng = np.random.default_rng(5)
    a, b = rng.normal(0, 0.3, (3, x.a.shape[1])), rng.normal(0, 0.3, (len(x.b), 3))
    return {name: LowRank(a.astype(np.float32), b.astype(np.float32), -0.6)}


def session(folder):
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


@torch.no_grad()
def agree(found, bridge, tail, feed):
    """The graph says what the run's own model says with its tail beside it, all but fp32 rounding."""
    with beside(bridge.model, tail, torch.device("cpu")):
        want = bridge.model.eval()(**{n: torch.from_numpy(x) for n, x in feed.items()}).logits.numpy()
    got = found.run(["logits"], feed)[0]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, float(np.abs(want).max())))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """By model: the bridge, its tail, and the folder that its graph was written to; each is traced once."""
    kept = {}

    def of(model):
        if model not in kept:
            bridge, folder = attached(model), tmp_path_factory.mktemp("onnx") / model
            tail, before = some_tail(bridge), bridge.read()
            bridge.model.config.id2label = {0: "arts", 1: "größe", 2: "war"}
            bridge.model.peft_config["default"].base_model_name_or_path = "some/base"
            off = export_onnx(bridge, folder, _tokenizer(chat=False), None, tail)
            assert 0 <= off < 1e-5
            assert same(bridge.read(), before)
            kept[model] = bridge, tail, folder
        return kept[model]

    return of


@pytest.mark.parametrize("model", ["bert", "llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_graph_of_a_text_model_says_what_the_run_says_at_any_batch_and_length(model, written):
    bridge, tail, folder = written(model)
    found = session(folder)
    assert [(x.name, x.shape, x.type) for x in found.get_inputs()] == [
        (n, ["batch", "length"], "tensor(int64)") for n in ("input_ids", "attention_mask")
    ]
    shape = ["batch", 3] if model == "bert" else ["batch", "length", 50]
    assert [(x.name, x.shape, x.type) for x in found.get_outputs()] == [("logits", shape, "tensor(float)")]
    rng = np.random.default_rng(0)
    for rows, length in ((1, 1), (1, 40), (4, 9)):
        tokens = rng.integers(3, 50, (rows, length))
        mask = np.ones_like(tokens)
        if rows > 1:
            tokens[1, 6:], mask[1, 6:] = 0, 0
        agree(found, bridge, tail, {"input_ids": tokens, "attention_mask": mask})
    with torch.no_grad():
        plain = build(model)(**{n: torch.from_numpy(x) for n, x in (("input_ids", tokens), ("attention_mask", mask))})
    got = found.run(["logits"], {"input_ids": tokens, "attention_mask": mask})[0]
    assert np.abs(plain.logits.numpy() - got).max() > 0.05
    graph = onnx.load(folder / "model.onnx")
    assert {x.domain for x in graph.opset_import} == {""}  # nothing that only one runtime has


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "peft", "fedpeft"):
    sys.modules[name] = None
"""


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_the_readmes_own_code_runs_without_torch(model, written, tmp_path):
    bridge, tail, folder = written(model)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# some/base, fine-tuned, as an ONNX graph\n")
    limit = {"bert": 40, "llama": 64}[model]
    assert f"| in: input_ids | int64 | batch, length | tokens, at most {limit} long; shorter rows are padded" in text
    out = "batch, 3 | of 3 classes, labels.json in order |" if model == "bert" else "batch, length, 50 | of 50 tokens |"
    assert f"| out: logits | float32 | {out}" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    texts = ["CAB", "FACADE"]  # capitals up to L have tokens below 50, which the tiny models know
    code = code.replace('"a first text", "and a second, longer one"', ", ".join(map(json.dumps, texts)))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + code], cwd=folder, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tokenizer = _tokenizer(chat=False)
    rows = [tokenizer(x)["input_ids"] for x in texts]
    assert max(map(max, rows)) < 50
    want = []
    for row in rows:  # one by one, so without padding
        with beside(bridge.model, tail, torch.device("cpu")), torch.no_grad():
            scores = bridge.model(input_ids=torch.tensor([row])).logits[0]
        best = int((scores if model == "bert" else scores[-1]).argmax())
        want.append(["arts", "größe", "war"][best] if model == "bert" else tokenizer.decode([best]))
    assert done.stdout.strip() == str(want)


def test_what_is_beside_the_graph_is_what_a_device_needs(written):
    files = {m: {x.name for x in written(m)[2].iterdir()} for m in ("bert", "llama")}
    assert files["bert"] == {"model.onnx", "README.md", "labels.json", "tokenizer.json", "tokenizer_config.json"}
    assert files["llama"] == files["bert"] - {"labels.json"}
    assert json.loads((written("bert")[2] / "labels.json").read_text(encoding="utf-8")) == ["arts", "größe", "war"]
    assert [x.name for x in written("bert")[2].parent.iterdir()] == ["bert"]  # no scratch is left


@pytest.mark.slow
@pytest.mark.parametrize("side", [16, 24])
def test_a_graph_of_an_image_model_takes_any_batch_of_the_runs_size(side, tmp_path):
    bridge = attached("vit")
    tail, mean = some_tail(bridge), (0.1, 0.2, 0.3)
    assert export_onnx(bridge, tmp_path, None, Pixels(side, 4, 16, 3, mean), tail) < 1e-5
    found = session(tmp_path)
    assert [(x.name, x.shape) for x in found.get_inputs()] == [("pixel_values", ["batch", 3, side, side])]
    for rows in (1, 4):
        pixels = np.random.default_rng(0).normal(size=(rows, 3, side, side)).astype(np.float32)
        with beside(bridge.model, tail, torch.device("cpu")), torch.no_grad():
            want = bridge.model.eval()(
                pixel_values=torch.from_numpy(pixels), interpolate_pos_encoding=side != 16
            ).logits.numpy()
        got = found.run(["logits"], {"pixel_values": pixels})[0]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, float(np.abs(want).max())))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"| in: pixel_values | float32 | batch, 3, {side}, {side} | RGB: (x − mean) / deviation" in text
    assert "mean (0.1, 0.2, 0.3), deviation (0.5, 0.5, 0.5)" in text


@pytest.mark.slow
def test_many_weights_are_in_a_file_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LARGE", 1000)
    bridge = attached("vit")
    assert export_onnx(bridge, tmp_path / "out") < 1e-5
    sizes = {x.name: x.stat().st_size for x in (tmp_path / "out").iterdir()}
    assert sizes.keys() == {"model.onnx", "model.onnx.data", "README.md", "labels.json"}
    assert sizes["model.onnx.data"] > 0.9 * 4 * sum(x.numel() for x in build("vit").parameters())  # the smallest stay
    pixels = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
    agree(session(tmp_path / "out"), bridge, {}, {"pixel_values": pixels})


def test_batches_that_a_graph_is_tried_on_have_other_shapes_than_the_traced_one_and_padding():
    bridge = attached("llama")
    assert probe_of(bridge, 2, 11)["input_ids"].shape == (2, 11)
    found = probes(bridge)
    assert [tuple(x["input_ids"].shape) for x in found] == [(1, 7), (5, 23), (3, 1)]
    mask = found[1]["attention_mask"]
    assert mask.sum(dim=1).tolist() == [12, 23, 23, 22, 23]
    assert (mask.diff(dim=1) <= 0).all()  # at the end of a row
    assert (found[1]["input_ids"][mask == 0] == 0).all()
    assert (found[1]["input_ids"][mask == 1] > 2).all()
    bridge.model.config.max_position_embeddings = 9
    assert [x["input_ids"].shape[1] for x in probes(bridge)] == [7, 9, 1]


@pytest.mark.parametrize("wrong", [2e-4, float("nan")])
def test_a_graph_that_says_something_else_is_an_error_and_leaves_nothing_behind(wrong, tmp_path, monkeypatch):
    bridge = attached("llama")

    def off(path, batches):
        assert path.read_text() == "a graph"
        right = [logits_of(bridge, x) for x in batches]
        right[1][3, 5, 7] += wrong * max(float(x.abs().max()) for x in right)
        return right

    monkeypatch.setattr(module, "_trace", lambda bridge, model, path, side: path.write_text("a graph"))
    monkeypatch.setattr(module, "_run", off)
    message = (
        r"the ONNX graph's logits are off by (2\.0e-04|inf) of their largest; want at most 1e-04: export to merged"
    )
    with pytest.raises(ConfigError, match=message):
        export_onnx(bridge, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def logits_of(bridge, batch):
    return bridge.model.eval()(**batch).logits


def test_a_model_that_cannot_be_traced_is_refused_by_name(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.onnx.errors.OnnxExporterError("at first") from ValueError("no\n  such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    want = (
        "model.name: BertForSequenceClassification can't be traced for ONNX: no such operator; export to merged instead"
    )
    with pytest.raises(ConfigError, match=re.escape(want)):
        export_onnx(attached("bert"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_method_that_cannot_be_merged_has_no_graph(tmp_path):
    bridge = attached("llama", Method("prompt_tuning"))
    with pytest.raises(ConfigError, match=r"prompt_tuning can't be merged: it adds prompt tokens .*; export to peft"):
        export_onnx(bridge, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_not_installed_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name != "onnx" else object())
    with pytest.raises(ConfigError, match=r"needs onnxruntime, onnxscript; want `pip install 'fedpeft\[onnx\]'`"):
        export_onnx(None, tmp_path)


@pytest.mark.parametrize("format", ["int8", "nf4"])
@pytest.mark.parametrize("model", ["bert", "llama", "gpt2", "vit"])
def test_an_adapter_on_a_packed_base_is_merged_with_what_it_was_trained_on(model, format, tmp_path):
    base = build(model)
    names = {id(x): n for n, x in base.named_parameters()}
    bridge = attached(model, base=base)
    whole = logits(bridge.model, model)
    quantise(bridge.model, format, names, torch.float32)
    want = logits(bridge.model, model)
    assert float((whole - want).abs().max()) > 1e-3
    assert export_merged(bridge, tmp_path, _tokenizer(chat=False) if model == "bert" else None) < 1e-5
    plain = type(base).from_pretrained(tmp_path)
    # packed rows are multiplied in another order
    np.testing.assert_allclose(logits(plain, model), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert (tmp_path / "tokenizer.json").is_file() == (model == "bert")
    torch.testing.assert_close(logits(bridge.model, model), want, rtol=0, atol=0)
    if model in ("llama", "gpt2"):
        assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
