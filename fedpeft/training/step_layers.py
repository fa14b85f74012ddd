"""Torch's softmax, norms, activation functions and losses, with their slopes, as nodes of an ONNX graph."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fedpeft.training.step_trace import HEAD
from fedpeft.training.step_values import Translation, Value, Weight, of


@of("aten._softmax.default")
def _softmax(t: Translation, node: fx.Node, x: fx.Node, axis: int, *_: Any) -> Value:
    return t.graph.op("Softmax", t.full(x), axis=axis)


@of("aten._log_softmax.default")
def _log_softmax(t: Translation, node: fx.Node, x: fx.Node, axis: int, *_: Any) -> Value:
    return t.graph.op("LogSoftmax", t.full(x), axis=axis)


@of("aten._softmax_backward_data.default")
def _softmax_backward(t: Translation, node: fx.Node, slope: fx.Node, y: fx.Node, axis: int, *_: Any) -> Value:
    out = t.full(y)
    weighted = t.each("Mul", t.full(slope), out)
    return t.each("Sub", weighted, t.each("Mul", out, _reduced(t, weighted, [axis])))


@of("aten._log_softmax_backward_data.default")
def _log_softmax_backward(t: Translation, node: fx.Node, slope: fx.Node, y: fx.Node, axis: int, *_: Any) -> Value:
    given = t.full(slope)
    return t.each("Sub", given, t.each("Mul", t.each("Exp", t.full(y)), _reduced(t, given, [axis])))


def _reduced(t: Translation, name: str, axes: Sequence[int], kind: str = "ReduceSum", keeps: bool = True) -> str:
    shape = t.graph.shapes[name]
    some = [i % len(shape) for i in axes]
    made = t.graph.op(kind, name, t.graph.integers(some), keepdims=int(keeps))
    kept = [1 if i in some else x for i, x in enumerate(shape) if keeps or i not in some]
    t.graph.shapes[made] = tuple(kept)
    return made


@of("aten.nll_loss_forward.default")
def _nll(t: Translation, node: fx.Node, logs: fx.Node, targets: fx.Node, weight: Any, reduction: int, *_: Any) -> Value:
    if weight is not None or reduction:
        raise NotImplementedError("a weighted or reduced loss")
    rows = t.shape(targets)
    where = t.graph.reshape(t.full(targets), (*rows, 1))
    found = t.graph.op("GatherElements", t.full(logs), where, axis=1)
    t.graph.shapes[found] = (*rows, 1)
    made = t.graph.op("Neg", t.graph.reshape(found, rows))
    t.graph.shapes[made] = rows
    return made, made


@of("aten.nll_loss_backward.default")
def _nll_backward(t: Translation, node: fx.Node, slope: fx.Node, logs: fx.Node, targets: fx.Node, *_: Any) -> Value:
    rows = t.shape(targets)
    where = t.graph.reshape(t.full(targets), (*rows, 1))
    new = t.graph.reshape(t.graph.expand(t.each("Neg", t.loose(slope)), rows), (*rows, 1))
    zeros = t.graph.expand(t.number(0, torch.float32), t.shape(node))
    return t.graph.op("ScatterElements", zeros, where, new, axis=1)


@of("aten.native_layer_norm.default")
def _layer_norm(
    t: Translation,
    node: fx.Node,
    x: fx.Node,
    shape: Sequence[int],
    weight: fx.Node | None,
    bias: fx.Node | None,
    epsilon: float,
) -> Value:
    scale = t.graph.constant(np.ones(shape, np.float32)) if weight is None else t.full(weight)
    more = [] if bias is None else [t.full(bias)]
    return t.graph.ops("LayerNormalization", 3, t.full(x), scale, *more, axis=-len(shape), epsilon=epsilon)


@of("aten.native_layer_norm_backward.default")
def _layer_norm_backward(
    t: Translation,
    node: fx.Node,
    slope: fx.Node,
    x: fx.Node,
    shape: Sequence[int],
    mean: fx.Node,
    scale: fx.Node,
    weight: fx.Node | None,
    bias: fx.Node | None,
    mask: Sequence[bool],
) -> Value:
    dims = len(t.shape(x))
    inner, outer = list(range(dims - len(shape), dims)), list(range(dims - len(shape)))
    given = t.full(slope)
    unit = t.each("Mul", t.each("Sub", t.full(x), t.full(mean)), t.full(scale))
    out = ["", "", ""]
    if mask[0]:
        inside = given if weight is None else t.each("Mul", given, t.loose(weight))
        along = t.each("Mul", unit, _reduced(t, t.each("Mul", inside, unit), inner, "ReduceMean"))
        level = t.each("Sub", inside, _reduced(t, inside, inner, "ReduceMean"))
        out[0] = t.each("Mul", t.each("Sub", level, along), t.full(scale))
    if mask[1]:
        out[1] = _reduced(t, t.each("Mul", given, unit), outer, keeps=False)
    if mask[2]:
        out[2] = _reduced(t, given, outer, keeps=False)
    return tuple(out)


@of("aten.silu.default")
def _silu(t: Translation, node: fx.Node, x: fx.Node) -> Value:
    name = t.loose(x)
    return t.each("Mul", name, t.each("Sigmoid", name))


@of("aten.silu_backward.default")
def _silu_backward(t: Translation, node: fx.Node, slope: fx.Node, x: fx.Node) -> Value:
    name, one = t.loose(x), t.number(1, torch.float32)
    gate = t.each("Sigmoid", name)
    inside = t.each("Add", one, t.each("Mul", name, t.each("Sub", one, gate)))
    return t.each("Mul", t.each("Mul", t.loose(slope), gate), inside)


@of("aten.gelu.default")
def _gelu(t: Translation, node: fx.Node, x: fx.Node, approximate: str) -> Value:
    return t.graph.op("Gelu", t.full(x), approximate=approximate)


@of("aten.gelu_backward.default")
def _gelu_backward(t: Translation, node: fx.Node, slope: fx.Node, x: fx.Node, approximate: str) -> Value:
    def times(name: str, factor: float) -> str:
        return t.each("Mul", name, t.number(factor, torch.float32))

    def plus(name: str, term: float) -> str:
        return t.each("Add", name, t.number(term, torch.float32))

    name = t.loose(x)
    square = t.each("Mul", name, name)
    if approximate == "none":
        share = times(plus(t.each("Erf", times(name, math.sqrt(0.5))), 1.0), 0.5)
        density = times(t.each("Exp", times(square, -0.5)), 1 / math.sqrt(2 * math.pi))
        return t.each("Mul", t.loose(slope), t.each("Add", share, t.each("Mul", name, density)))
    root = math.sqrt(2 / math.pi)
    inside = t.each("Mul", name, plus(times(square, 0.044715 * root), root))
    bend = t.each("Tanh", inside)
    steep = t.each("Sub", t.number(1, torch.float32), t.each("Mul", bend, bend))
    rise = t.each("Mul", name, plus(times(square, 3 * 0.044715 * root), root))
    whole = times(plus(t.each("Add", bend, t.each("Mul", rise, steep)), 1.0), 0.5)
    return t.each("Mul", t.loose(slope), whole)


@of("aten.tanh_backward.default")
def _tanh_backward(t: Translation, node: fx.Node, slope: fx.Node, y: fx.Node) -> Value:
    name = t.loose(y)
    return t.each("Mul", t.loose(slope), t.each("Sub", t.number(1, torch.float32), t.each("Mul", name, name)))


@of("aten.sigmoid_backward.default")
def _sigmoid_backward(t: Translation, node: fx.Node, slope: fx.Node, y: fx.Node) -> Value:
    name = t.loose(y)
    rest = t.each("Sub", t.number(1, torch.float32), name)
    return t.each("Mul", t.loose(slope), t.each("Mul", name, rest))


@of("aten.threshold_backward.default")
def _threshold_backward(t: Translation, node: fx.Node, slope: fx.Node, x: fx.Node, least: float) -> Value:
    passes = t.each("Greater", t.loose(x), t.number(least, torch.float32))
    return t.each("Where", passes, t.loose(slope), t.number(0, torch.float32))


@of(HEAD.replace("::", ".") + ".default")
def _head(t: Translation, node: fx.Node, hidden: fx.Node, weight: fx.Node, bias: Any, targets: fx.Node) -> Value:
    value = t.values[weight]
    if not isinstance(value, Weight):
        raise NotImplementedError("a head that is trained")
    slope = any(x.args[1] == 2 for x in node.users)
    more = None if bias is None else t.full(bias)
    return t.weights.losses(t.graph, t.full(hidden), value, more, t.full(targets), slope)
