"""Each translated operation, in onnxruntime, is torch's own: with open sizes, at others than the traced ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedpeft.errors import ConfigError
from fedpeft.training.packed_file import PackedFile
from fedpeft.training.step_compile import translate
from fedpeft.training.step_graph import Graph
from fedpeft.training.step_trace import Traced, _recorded, _StandIns
from fedpeft.training.step_values import KINDS, sizes
from fedpeft.training.step_weights import Stored

NOTHING = Stored(PackedFile(Path("nothing"), {}, {}, (), {}))
SHAPES = {"x": ("rows", "length", 6), "y": ("rows", "length", 6), "mask": ("rows", "length"), "v": (6,), "w": (6, 8)}
INTEGERS = ("mask",)


def given(rows: int, length: int) -> dict[str, np.ndarray]:
    rng, sizes = np.random.default_rng(4), {"rows": rows, "length": length}
    found = {}
    for n, shape in SHAPES.items():
        real = [sizes.get(s, s) for s in shape]
        found[n] = rng.integers(0, 3, real) if n in INTEGERS else rng.normal(0, 1.2, real).astype(np.float32)
    return found


def graph_of(function: Callable[..., Tensor]) -> onnx.ModelProto:
    stand_ins = _StandIns()
    fed = [stand_ins.of(x, torch.int64 if n in INTEGERS else torch.float32) for n, x in SHAPES.items()]
    made = _recorded(lambda *some: [function(*some)], fed, "Thing")
    names = [x.name for x in made.graph.nodes if x.op == "placeholder"]
    traced = Traced(made, dict(zip(SHAPES, names, strict=True)), {}, {}, ("out",), SHAPES)
    graph, values = translate(traced, NOTHING, "Thing")
    kind = onnx.helper.make_tensor_value_info
    (result,) = made.graph.find_nodes(op="output")[0].args[0]
    out = kind("out", KINDS[result.meta["val"].dtype][0], [None] * result.meta["val"].ndim)
    inputs = [kind(n, KINDS[torch.int64 if n in INTEGERS else torch.float32][0], list(x)) for n, x in SHAPES.items()]
    return graph.model(inputs, [out], graph.needed(values.values()), values)


def slope(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The gradient of a function's sum of squares by its first argument."""

    def of(x: Tensor, *rest: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x, *rest).square().sum(), x)[0]

    return of


def swapped(x: Tensor, at: int) -> Tensor:
    return torch.cat([x[..., at:] * -1, x[..., :at]], -1)


def by_weight(x: Tensor, y: Tensor, mask: Tensor, v: Tensor, w: Tensor) -> Tensor:
    v = v.detach().requires_grad_()
    out = functional.layer_norm(x, (6,), v, v * 0.5)
    return torch.autograd.grad((out * y).sum(), v)[0]


def table_slope(x: Tensor, y: Tensor, mask: Tensor, v: Tensor, w: Tensor) -> Tensor:
    w = w.detach().requires_grad_()
    out = functional.embedding(mask, w)
    return torch.autograd.grad((out * out * (mask[..., None] + 1)).sum(), w)[0]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add and scale": lambda x, y, *_: torch.add(x, y, alpha=0.3) * 2 - 0.5,
    "sub and divide": lambda x, y, *_: torch.sub(x, y, alpha=2) / (y.abs() + 1) / 3,
    "rsub": lambda x, *_: 1 - x,
    "reversed division": lambda x, *_: 2 / (x.abs() + 1),
    "powers": lambda x, *_: x**1 + x**2 - x**3 + x.abs() ** 0.5 + x.abs() ** 1.7,
    "roots": lambda x, *_: torch.rsqrt(x.abs() + 0.1) + torch.sqrt(x.abs()) + torch.reciprocal(x.abs() + 1),
    "exp and log": lambda x, *_: torch.exp(x) + torch.log(x.abs() + 0.1),
    "circles": lambda x, *_: torch.cos(x) - 2 * torch.sin(x),
    "sigmoid, tanh, erf": lambda x, *_: torch.sigmoid(x) + 2 * torch.tanh(x) - torch.erf(x),
    "relu": lambda x, *_: torch.relu(x) - x.neg().relu(),
    "slope of sigmoid": slope(lambda x, *_: torch.sigmoid(x)),
    "slope of tanh": slope(lambda x, *_: torch.tanh(x)),
    "slope of relu": slope(lambda x, *_: torch.relu(x)),
    "slope of silu": slope(lambda x, *_: functional.silu(x)),
    "gelu": lambda x, *_: functional.gelu(x),
    "gelu by tanh": lambda x, *_: functional.gelu(x, approximate="tanh"),
    "slope of gelu": slope(lambda x, *_: functional.gelu(x)),
    "slope of gelu by tanh": slope(lambda x, *_: functional.gelu(x, approximate="tanh")),
    "softmax": lambda x, *_: torch.softmax(x, 1),
    "slope of softmax": slope(lambda x, *_: torch.softmax(x, -1)),
    "log softmax": lambda x, *_: torch.log_softmax(x, -1),
    "slope of log softmax": slope(lambda x, *_: torch.log_softmax(x, 1)),
    "layer norm": lambda x, y, mask, v, w: functional.layer_norm(x, (6,), v, v * 0.5, 1e-3),
    "slope of layer norm": slope(lambda x, y, mask, v, w: functional.layer_norm(x, (6,), v, v)),
    "slope of layer norm without weight": slope(lambda x, *_: functional.layer_norm(x, (6,))),
    "slope of layer norm by its weight": by_weight,
    "mean": lambda x, *_: x.mean(-1, keepdim=True) + x.mean(dim=(0, 2))[None, :, None],
    "sum": lambda x, *_: x.sum(1) + x.sum(),
    "largest": lambda x, *_: x.amax(dim=1, keepdim=True) + x.mean(),
    "argmax": lambda x, *_: x.argmax(-1) + x.argmax(1, keepdim=True).sum(-1),
    "comparisons": lambda x, y, *_: (x < y).long() + 2 * (x <= 0).long() + 4 * (x > y).long() + 8 * (x >= 0.5).long(),
    "equality": lambda x, y, mask, *_: (mask == 1).long() + 2 * (mask != 2).long() + 4 * (mask == mask * mask).long(),
    "mixed comparison": lambda x, y, mask, *_: (x > mask[..., None]) & (x < 1.5),
    "logic": lambda x, y, mask, *_: ((mask > 0) & (mask < 2)) | ~(mask > 1).logical_and(mask > 0),
    "exclusive or": lambda x, y, *_: (x > 0) ^ (y > 0),
    "where": lambda x, y, mask, *_: torch.where(mask[..., None] > 0, x, y) + torch.where(x > 0, 1.0, y),
    "masked fill": lambda x, y, mask, *_: x.masked_fill(mask[..., None] > 1, -7.0),
    "clamp": lambda x, *_: x.clamp(-0.5, 0.7) + x.clamp(min=0.1) + x.clamp(max=0.2),
    "extremes": lambda x, y, *_: torch.maximum(x, y) - 2 * torch.minimum(x, y),
    "cumulative sum": lambda x, y, mask, *_: mask.cumsum(1) * mask + mask.cumsum(-2),
    "product": lambda x, y, mask, v, w: x @ w,
    "product and bias": lambda x, y, mask, v, w: torch.addmm(w[0], x.reshape(-1, 6), w),
    "product of transposes": lambda x, y, mask, v, w: x.reshape(-1, 6).t().mm(y.reshape(-1, 6)).t().mm(w),
    "batched products": lambda x, y, *_: torch.bmm(x, y.transpose(1, 2)),
    "batched product and more": lambda x, y, *_: torch.baddbmm(x.sum(-1, keepdim=True), x, y.mT, beta=0.5, alpha=2),
    "transposes": lambda x, *_: x.permute(2, 0, 1).transpose(-1, 0) * 2,
    "transpose of one row": lambda x, y, mask, v, w: v[None, None].transpose(0, 1).transpose(1, 2) * x.mT,
    "views": lambda x, *_: x.reshape(x.shape[0], -1, 3, 2).flatten(0, 1)[:, None].squeeze(1),
    "expand": lambda x, y, mask, v, w: (v.expand(mask.shape[0], -1) * 2).reshape(-1, 3),
    "slices": lambda x, *_: x[:, 1:, 2:5] + x[:, :-1, -4:-1],
    "steps": lambda x, *_: x[..., ::2],
    "slope of slices": slope(lambda x, *_: x[:, 1:, :4] * 2),
    "slope of halves": slope(lambda x, *_: swapped(x, 2) + 2 * swapped(x, 4)),
    "slope of thirds": slope(lambda x, *_: x[..., 1:3].repeat(1, 1, 3) + x[..., 3:5].repeat(1, 1, 3)),
    "select": lambda x, *_: x[:, 0] + x[:, -1] - x[:, :, 2].sum(-1, keepdim=True),
    "slope of select": slope(lambda x, *_: x[:, -1]),
    "split": lambda x, *_: torch.cat(x.split(2, -1)[::-1], -1) + torch.cat(x.split([1, 5], -1)[::-1], -1),
    "repeat": lambda x, *_: x.repeat(1, 2, 3) + x.repeat(1, 1, 1).repeat(1, 2, 3),
    "repeat in front": lambda x, y, mask, v, w: v.repeat(3, 2),
    "pick": lambda x, y, mask, v, w: w[mask] + w.index_select(0, mask.flatten()).reshape(*mask.shape, -1),
    "pick columns": lambda x, y, mask, v, w: x[:, :, mask[0]],
    "pick cells": lambda x, *_: x[torch.arange(x.shape[0]), x.argmax(1)[:, 0]],
    "slope of pick cells": slope(lambda x, *_: x[torch.arange(x.shape[0]), x.argmax(1)[:, 0]]),
    "slope of repeated picks": slope(lambda x, y, mask, *_: x.reshape(-1, 6)[mask.flatten()]),
    "gather": lambda x, y, mask, *_: x.gather(2, mask[..., None]),
    "slope of gather": slope(lambda x, y, mask, *_: x.gather(2, mask[..., None])),
    "scatter": lambda x, y, mask, *_: x.scatter(2, mask[..., None], 3.0),
    "embedding": lambda x, y, mask, v, w: functional.embedding(mask, w),
    "slope of embedding": table_slope,
    "ranges": lambda x, *_: (
        torch.arange(x.shape[1]) + torch.arange(2, x.shape[1] + 2) * torch.arange(0, 2 * x.shape[1], 2)
    ),
    "constants": lambda x, *_: torch.zeros_like(x) + torch.ones(x.shape[1], 1) * torch.full((6,), 2.5) + x.new_ones(6),
    "sizes as numbers": lambda x, *_: x * x.shape[1] + x.shape[0] * 2,
    "triangles": lambda x, *_: x.tril() + 2 * x.triu(1) + x.tril(-1),
    "padding": lambda x, *_: functional.pad(x, (1, 2, 0, 3), value=1.5),
    "types": lambda x, y, mask, *_: mask.float() * 0.5 + mask.bool().float() + (mask * 1.5).int(),
    "losses": lambda x, y, mask, *_: functional.cross_entropy(x.reshape(-1, 6), mask.flatten(), reduction="none"),
    "slope of losses": slope(
        lambda x, y, mask, *_: functional.cross_entropy(x.reshape(-1, 6), mask.flatten(), reduction="none")
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_operation_is_torchs_own(name):
    session = onnxruntime.InferenceSession(graph_of(FUNCTIONS[name]).SerializeToString())
    for rows, length in ((2, 5), (4, 9)):
        feed = given(rows, length)
        want = FUNCTIONS[name](*(torch.from_numpy(x) for x in feed.values())).detach().numpy()
        (got,) = session.run(["out"], {x.name: feed[x.name] for x in session.get_inputs()})
        assert got.dtype == want.dtype
        # a few sums and products of numbers about 1, in another order: 1e-5 of the largest
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, float(np.abs(want.astype(float)).max())))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x, *_: torch.cumprod(x, 1), "aten.cumprod.default.*not in the table"),
        (lambda x, y, mask, *_: mask & mask, "bits of integers"),
        (lambda x, *_: x[:, x.argmax(1)[0], x.argmax(1)[1]], "axes that are not the first ones"),
        (lambda x, *_: x.argmax(), "the largest of all axes"),
        (lambda x, *_: torch.arange(0.5, 3.0), "a range of"),
        (lambda x, y, mask, v, w: torch.addmm(w[0], x.reshape(-1, 6), w, alpha=2), "a product with factors"),
        (slope(lambda x, *_: x[:, ::2]), "a step of 2"),
        (lambda x, y, mask, *_: functional.nll_loss(x[:, 0], mask[:, 0]), "a weighted or reduced loss"),
    ],
)
def test_what_has_no_translation_is_refused(function, why):
    with pytest.raises(ConfigError, match=rf"model\.name: Thing computes .*({why})"):
        graph_of(function)


def test_code_that_asks_for_numbers_is_refused():
    with pytest.raises(ConfigError, match=r"model\.name: Thing can't be traced for any batch"):
        graph_of(lambda x, y, mask, *_: x * int(mask.max()))


def test_halves_that_are_swapped_have_a_slope_without_zeros():
    """Rotary positions swap halves in each layer; their slope is the two side by side, not a sum of padded ones."""
    model = graph_of(slope(lambda x, *_: swapped(x, 2)))
    assert "Pad" not in {x.op_type for x in model.graph.node}
    model = graph_of(slope(lambda x, *_: x[..., 1:3].repeat(1, 1, 3) + x[..., 3:5].repeat(1, 1, 3)))
    assert [x.op_type for x in model.graph.node].count("Pad") == 2


def test_a_reshape_of_open_sizes_reads_no_size_that_stays_or_is_alone():
    graph = Graph("file")
    rows, length = sizes(_StandIns().of(("rows", "length"), torch.int64).shape)
    graph.shapes["x"] = (rows, length, 6)
    graph.symbols = {rows: ("x", 0), length: ("x", 1)}
    for want, cells in [
        ((rows * length, 6), [-1, 6]),
        ((rows, length, 2, 3), [0, 0, 2, 3]),
        ((rows, 6, length), [0, 6, -1]),
    ]:
        name = graph.reshape("x", want)
        shape = onnx.numpy_helper.to_array(graph.constants[graph.nodes[-1].input[1]]).tolist()
        assert graph.shapes[name] == want
        assert shape == cells
    assert graph.reshape("x", (rows, length, 6)) == "x"
    graph.reshape("x", (length, rows, 6))
    assert graph.nodes[-1].input[1] == graph.vector((length, rows, 6))
    assert [x.op_type for x in graph.nodes].count("Shape") == 2
