"""A language model's head in the graph of a step: of many words, against the same in fp64."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from fedpeft.training.packed_file import read, write
from fedpeft.training.step_graph import Graph
from fedpeft.training.step_values import Weight
from fedpeft.training.step_weights import GROUP, WORDS, Stored, _summed

UNITS, WIDTH, LOW = 5, 6, -16.9


def ran(graph: Graph, outputs: dict[str, str], feeds: dict[str, np.ndarray], file: Path) -> list[np.ndarray]:
    """Some values of a graph, on one thread as it comes."""
    kind, kinds = onnx.helper.make_tensor_value_info, onnx.helper.np_dtype_to_tensor_dtype
    inputs = [kind(n, kinds(x.dtype), x.shape) for n, x in feeds.items()]
    model = graph.model(inputs, [onnx.ValueInfoProto(name=n) for n in outputs], graph.nodes, outputs)
    file.write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options).run(list(outputs), feeds)


@pytest.mark.parametrize(("words", "sure"), [(WORDS, 0), (2 * WORDS + GROUP + 19, WORDS)])
def test_words_that_are_unlikely_one_by_one_are_not_lost_beside_one_that_is_sure(words, sure, tmp_path):
    """Each has p = 5e-8, of which a sum in fp32 that is 1 already keeps nothing, and together they have 4e-4 or more.
    Added one after another an eighth of them is lost, and losses are off by 5e-5."""
    rng = np.random.default_rng(7)
    table = rng.normal(0, 1, (words, WIDTH)).astype(np.float32)
    table[:, 0] = LOW
    table[sure, 0] = 0
    hidden = rng.normal(0, 0.01, (UNITS, WIDTH)).astype(np.float32)
    hidden[:, 0] = 1
    targets = np.array([sure, 3, words // 2, sure, 11])
    write(tmp_path / "base.safetensors", {"head": table}, ())
    graph = Graph("base.safetensors")
    graph.shapes |= {"hidden": hidden.shape, "targets": targets.shape}
    stored = Stored(read(tmp_path / "base.safetensors"))
    values = stored.losses(graph, "hidden", Weight("head"), None, "targets", slope=True)
    outputs = dict(zip(("losses", "hits", "slope"), values, strict=True))
    losses, hits, slope = ran(graph, outputs, {"hidden": hidden, "targets": targets}, tmp_path / "head.onnx")

    logits = hidden.astype(np.float64) @ table.T.astype(np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    total = shares.sum(axis=1, keepdims=True)
    want = np.log(total[:, 0]) + logits.max(axis=1) - logits[np.arange(UNITS), targets]
    np.testing.assert_array_equal(hits, targets == sure)
    assert total.min() > 1 + 3e-4
    # of losses of 4e-4, a few steps of fp32 at 1, measured at 7e-8; of others, and of slopes, those at 17: 3e-6
    np.testing.assert_allclose(losses[hits], want[hits], rtol=0, atol=1e-6)
    np.testing.assert_allclose(losses, want, rtol=0, atol=6e-6)
    np.testing.assert_allclose(slope, shares / total @ table - table[targets], rtol=0, atol=6e-6)


@pytest.mark.parametrize("columns", [1, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP])
@pytest.mark.parametrize("rows", [0, 3])
def test_a_sum_in_groups_is_the_sum_of_any_number_of_columns(columns, rows, tmp_path):
    x = np.random.default_rng(columns).normal(0, 1, (rows, columns)).astype(np.float32)
    graph = Graph("nothing")
    (got,) = ran(graph, {"sums": _summed(graph, "x", columns)}, {"x": x}, tmp_path / "sum.onnx")
    assert got.shape == (rows, 1)
    np.testing.assert_allclose(got[:, 0], x.astype(np.float64).sum(axis=1), rtol=0, atol=1e-5)
