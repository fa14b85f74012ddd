"""The training step as a graph: its losses and gradients are torch's, for any batch and rank, on any frozen weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from fedpeft.errors import ConfigError
from fedpeft.training import step_compile, step_weights
from fedpeft.training.bases import Base
from fedpeft.training.bridge import Bridge
from fedpeft.training.kept_bases import contents
from fedpeft.training.packed_file import read, write
from fedpeft.training.step_compile import compile_step, write_step
from fedpeft.training.step_trace import own_name, trace
from fedpeft.training.step_values import OPERATIONS
from fedpeft.training.step_weights import Stored
from fedpeft.training.values import own_tensors
from tests.training.peft_cases import PEFT_WARNINGS, build
from tests.training.step_cases import CLOSE, METHODS, Made, agree, batch, loaded, of_torch, packed, predictions_of, run

pytestmark = [pytest.mark.filterwarnings(x) for x in PEFT_WARNINGS]


@pytest.fixture(scope="module")
def made():
    """By model: traced once, which takes seconds; weights of any format go into that trace."""
    kept: dict[str, Made] = {}

    def of(model: str) -> Made:
        if model not in kept:
            base, bridge = loaded(model)
            kept[model] = Made(base, bridge, trace(base, bridge, "ab"))
        return kept[model]

    return of


def both(folder: Path, base: Base, bridge: Bridge, sizes: tuple[tuple[int, int], ...] = ((1, 8), (4, 23))) -> None:
    """Both graphs say what torch says, on batches of sizes other than the traced one."""
    for i, (rows, length) in enumerate(sizes):
        feed = batch(base, rows, length, i)
        want = of_torch(base, bridge, feed)
        assert want["losses"].min() > 0
        got = run(folder / "step.onnx", feed, bridge.read())
        agree(got, want)
        alone = run(folder / "evaluate.onnx", feed, bridge.read())
        assert alone.keys() == {"losses", "hits"}
        for n, x in alone.items():
            np.testing.assert_allclose(x, got[n], rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "format", "recompute"),
    [
        ("bert", "none", False),
        ("bert", "int4", True),
        ("llama", "none", True),
        ("llama", "int8", False),
        ("llama", "nf4", False),
        ("gpt2", "none", False),
        ("gpt2", "int8", True),
        ("gpt2", "int4", False),
    ],
)
def test_losses_and_gradients_are_torchs_for_any_batch(made, model, format, recompute, tmp_path):
    base, bridge, weights = packed(model, format, tmp_path)
    write_step(made(model).traced, weights, model, recompute, tmp_path)
    both(tmp_path, base, bridge)


def test_graphs_hold_no_weights_and_name_the_file_that_does(made, tmp_path):
    _, _, weights = packed("llama", "int8", tmp_path)
    write_step(made("llama").traced, weights, "llama", False, tmp_path)
    held = {x for y in weights.file.held for x in (y.codes, y.scales)}
    for n in ("step.onnx", "evaluate.onnx"):
        graph = onnx.load(tmp_path / n, load_external_data=False).graph
        outside = [x for x in graph.initializer if x.data_location == onnx.TensorProto.EXTERNAL]
        assert {x.name.rsplit(".", 1)[0] for x in outside} >= held
        assert {x.value for y in outside for x in y.external_data if x.key == "location"} == {"base.safetensors"}
        assert all(np.prod(x.dims) < 50 for x in graph.initializer if x not in outside)
        onnx.checker.check_model(str(tmp_path / n))


def test_a_batch_and_the_ranks_are_open_and_what_is_fed_has_the_adapters_names(made, tmp_path):
    _, bridge, weights = packed("bert", "none", tmp_path)
    write_step(made("bert").traced, weights, "bert", False, tmp_path)
    graph = onnx.load(tmp_path / "step.onnx", load_external_data=False).graph
    dims = {x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in graph.input}
    assert dims["input_ids"] == dims["attention_mask"] == ["rows", "length"]
    tensors = bridge.read().tensors()
    assert list(dims)[3:] == list(tensors)
    assert [x.name for x in graph.output] == ["losses", "hits", *(f"grad/{n}" for n in tensors)]
    open_ = {n: [d for d in dims[n] if isinstance(d, str)] for n in tensors}
    assert all(len(x) == (n[-2:] in ("/a", "/b")) for n, x in open_.items())
    ranks = [x for (x,) in (y for y in open_.values() if y)]
    assert ranks[0::2] == ranks[1::2]
    assert len(set(ranks)) == len(ranks) // 2


def test_more_directions_are_a_frozen_tail_and_leave_the_others_gradients(made, tmp_path):
    base, bridge, weights = packed("gpt2", "none", tmp_path)
    write_step(made("gpt2").traced, weights, "gpt2", False, tmp_path)
    rng, feed = np.random.default_rng(6), batch(base, 2, 9, 5)
    start = bridge.read()
    name, x = next(iter(start.layers.items()))
    more = replace(
        x,
        a=np.concatenate([x.a, rng.normal(0, 0.3, (3, x.a.shape[1]))]).astype(np.float32),
        b=np.concatenate([x.b, rng.normal(0, 0.3, (len(x.b), 3))], axis=1).astype(np.float32),
    )
    got = run(tmp_path / "step.onnx", feed, replace(start, layers={**start.layers, name: more}))
    wide = Bridge.attach(build("gpt2"), replace(METHODS["gpt2"], rank=7, alpha=7 * 7 / 4), "lm", seed=1)
    ranks = {n: y.pad(7) for n, y in start.layers.items()}
    wide.write(replace(start, layers=ranks | {name: more}))
    own, head = wide.model.base_model.model, wide.model.base_model.model.get_output_embeddings()
    assert head is own.lm_head
    want = of_torch(replace(base, model=own), wide, feed)
    np.testing.assert_allclose(got["losses"], want["losses"], rtol=CLOSE)
    for n in (f"grad/{name}/a", f"grad/{name}/b"):
        np.testing.assert_allclose(got[n], want[n], rtol=0, atol=CLOSE * np.abs(want[n]).max())


def test_a_base_that_is_packed_already_compiles_and_stays_as_it_is_and_may_train_b_alone(tmp_path):
    base, bridge, weights = packed("gpt2", "int8", tmp_path)
    attention, mode = bridge.model.config._attn_implementation, bridge.model.train().training
    modules = [vars(x).keys() for x in bridge.model.modules()]
    compile_step(base, bridge, trains="b", recompute=False, weights=weights.file, folder=tmp_path)
    assert (bridge.model.config._attn_implementation, bridge.model.training) == (attention, mode)
    assert [vars(x).keys() for x in bridge.model.modules()] == modules
    feed = batch(base, 3, 11, 2)
    want = of_torch(base, bridge, feed, "b")
    assert not any(n.endswith("/a") for n in want)
    agree(run(tmp_path / "step.onnx", feed, bridge.read()), want)


@pytest.mark.parametrize("format", ["none", "int8"])
def test_a_head_may_be_seen_some_words_at_a_time(made, format, tmp_path, monkeypatch):
    monkeypatch.setattr(step_weights, "WORDS", 16)  # of 50: three parts and a rest
    base, bridge, weights = packed("llama", format, tmp_path)
    write_step(made("llama").traced, weights, "llama", False, tmp_path)
    both(tmp_path, base, bridge)
    names = {x.name for x in onnx.load(tmp_path / "step.onnx", load_external_data=False).graph.initializer}
    table = "model.embed_tokens.weight" + (".codes.int8" if format == "int8" else ".float")
    assert {f"{table}.{part}" for part in ("0-16", "16-32", "32-48", "48-50")} <= names


def test_of_equal_logits_the_first_is_the_guess_also_across_parts(made, tmp_path, monkeypatch):
    """As in torch: words 3, 20 and 40 are one word; the first of them is the guess, and so a hit."""
    monkeypatch.setattr(step_weights, "WORDS", 16)
    base, bridge = loaded("llama")
    with torch.no_grad():
        table = base.model.get_input_embeddings().weight
        table[[20, 40]] = table[3] * torch.ones(2, 1)
        table[3] *= 1
    content, transposed = contents(bridge.model, base.own)
    write(tmp_path / "base.safetensors", content, transposed)
    write_step(made("llama").traced, Stored(read(tmp_path / "base.safetensors")), "llama", False, tmp_path)
    feed = batch(base, 4, 23, 1)
    guesses = predictions_of(base, bridge, feed)
    feed["targets"] = guesses
    got = run(tmp_path / "step.onnx", feed, bridge.read())
    assert got["hits"].all()
    feed["targets"] = np.where(guesses == 3, 20, guesses)
    got = run(tmp_path / "step.onnx", feed, bridge.read())
    np.testing.assert_array_equal(got["hits"], guesses != 3)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_a_large_weight_may_be_expanded_some_rows_at_a_time(made, model, tmp_path, monkeypatch):
    monkeypatch.setattr(step_weights, "EXPANDED", 24 * 10)  # of 24 columns 10 rows: 24 or 36 rows are parts and a rest
    base, bridge, weights = packed(model, "int8", tmp_path)
    write_step(made(model).traced, weights, model, False, tmp_path)
    both(tmp_path, base, bridge, ((2, 9),))
    names = {x.name for x in onnx.load(tmp_path / "step.onnx", load_external_data=False).graph.initializer}
    assert any(n.endswith(".codes.int8.20-24") for n in names)


@pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
def test_weights_are_expanded_where_they_are_used_and_wait_for_what_they_are_multiplied_with(made, format, tmp_path):
    """Every expansion reads scales that depend on the graph's inputs, so that no runtime can do it beforehand."""
    _, _, weights = packed("bert", format, tmp_path)
    write_step(made("bert").traced, weights, "bert", False, tmp_path)
    graph = onnx.load(tmp_path / "step.onnx", load_external_data=False).graph
    fed = {x.name for x in graph.input}
    products = 0
    for node in graph.node:
        if fed & set(node.input):
            fed |= set(node.output)
        if node.op_type == "DequantizeLinear":
            assert node.input[1] in fed
        if node.op_type == "Gemm":
            products += 1
            assert node.input[1] in fed or "weight" in node.input[1]
    assert products > 40
    kinds = [x.op_type for x in graph.node]
    assert ("DequantizeLinear" in kinds) == (format != "nf4")


def test_what_is_computed_again_is_not_kept(made, tmp_path):
    """Of what the first half makes the second reads less: of two layers one is computed again."""
    _, _, weights = packed("llama", "int8", tmp_path)
    kept = {}
    for recompute in (False, True):
        write_step(made("llama").traced, weights, "llama", recompute, tmp_path)
        nodes = onnx.load(tmp_path / "step.onnx", load_external_data=False).graph.node
        (middle,) = (i for i, x in enumerate(nodes) if x.op_type == "ArgMax")
        early = {x for node in nodes[:middle] if node.op_type != "Shape" for x in node.output}
        kept[recompute] = len(early & {x for node in nodes[middle:] for x in node.input})
    assert 0 < kept[True] < 0.7 * kept[False]


def test_an_operation_that_is_not_in_the_table_is_refused_by_name(made, tmp_path, monkeypatch):
    _, _, weights = packed("bert", "none", tmp_path)
    monkeypatch.delitem(OPERATIONS, "aten.gelu.default")
    with pytest.raises(ConfigError, match=r"model\.name: BertThing computes aten\.gelu\.default.*not in the table"):
        write_step(made("bert").traced, weights, "BertThing", False, tmp_path)


def test_a_weight_that_the_file_lacks_is_named(made, tmp_path):
    _, _, weights = packed("bert", "none", tmp_path)
    tensors = {n: x for n, x in weights.file.tensors.items() if n != "bert.embeddings.LayerNorm.weight"}
    less = Stored(replace(weights.file, tensors=tensors))
    with pytest.raises(
        ConfigError, match=r"bert\.embeddings\.LayerNorm\.weight, which base\.safetensors does not hold"
    ):
        write_step(made("bert").traced, less, "BertThing", False, tmp_path)


def test_a_model_that_fixes_a_batchs_size_is_refused(made, tmp_path):
    traced = made("bert").traced
    fixed = next(n for n, shape in traced.shapes.items() if n.endswith("weight"))
    wrong = replace(traced, shapes={**traced.shapes, fixed: ("rows", *traced.shapes[fixed][1:])})
    _, _, weights = packed("bert", "none", tmp_path)
    with pytest.raises(ConfigError, match=r"the code of BertThing fixes the rows of .*weight to 3"):
        write_step(wrong, weights, "BertThing", False, tmp_path)


def test_a_model_whose_code_asks_for_numbers_is_refused(monkeypatch):
    base, bridge = loaded("bert")
    inner = base.model.bert.embeddings
    monkeypatch.setattr(
        inner, "forward", lambda input_ids=None, **_: inner.word_embeddings(input_ids * int(input_ids.max()))
    )
    with pytest.raises(ConfigError, match=r"model\.name: BertForSequenceClassification can't be traced for any batch"):
        trace(base, bridge, "ab")
    assert bridge.model.config._attn_implementation == "sdpa"


def test_own_tensors_have_the_names_that_a_trace_gives_them():
    found = build("gpt2")
    before = own_tensors(found, ())
    bridge = Bridge.attach(found, METHODS["gpt2"], "lm", seed=1)
    live = {id(x) for x in bridge.live.values()}
    after = {id(x): own_name(n) for n, x in bridge.model.named_parameters() if id(x) not in live}
    assert {i: before[i] for i in after} == after
    assert step_compile._TABLES
