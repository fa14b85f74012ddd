"""Torch's arithmetic, comparisons, sums and products as nodes of an ONNX graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fedpeft.training.step_values import Flipped, Placed, Translation, Value, Weight, of

_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "maximum": "Max", "minimum": "Min"}
_UNARY = {
    "neg": "Neg",
    "abs": "Abs",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "reciprocal": "Reciprocal",
    "cos": "Cos",
    "sin": "Sin",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "relu": "Relu",
    "erf": "Erf",
    "bitwise_not": "Not",
    "logical_not": "Not",
}
_COMPARISONS = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}
_LOGICAL = {"bitwise_and": "And", "bitwise_or": "Or", "logical_and": "And", "logical_or": "Or", "bitwise_xor": "Xor"}


def _kind(node: fx.Node) -> str:
    return str(node.target).split(".")[1]


@of(*(f"aten.{n}.default" for n in _UNARY))
def _unary(t: Translation, node: fx.Node, x: fx.Node) -> Value:
    kind = _kind(node)
    if kind in ("bitwise_not", "logical_not"):
        return t.each("Not", t.cast(t.loose(x), t.dtype(x), torch.bool))
    return t.each(_UNARY[kind], t.operand(x, t.dtype(node)))


@of(
    *(f"aten.{n}.{o}" for n in ("add", "sub", "mul", "div") for o in ("Tensor", "Scalar")),
    "aten.maximum.default",
    "aten.minimum.default",
)
def _binary(t: Translation, node: fx.Node, x: Any, y: Any, alpha: float = 1) -> Value:
    kind, dtype = _kind(node), t.dtype(node)
    if kind == "add" and alpha == 1 and isinstance(y, fx.Node):
        joined = _joined(t, t.values.get(x), t.values.get(y))
        if joined:
            return joined
    left, right = t.operand(x, dtype), t.operand(y, dtype)
    if alpha != 1:
        right = t.each("Mul", right, t.number(alpha, dtype))
    if not isinstance(y, fx.Node) and y == (0 if kind in ("add", "sub") else 1):
        return left
    return t.each(_BINARY[kind], left, right)


def _joined(t: Translation, x: Value | None, y: Value | None) -> str | None:
    """The sum of two parts of one axis that touch, and are all of it: no more than the two side by side."""
    if not (isinstance(x, Placed) and isinstance(y, Placed)) or (x.axis, x.size) != (y.axis, y.size):
        return None
    first, second = (x, y) if x.start == 0 else (y, x)
    if first.start != 0 or first.stop != second.start or second.stop != second.size:
        return None
    return t.graph.op("Concat", first.name, second.name, axis=x.axis)


@of("aten.rsub.Scalar")
def _rsub(t: Translation, node: fx.Node, x: fx.Node, y: Any, *_: Any) -> Value:
    return t.each("Sub", t.operand(y, t.dtype(node)), t.operand(x, t.dtype(node)))


@of("aten.rsqrt.default")
def _rsqrt(t: Translation, node: fx.Node, x: fx.Node) -> Value:
    return t.each("Reciprocal", t.each("Sqrt", t.operand(x, t.dtype(node))))


@of("aten.pow.Tensor_Scalar")
def _pow(t: Translation, node: fx.Node, x: fx.Node, power: float) -> Value:
    name = t.operand(x, t.dtype(node))
    if power in (1, 2, 3):
        made = name
        for _ in range(int(power) - 1):
            made = t.each("Mul", made, name)
        return made
    if power == 0.5:
        return t.each("Sqrt", name)
    return t.each("Pow", name, t.number(power, t.dtype(node)))


@of(*(f"aten.{n}.{o}" for n in (*_COMPARISONS, "ne") for o in ("Tensor", "Scalar")))
def _comparison(t: Translation, node: fx.Node, x: Any, y: Any) -> Value:
    kind = _kind(node)
    if isinstance(y, fx.Node):
        dtype = torch.promote_types(t.dtype(x), t.dtype(y))
    else:
        dtype = torch.float32 if isinstance(y, float) else t.dtype(x)
    names = t.operand(x, dtype), t.operand(y, dtype)
    return t.each("Not", t.each("Equal", *names)) if kind == "ne" else t.each(_COMPARISONS[kind], *names)


@of(*(f"aten.{n}.{o}" for n in _LOGICAL for o in ("Tensor", "default")))
def _logical(t: Translation, node: fx.Node, x: fx.Node, y: fx.Node) -> Value:
    if t.dtype(node) != torch.bool:
        raise NotImplementedError("bits of integers")
    return t.each(_LOGICAL[_kind(node)], t.operand(x, torch.bool), t.operand(y, torch.bool))


@of("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar")
def _where(t: Translation, node: fx.Node, condition: fx.Node, x: Any, y: Any) -> Value:
    return t.each("Where", t.loose(condition), t.operand(x, t.dtype(node)), t.operand(y, t.dtype(node)))


@of("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(t: Translation, node: fx.Node, x: fx.Node, mask: fx.Node, value: Any) -> Value:
    return t.each("Where", t.loose(mask), t.operand(value, t.dtype(node)), t.operand(x, t.dtype(node)))


@of("aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default")
def _clamp(t: Translation, node: fx.Node, x: fx.Node, *ends: Any) -> Value:
    name, dtype, kind = t.operand(x, t.dtype(node)), t.dtype(node), _kind(node)
    low, high = (*ends, None)[:2] if kind != "clamp_max" else (None, ends[0])
    if low is not None:
        name = t.each("Max", name, t.operand(low, dtype))
    return name if high is None else t.each("Min", name, t.operand(high, dtype))


@of("aten.sum.dim_IntList", "aten.mean.dim", "aten.amax.default")
def _reduced(t: Translation, node: fx.Node, x: fx.Node, axes: Sequence[int] | None, keeps: bool, *_: Any) -> Value:
    kind = {"sum": "ReduceSum", "mean": "ReduceMean", "amax": "ReduceMax"}[_kind(node)]
    name = t.cast(t.full(x), t.dtype(x), t.dtype(node))
    some = [i % len(t.shape(x)) for i in axes] if axes else range(len(t.shape(x)))
    return t.graph.op(kind, name, t.graph.integers(some), keepdims=int(keeps))


@of("aten.sum.default", "aten.mean.default")
def _total(t: Translation, node: fx.Node, x: fx.Node, *_: Any) -> Value:
    return _reduced(t, node, x, None, False)


@of("aten.cumsum.default")
def _cumsum(t: Translation, node: fx.Node, x: fx.Node, axis: int, *_: Any) -> Value:
    where = t.number(axis % len(t.shape(x)), torch.int64)
    return t.graph.op("CumSum", t.cast(t.full(x), t.dtype(x), t.dtype(node)), where)


@of("aten.argmax.default")
def _argmax(t: Translation, node: fx.Node, x: fx.Node, axis: int | None, keeps: bool) -> Value:
    if axis is None:
        raise NotImplementedError("the largest of all axes")
    return t.graph.op("ArgMax", t.full(x), axis=axis, keepdims=int(keeps))


@of("aten.mm.default")
def _mm(t: Translation, node: fx.Node, x: fx.Node, y: fx.Node) -> Value:
    return _product(t, None, x, y)


@of("aten.addmm.default")
def _addmm(t: Translation, node: fx.Node, bias: fx.Node, x: fx.Node, y: fx.Node, beta: float, alpha: float) -> Value:
    if beta != 1 or alpha != 1:
        raise NotImplementedError("a product with factors")
    return _product(t, t.loose(bias), x, y)


def _product(t: Translation, bias: str | None, x: fx.Node, y: fx.Node) -> str:
    right = t.values[y]
    if isinstance(right, Weight):
        return t.weights.product(t.graph, t.full(x), right, bias)
    sides = [v if isinstance(v := t.values[z], Flipped) else t.full(z) for z in (x, y)]
    names = [v.name if isinstance(v, Flipped) else v for v in sides]
    flips = [int(isinstance(v, Flipped)) for v in sides]
    return t.graph.op("Gemm", *names, *([bias] if bias else []), transA=flips[0], transB=flips[1])


@of("aten.bmm.default")
def _bmm(t: Translation, node: fx.Node, x: fx.Node, y: fx.Node) -> Value:
    return t.graph.op("MatMul", t.full(x), t.full(y))


@of("aten.baddbmm.default")
def _baddbmm(t: Translation, node: fx.Node, bias: fx.Node, x: fx.Node, y: fx.Node, beta: float, alpha: float) -> Value:
    product = t.graph.op("MatMul", t.full(x), t.full(y))
    t.graph.shapes[product] = t.shape(node)
    if alpha != 1:
        product = t.each("Mul", product, t.number(alpha, torch.float32))
    more = t.loose(bias)
    return t.each("Add", product, more if beta == 1 else t.each("Mul", more, t.number(beta, torch.float32)))
