"""A LoRA as llama.cpp's GGUF adapter: what is in the file, and what llama.cpp's own rules make of it."""

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from fedpeft.adapters import LowRank, same
from fedpeft.errors import ConfigError, DataError
from fedpeft.training import export_gguf as module
from fedpeft.training.bridge import Bridge
from fedpeft.training.export_gguf import export_gguf, read, write
from fedpeft.training.methods import Method
from fedpeft.training.tails import beside
from tests.training.peft_cases import PEFT_WARNINGS, TASKS, build, logits, spread

pytestmark = [pytest.mark.filterwarnings(x) for x in PEFT_WARNINGS]
TARGETS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}
PREFIX = "base_model.model."
# llama.cpp's names, as its conversion gives them to a base's weights
BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def attached(model, method=None, base=None):
    """A trained adapter of rank 4 and alpha 7 on a tiny model, every factor of both signs."""
    method = method or Method("lora", 4, 7, TARGETS[model])
    bridge = Bridge.attach(base or build(model), method, TASKS[model], seed=1)
    bridge.write(spread(bridge.read(), seed=3))
    return bridge


def some_tail(bridge, ranks=(2, 5)):
    """Frozen directions beside some layers, of ranks and scales that are not the adapter's."""
    rng, tail = np.random.default_rng(5), {}
    for i, (name, x) in enumerate(list(bridge.read().layers.items())[::2]):
        rank = ranks[i % len(ranks)]
        a, b = rng.normal(0, 0.3, (rank, x.a.shape[1])), rng.normal(0, 0.3, (len(x.b), rank))
        tail[name] = LowRank(a.astype(np.float32), b.astype(np.float32), (0.6, -1.7)[i % 2])
    return tail


def tensors(path):
    return {x.name: np.array(x.data) for x in gguf.GGUFReader(path).tensors}


def said_with(bridge, model, layers):
    with beside(bridge.model, layers, torch.device("cpu")):
        return logits(bridge.model, model).numpy()


def llama_cpp(path, name):
    """The change of a base's weight that llama.cpp computes: alpha over the rank of its own factors, times b a."""
    alpha = gguf.GGUFReader(path).get_field("adapter.lora.alpha").contents()
    found = tensors(path)
    a, b = found[f"{name}.lora_a"].astype(np.float64), found[f"{name}.lora_b"].astype(np.float64)
    return alpha / b.shape[1] * b @ a


OPTIONS = {
    "plain": lambda wide, narrow: {},
    "rslora": lambda wide, narrow: {"use_rslora": True},
    "unequal": lambda wide, narrow: {"rank_pattern": {wide: 6}, "alpha_pattern": {narrow: 3, wide: 11}},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_file_holds_the_change_of_every_weight_in_llama_cpps_rows_with_its_tail(model, options, tmp_path):
    made = OPTIONS[options](*{"llama": ("k_proj", "v_proj"), "gpt2": ("c_fc", "c_attn")}[model])
    bridge = attached(model, Method("lora", 4, 7, TARGETS[model], options=made))
    assert len({(x.rank, x.scale) for x in bridge.read().layers.values()}) == (3 if options == "unequal" else 1)
    before, tail = bridge.read(), some_tail(bridge)
    assert export_gguf(bridge, tmp_path, tail) <= 1e-5
    names = set()
    config = bridge.model.config
    theirs = LlamaTensorProcessor({"num_attention_heads": config.num_attention_heads})
    for layer, x in before.layers.items():
        _, _, i, rest = layer.removeprefix(PREFIX).split(".", 3)
        own = f"blk.{i}.{BLOCK[rest]}.weight"
        names |= {f"{own}.lora_a", f"{own}.lora_b"}
        found = llama_cpp(tmp_path / "adapter.gguf", own)
        if rest.endswith(("q_proj", "k_proj")):  # transformers' own reading of llama.cpp's order of rows
            heads = config.num_attention_heads if rest.endswith("q_proj") else config.num_key_value_heads
            found = theirs._reverse_permute_weights(found, config.num_attention_heads, heads)
        want = x.product() + (tail[layer].product() if layer in tail else 0)
        np.testing.assert_allclose(found, want, rtol=0, atol=2e-6 * np.abs(want).max())  # fp32 factors
    assert set(tensors(tmp_path / "adapter.gguf")) == names
    assert same(bridge.read(), before)


def test_a_file_says_what_it_is_and_whose(tmp_path):
    bridge = attached("llama")
    bridge.model.peft_config["default"].base_model_name_or_path = "some/base"
    export_gguf(bridge, tmp_path / "new" / "folder")
    file = gguf.GGUFReader(tmp_path / "new" / "folder" / "adapter.gguf")
    said = {k: v.contents() for k, v in file.fields.items() if not k.startswith("GGUF.")}
    assert said == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 7.0,
        "general.base_model.count": 1,
        "general.base_model.0.name": "some/base",
    }
    q = next(x for x in file.tensors if x.name == "blk.1.ffn_down.weight.lora_a")
    assert q.shape.tolist() == [36, 4]  # ggml's order: columns first
    assert q.tensor_type == gguf.GGMLQuantizationType.F32
    text = (tmp_path / "new" / "folder" / "README.md").read_text()
    assert "convert_hf_to_gguf.py some/base --outfile base.gguf" in text
    assert "--lora adapter.gguf" in text
    assert sorted(x.name for x in (tmp_path / "new").iterdir()) == ["folder"]


def test_where_the_scale_is_alpha_over_rank_the_factors_are_the_runs_own(tmp_path):
    bridge = attached("gpt2")
    export_gguf(bridge, tmp_path)
    found = tensors(tmp_path / "adapter.gguf")
    x = bridge.read().layers["base_model.model.transformer.h.1.mlp.c_fc"]
    assert x.scale == 7 / 4
    np.testing.assert_array_equal(found["blk.1.ffn_up.weight.lora_a"], x.a)
    np.testing.assert_array_equal(found["blk.1.ffn_up.weight.lora_b"], x.b)


def neighbours_turned(x, positions):
    """llama.cpp's rotation for Llama, of neighbouring pairs. Source: Su et al., arXiv:2104.09864, eq. 15."""
    size = x.shape[-1]
    angle = positions[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    even, odd = x[..., ::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., ::2] = even * np.cos(angle) - odd * np.sin(angle)
    out[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
    return out


def test_attention_scores_of_rotated_neighbours_are_those_of_transformers_rotated_halves(tmp_path):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    bridge = attached("llama", Method("lora", 4, 7, ("q_proj", "k_proj")))
    export_gguf(bridge, tmp_path)
    layers, config = bridge.read().layers, bridge.model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    x, positions = np.random.default_rng(0).normal(size=(5, 24)), np.arange(5.0)
    name = "base_model.model.model.layers.1.self_attn."
    q, k = (x @ layers[name + n].product().T for n in ("q_proj", "k_proj"))
    q, k = (torch.tensor(y.reshape(1, 5, n, -1)).transpose(1, 2) for y, n in ((q, heads), (k, groups)))
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.tensor(positions)[None].long())
    q, k = apply_rotary_pos_emb(q, k, cos.double(), sin.double())
    want = (q @ k.transpose(2, 3))[0].numpy()
    q, k = (x @ llama_cpp(tmp_path / "adapter.gguf", f"blk.1.attn_{n}.weight").T for n in "qk")
    q, k = (neighbours_turned(y.reshape(5, n, -1).swapaxes(0, 1), positions) for y, n in ((q, heads), (k, groups)))
    # cos and sin are fp32 there
    np.testing.assert_allclose(q @ k.swapaxes(1, 2), want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_what_is_read_back_says_what_the_run_says(model, tmp_path):
    bridge = attached(model)
    tail = some_tail(bridge)
    want = said_with(bridge, model, tail)
    export_gguf(bridge, tmp_path, tail)
    layers = read(tmp_path / "adapter.gguf", bridge.model)
    assert list(layers) == list(bridge.read().layers)
    assert {x.rank for x in layers.values()} == {4, 4 + 2, 4 + 5}
    with bridge.model.disable_adapter():
        got = said_with(bridge, model, layers)
        without = logits(bridge.model, model).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert np.abs(without - want).max() > 0.05


def test_a_file_without_an_alpha_has_a_scale_of_one(tmp_path):
    bridge = attached("gpt2")
    x = replace(bridge.read().layers["base_model.model.transformer.h.0.attn.c_attn"], scale=-0.3)
    write(tmp_path / "x.gguf", bridge.model, {"base_model.model.transformer.h.0.attn.c_attn": x}, 2.5)
    (again,) = read(tmp_path / "x.gguf", bridge.model).values()
    assert again.scale == 2.5 / 4
    np.testing.assert_allclose(again.product(), x.product(), rtol=0, atol=1e-6)
    data = (tmp_path / "x.gguf").read_bytes()
    at = data.index(b"adapter.lora.alpha") + len(b"adapter.lora.alpha") + 4
    (tmp_path / "x.gguf").write_bytes(data[:at] + np.float32(0).tobytes() + data[at + 4 :])
    (again,) = read(tmp_path / "x.gguf", bridge.model).values()
    assert again.scale == 1.0


REFUSED = {
    "a task": ("bert", Method(rank=4), "data.task: got 'classify'; llama.cpp runs language models: export to onnx"),
    "another method": ("llama", Method("ia3"), "adapter.method: ia3 is no LoRA, .* export to merged"),
    "dora": ("llama", Method("dora", rank=4), "adapter: Dora changes how model.layers.0.self_attn.q_proj is computed"),
    "alora": ("llama", Method(rank=4, options={"alora_invocation_tokens": [5]}), "adapter: ALora changes how"),
    "a bias": ("gpt2", Method(rank=4, options={"bias": "lora_only"}), r"adapter: .*c_attn.*bias is trained too"),
    "a head": ("llama", Method(rank=4, targets=("q_proj",), save=("lm_head",)), "adapter: lm_head.* is trained too"),
    "an embedding": (
        "llama",
        Method(rank=4, targets=("embed_tokens",)),
        "adapter: model.embed_tokens is no linear layer",
    ),
    "a tied output": (
        "llama",
        Method(rank=4, targets=("lm_head",)),
        "lm_head is a layer that is tied to the embedding",
    ),
    "replicas": (
        "llama",
        Method(rank=4, options={"layer_replication": [[0, 2], [1, 2]]}),
        "options.layer_replication makes layers that the base has not, .* convert_hf_to_gguf.py",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_format_has_no_place_for_is_refused_by_name_with_the_way_out(case, tmp_path):
    model, method, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        export_gguf(attached(model, method), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_family_that_is_not_known_is_refused_and_those_that_are_are_named(tmp_path):
    bridge = attached("llama")
    bridge.model.config.model_type = "mamba"
    with pytest.raises(ConfigError, match=r"model.name: mamba models .* want one of llama, gpt2: export to merged"):
        export_gguf(bridge, tmp_path)


@pytest.mark.parametrize("name", ["_order", "_names"])
def test_a_file_that_is_wrong_is_an_error_and_leaves_nothing_behind(name, tmp_path, monkeypatch):
    bridge = attached("llama", Method("lora", 4, 7, ("q_proj", "o_proj")))
    right = getattr(module, name)
    calls = []

    def wrong_at_first(*arguments):
        calls.append(arguments)
        found = right(*arguments)
        if name == "_order":
            return found if len(calls) > 1 else np.arange(len(found))
        swapped = {".attn_q.": ".attn_output.", ".attn_output.": ".attn_q."}
        first = len(calls) == 2  # the first is for the refusals
        return {k: next((v.replace(x, y) for x, y in swapped.items() if first and x in v), v) for k, v in found.items()}

    monkeypatch.setattr(module, name, wrong_at_first)
    with pytest.raises(ConfigError, match=r"self_attn\.q_proj: its change of weights in the GGUF file is off by"):
        export_gguf(bridge, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_logits_that_differ_are_an_error_and_what_was_there_stays(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("mine")
    numbers = iter(range(99))
    monkeypatch.setattr(module, "said", lambda model, batch: torch.tensor([1.0 + 2e-4 * next(numbers)]))
    with pytest.raises(ConfigError, match=r"logits are off by 6\.0e-04 of their largest; want at most 1e-04"):
        export_gguf(attached("llama"), tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_file_for_another_model_is_refused_as_llama_cpp_refuses_it(tmp_path):
    llama, gpt2 = attached("llama"), attached("gpt2")
    export_gguf(llama, tmp_path)
    path = tmp_path / "adapter.gguf"
    with pytest.raises(
        DataError, match=r"adapter.gguf: got adapter of type lora for llama; want adapter of type lora for gpt2"
    ):
        read(path, gpt2.model)
    shallow = build("llama")
    shallow.model.layers = shallow.model.layers[:1]
    shallow.config.num_hidden_layers = 1
    with pytest.raises(DataError, match=r"the base has no blk\.1\.attn_q\.weight\.lora_a; want an adapter for"):
        read(path, attached("llama", base=shallow).model)
    layers = dict(list(llama.read().layers.items())[:1])
    (name,) = layers
    wide = replace(layers[name], a=np.zeros((4, 25), np.float32))
    write(path, llama.model, {name: wide}, 7)
    with pytest.raises(DataError, match=r"blk\.0\.attn_q\.weight has factors \(4, 25\) and \(24, 4\); want \(r, 24\)"):
        read(path, llama.model)
    write(path, llama.model, layers, 7)
    path.write_bytes(path.read_bytes().replace(b"attn_q.weight.lora_b", b"attn_v.weight.lora_b"))
    with pytest.raises(DataError, match=r"blk\.0\.attn_q\.weight has one factor; want both"):
        read(path, llama.model)
    path.write_bytes(b"GGUF")
    with pytest.raises(DataError, match="not a GGUF file, or damaged"):
        read(path, llama.model)


def test_an_adapter_on_a_packed_base_is_exported_as_it_is(tmp_path):
    from fedpeft.training.quantised import quantise

    base = build("gpt2")
    names = {id(x): n for n, x in base.named_parameters()}
    bridge = attached("gpt2", base=base)
    quantise(bridge.model, "int8", names, torch.float32)
    assert export_gguf(bridge, tmp_path, some_tail(bridge)) <= 1e-5
    assert json.dumps(sorted(tensors(tmp_path / "adapter.gguf")))
