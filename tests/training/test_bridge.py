"""The bridge by itself: scales, names, what is read and written, what is refused."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from fedpeft.adapters import Adapter, same
from fedpeft.errors import ConfigError
from fedpeft.training.bridge import Bridge
from fedpeft.training.methods import Method
from tests.training.peft_cases import PEFT_WARNINGS, TASKS, build, logits, rescaled, spread, train

pytestmark = [pytest.mark.filterwarnings(x) for x in PEFT_WARNINGS]


def put(model: str, method: Method, seed: int = 1) -> Bridge:
    return Bridge.attach(build(model), method, TASKS[model], seed)


SCALES: Mapping[str, tuple[str, Method, Mapping[str, float]]] = {
    "alpha over r": ("llama", Method(rank=5, alpha=12.0), {"": 12 / 5}),
    "rsLoRA": ("llama", Method("rslora", rank=5, alpha=12.0), {"": 12 / 5**0.5}),
    "rank pattern": (
        "llama",
        Method(rank=5, alpha=12.0, options={"rank_pattern": {"layers.0.self_attn.v_proj": 3}}),
        {"layers.0.self_attn.v_proj": 12 / 3, "": 12 / 5},
    ),
    "alpha pattern": (
        "llama",
        Method(rank=5, alpha=12.0, options={"alpha_pattern": {"q_proj": 7}}),
        {"q_proj": 7 / 5, "": 12 / 5},
    ),
    "patterns and rsLoRA": (
        "bert",
        Method(
            rank=5, alpha=9.0, options={"rank_pattern": {"query": 2}, "alpha_pattern": {"value": 4}, "use_rslora": True}
        ),
        {"query": 9 / 2**0.5, "value": 4 / 5**0.5},
    ),
    "Conv1D": ("gpt2", Method(rank=5, alpha=12.0, targets=("c_attn", "c_fc", "mlp.c_proj")), {"": 12 / 5}),
    "Conv2d": ("vit", Method(rank=5, alpha=12.0, targets=("projection", "fc1")), {"": 12 / 5}),
    "Embedding": ("bert", Method(rank=5, alpha=12.0, targets=("word_embeddings", "intermediate.dense")), {"": 12 / 5}),
    "output layer": ("gpt2", Method("rslora", rank=5, alpha=12.0, targets=("lm_head",)), {"": 12 / 5**0.5}),
}


@pytest.mark.parametrize("name", SCALES)
def test_the_product_is_what_pefts_own_merge_adds_to_the_weight(name: str) -> None:
    model, method, scales = SCALES[name]
    bridge = put(model, method)
    bridge.write(spread(bridge.read(), seed=3))
    layers = bridge.read().layers
    assert layers
    modules = dict(bridge.model.named_modules())
    before = {}
    for layer in layers:
        module = modules[layer]
        assert isinstance(module, LoraLayer)
        base = module.get_base_layer()
        before[layer] = (type(base), base.weight.detach().clone())
    twin = copy.deepcopy(bridge.model).merge_and_unload()
    merged = dict(twin.named_modules())
    for layer, x in layers.items():
        assert x.scale == pytest.approx(next(s for end, s in scales.items() if layer.endswith(end)), rel=1e-12)
        kind, weight = before[layer]
        change = merged[layer.removeprefix("base_model.model.")].weight.detach() - weight
        is_transposed = kind is Conv1D or kind is torch.nn.Embedding
        want = change.T if is_transposed else change.flatten(1)
        # fp32 rounding of weights below 1 in size, products of a few entries below 1 and scales below 6.
        np.testing.assert_allclose(x.product(), want.numpy(), atol=5e-6)
        assert np.abs(x.product()).max() > 0.1


def test_reading_what_was_written_gives_it_back_bit_for_bit() -> None:
    bridge = put("bert", Method("dora", rank=5))
    given = spread(bridge.read(), seed=4)
    bridge.write(given)
    assert same(bridge.read(), given)
    logits(bridge.model, "bert")
    assert same(bridge.read(), given)


def test_what_was_read_is_a_copy() -> None:
    bridge = put("bert", Method(rank=5))
    start = bridge.read()
    kept = {n: x.copy() for n, x in start.tensors().items()}
    train(bridge, "bert", seed=1)
    for name, x in start.tensors().items():
        np.testing.assert_array_equal(x, kept[name])
    assert not same(bridge.read(), start)


def test_the_start_depends_on_the_seed_alone_and_leaves_the_global_random_state() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    one = put("llama", Method(rank=5), seed=7).read()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert same(one, put("llama", Method(rank=5), seed=7).read())
    assert not same(one, put("llama", Method(rank=5), seed=8).read())


def test_arrays_that_can_not_be_written_to_and_fp64_ones_are_taken() -> None:
    bridge = put("bert", Method(rank=5))
    given = bridge.read()
    name = next(iter(given.layers))
    b = np.frombuffer(np.full((24, 5), 0.25, np.float32).tobytes(), np.float32).reshape(24, 5)
    bridge.write(given.put({f"{name}/b": b, f"{name}/a": np.full((5, 24), 0.5)}))
    after = bridge.read().layers[name]
    np.testing.assert_array_equal(after.b, b)
    np.testing.assert_array_equal(after.a, np.full((5, 24), 0.5, np.float32))
    assert after.a.dtype == np.float32


def higher(adapter: Adapter) -> Adapter:
    """The adapter with a rank of 7."""
    return replace(adapter, layers={n: x.pad(7) for n, x in adapter.layers.items()})


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (
            lambda x: rescaled(x, 2.0),
            r"query: got 24 x 24 of rank 5 and scale 6.4; want 24 x 24 of rank 5 and scale 3.2",
        ),
        (higher, r"query: got 24 x 24 of rank 7 and scale 3.2; want 24 x 24 of rank 5 and scale 3.2"),
        (lambda x: replace(x, layers={}), r"got none; want 24 x 24"),
        (lambda x: replace(x, dense={}), r"classifier.*: got none; want \(3,\)"),
        (lambda x: replace(x, dense=dict(x.dense) | {"more": np.zeros(2)}), r"more: got \(2,\); want none"),
        (lambda x: replace(x, dense={n: v[:2] for n, v in x.dense.items()}), r"classifier.*: got \(2,\); want \(3,\)"),
        (lambda x: replace(x, fixed={"extra": np.zeros(1)}), r"fixed/extra: got \(1,\) of float64; want none"),
    ],
)
def test_an_adapter_of_another_shape_is_refused_by_the_tensors_name(wrong: object, text: str) -> None:
    bridge = put("bert", Method(rank=5))
    start = bridge.read()
    assert callable(wrong)
    with pytest.raises(ValueError, match=text):
        bridge.write(wrong(start))
    assert same(bridge.read(), start)


def test_what_a_method_draws_travels_as_fixed_and_is_written() -> None:
    one, two = put("bert", Method("cartridge"), seed=1), put("bert", Method("cartridge"), seed=2)
    given = one.read()
    assert list(given.fixed) == ["prompt_encoder.default.frozen_embedding"]
    assert one.read().fixed is given.fixed
    assert not np.array_equal(next(iter(given.fixed.values())), next(iter(two.read().fixed.values())))
    two.write(given)
    assert same(two.read(), given)
    assert torch.equal(logits(one.model, "bert"), logits(two.model, "bert"))


def test_indices_that_peft_keeps_outside_the_state_dict_are_fixed_too() -> None:
    x = put("bert", Method("fourierft", options={"n_frequency": 10})).read()
    assert [n.rsplit(".", 2)[1] for n in x.fixed] == ["indices"] * 4
    assert {v.dtype for v in x.fixed.values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize("parts", ["a", "b", "ab"])
def test_only_the_asked_factors_and_the_dense_leaves_are_trained(parts: str) -> None:
    bridge = put("bert", Method("dora", rank=5))
    start = bridge.read()
    asked = bridge.trainable(parts)
    assert list(asked) == list(start.tensors(parts))
    assert {id(x) for x in asked.values()} == {id(x) for x in bridge.model.parameters() if x.requires_grad}
    bridge.write(spread(start, seed=2))  # With b at zero, a would have no gradient.
    before = bridge.read()
    train(bridge, "bert", seed=1, parts=parts)
    after = bridge.read().tensors()
    moved = {n for n, x in before.tensors().items() if not np.array_equal(x, after[n])}
    assert moved == set(asked)


@pytest.mark.parametrize("parts", ["", "c", "abc"])
def test_other_parts_are_refused(parts: str) -> None:
    with pytest.raises(ValueError, match="want 'a', 'b' or 'ab'"):
        put("bert", Method(rank=5)).trainable(parts)


def test_a_head_is_dense_and_the_base_is_frozen() -> None:
    bridge = put("vit", Method(rank=5))
    assert [n for n, _ in bridge.spec.dense] == [
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    ]
    live = {n for n, x in bridge.model.named_parameters() if x.requires_grad}
    assert len(live) == 2 * len(bridge.spec.layers) + 2


def test_modules_that_the_files_lack_are_trained_with_the_head() -> None:
    fresh = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias")
    bridge = Bridge.attach(build("bert"), Method(rank=5), "classify", seed=1, fresh=fresh)
    names = [n.removeprefix("base_model.model.") for n, _ in bridge.spec.dense]
    assert names == [
        "bert.pooler.dense.modules_to_save.default.weight",
        "bert.pooler.dense.modules_to_save.default.bias",
        "classifier.modules_to_save.default.weight",
        "classifier.modules_to_save.default.bias",
    ]


def test_adalora_has_a_third_factor_and_so_no_pairs() -> None:
    spec = put("bert", Method("adalora", rank=5)).spec
    assert spec.layers == ()
    assert sum("lora_E" in n for n, _ in spec.dense) == 4


def test_dora_has_pairs_and_magnitudes() -> None:
    spec = put("bert", Method("dora", rank=5)).spec
    assert len(spec.layers) == 4
    assert sum("magnitude" in n for n, _ in spec.dense) == 4


def test_trained_tensors_are_fp32_on_a_base_in_bf16() -> None:
    bridge = Bridge.attach(build("bert").to(torch.bfloat16), Method("vera", rank=5), "classify", seed=1)
    assert {x.dtype for x in bridge.trainable("ab").values()} == {torch.float32}
    given = spread(bridge.read(), seed=1)
    bridge.write(given)
    assert same(bridge.read(), given)


def test_a_prompts_length_is_known_where_it_stands_before_the_batch() -> None:
    method = Method("prompt_tuning", options={"num_virtual_tokens": 6})
    assert put("llama", method).prompt_length == 6
    assert put("bert", method).prompt_length == 0
    assert put("llama", Method("prefix_tuning")).prompt_length == 0
    assert put("llama", Method(rank=5)).prompt_length == 0


def test_one_model_takes_one_adapter() -> None:
    bridge = put("bert", Method(rank=5))
    with pytest.raises(ValueError, match="has an adapter already"):
        Bridge.attach(bridge.model.base_model.model, Method(rank=5), "classify", seed=1)


def test_one_tensor_under_two_names_is_refused() -> None:
    method = Method(rank=5, targets=("embed_tokens", "q_proj"), options={"ensure_weight_tying": True})
    with pytest.raises(ConfigError, match="one tensor trained under two names"):
        put("llama", method)


def test_a_target_that_no_module_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"adapter\.targets: got 'q_proj'.*word_embeddings, .*query, key, value, dense"
    ):
        put("bert", Method(targets=("q_proj",)))


def test_a_rank_above_the_matrix_is_refused_by_layer_and_shape() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.rank: got 13 for .*v_proj, a matrix of 12 x 24; want at most 12"):
        put("llama", Method(rank=13))
    put("llama", Method(rank=12))
    pattern = {"rank_pattern": {"layers.1.self_attn.v_proj": 20}}
    with pytest.raises(ConfigError, match=r"got 20 for model\.layers\.1\.self_attn\.v_proj"):
        put("llama", Method(rank=12, options=pattern))


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no classification head"):
        Bridge.attach(build("llama"), Method(), "classify", seed=1)


def test_what_peft_refuses_is_a_config_error_with_its_reason() -> None:
    with pytest.raises(ConfigError, match=r"adapter: peft can't put c3a on BertForSequenceClassification.*256"):
        put("bert", Method("c3a"))


def test_an_unknown_architecture_gets_its_attention_projections() -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=36, num_labels=3
    )
    model = BertForSequenceClassification(config)
    model.config.model_type = "something-new"
    spec = Bridge.attach(model, Method(rank=5), "classify", seed=1).spec
    assert [x.name.rsplit(".", 1)[-1] for x in spec.layers] == ["query", "value"]
