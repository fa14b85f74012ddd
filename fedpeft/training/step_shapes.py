"""Torch's operations on shapes and places, as nodes of an ONNX graph."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fedpeft.training.step_graph import Size
from fedpeft.training.step_values import KINDS, Flipped, Placed, Translation, Value, Weight, broadcast, expression, of

_END = 2**62  # what torch writes for the end of an axis is beyond it


@of(
    "aten.detach.default",
    "aten.clone.default",
    "aten.alias.default",
    "aten.lift_fresh_copy.default",
    "aten.contiguous.default",
)
def _same(t: Translation, node: fx.Node, x: fx.Node, *_: Any) -> Value:
    return t.values[x]


@of("aten._to_copy.default")
def _cast(t: Translation, node: fx.Node, x: fx.Node, *_: Any) -> Value:
    if t.dtype(x) == t.dtype(node):
        return t.values[x]
    return t.cast(t.loose(x), t.dtype(x), t.dtype(node))


@of("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")
def _view(t: Translation, node: fx.Node, x: fx.Node, *_: Any) -> Value:
    if t.shape(x) == t.shape(node):
        return t.values[x]
    return t.graph.reshape(t.full(x), t.shape(node))


@of("aten.expand.default")
def _expand(t: Translation, node: fx.Node, x: fx.Node, *_: Any) -> Value:
    return t.values[x] if t.shape(x) == t.shape(node) else t.loose(x)


@of("aten.unsqueeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default")
def _reshaped(t: Translation, node: fx.Node, x: fx.Node, *_: Any) -> Value:
    return t.graph.reshape(t.full(x), t.shape(node))


@of("aten.t.default")
def _t(t: Translation, node: fx.Node, x: fx.Node) -> Value:
    return flipped(t, x)


@of("aten.transpose.int")
def _transpose(t: Translation, node: fx.Node, x: fx.Node, first: int, second: int) -> Value:
    dims = len(t.shape(node))
    if dims == 2 and first % 2 != second % 2:
        return flipped(t, x)
    order = list(range(dims))
    order[first], order[second] = order[second], order[first]
    return _permuted(t, x, order)


@of("aten.permute.default")
def _permute(t: Translation, node: fx.Node, x: fx.Node, order: Sequence[int]) -> Value:
    where = [i % len(order) for i in order]
    return flipped(t, x) if where == [1, 0] else _permuted(t, x, where)


def flipped(t: Translation, x: fx.Node) -> Value:
    """A matrix's transpose, which a product reads as it stands."""
    value = t.values[x]
    if isinstance(value, Weight):
        return Weight(value.name, not value.flipped)
    if isinstance(value, Flipped):
        t.graph.shapes.setdefault(value.name, t.shape(x)[::-1])
        return value.name
    return Flipped(t.full(x))


def _permuted(t: Translation, x: fx.Node, order: list[int]) -> str:
    name, shape = t.full(x), t.shape(x)
    moved = [i for i in order if shape[i] != 1]
    if moved == sorted(moved):  # nothing but axes of one change places
        return t.graph.reshape(name, tuple(shape[i] for i in order))
    return t.graph.op("Transpose", name, perm=order)


@of("aten.slice.Tensor")
def _slice(t: Translation, node: fx.Node, x: fx.Node, axis: int, start: Any, stop: Any, step: int) -> Value:
    if t.shape(x) == t.shape(node):
        return t.values[x]
    begin, end = _span(t.shape(x)[axis], start, stop)
    names = [t.graph.vector([y]) for y in (begin, end, axis % len(t.shape(x)), step)]
    return t.graph.op("Slice", t.full(x), *names)


@of("aten.slice_backward.default")
def _slice_backward(
    t: Translation, node: fx.Node, x: fx.Node, _: Any, axis: int, start: Any, stop: Any, step: int
) -> Value:
    if t.shape(x) == t.shape(node):
        return t.values[x]
    if step != 1:
        raise NotImplementedError(f"a step of {step}")
    size = t.shape(node)[axis]
    begin, end = _span(size, start, stop)
    return Placed(t.full(x), axis % len(t.shape(node)), begin, end, size)


def _span(size: Size, start: Any, stop: Any) -> tuple[Size, Size]:
    """Where a slice begins and ends, of an axis of this size."""
    ends = [0 if start is None else _of(start), size if stop is None else _of(stop)]
    for i, x in enumerate(ends):
        if isinstance(x, int):
            ends[i] = size if x > _END else x if x >= 0 else size + x
    begin, end = ends
    return begin, min(end, size) if isinstance(end, int) and isinstance(size, int) else end


def _of(x: Any) -> Size:
    return expression(x.meta["val"] if isinstance(x, fx.Node) else x)


@of("aten.select.int")
def _select(t: Translation, node: fx.Node, x: fx.Node, axis: int, index: Any) -> Value:
    at = t.graph.size(_of(index))
    found = t.graph.op("Gather", t.full(x), at, axis=axis)
    shape = list(t.shape(x))
    shape[axis] = 1
    t.graph.shapes[found] = tuple(shape)
    return t.graph.reshape(found, t.shape(node))


@of("aten.select_backward.default")
def _select_backward(t: Translation, node: fx.Node, x: fx.Node, _: Any, axis: int, index: Any) -> Value:
    shape = t.shape(node)
    size, at = shape[axis], _of(index)
    begin = size + at if isinstance(at, int) and at < 0 else at
    one = list(shape)
    one[axis] = 1
    return Placed(t.graph.reshape(t.full(x), tuple(one)), axis % len(shape), begin, begin + 1, size)


@of("aten.cat.default")
def _cat(t: Translation, node: fx.Node, parts: Sequence[fx.Node], axis: int) -> Value:
    names = [t.cast(t.full(x), t.dtype(x), t.dtype(node)) for x in parts]
    return t.graph.op("Concat", *names, axis=axis)


@of("aten.split.Tensor", "aten.split_with_sizes.default")
def _split(t: Translation, node: fx.Node, x: fx.Node, _: Any, axis: int) -> Value:
    lengths = [expression(part.shape[axis]) for part in node.meta["val"]]
    return t.graph.ops("Split", len(lengths), t.full(x), t.graph.vector(lengths), axis=axis)


@of("aten.repeat.default")
def _repeat(t: Translation, node: fx.Node, x: fx.Node, times: Sequence[Any]) -> Value:
    shape = t.shape(x)
    name = t.graph.reshape(t.full(x), (1,) * (len(times) - len(shape)) + shape)
    return t.graph.op("Tile", name, t.graph.vector([_of(y) for y in times]))


@of("aten.embedding.default")
def _embedding(t: Translation, node: fx.Node, table: fx.Node, ids: fx.Node, *_: Any) -> Value:
    value = t.values[table]
    if isinstance(value, Weight):
        return t.weights.rows(t.graph, value, t.full(ids))
    return t.graph.op("Gather", t.full(table), t.full(ids), axis=0)


@of("aten.index_select.default")
def _index_select(t: Translation, node: fx.Node, x: fx.Node, axis: int, index: fx.Node) -> Value:
    return t.graph.op("Gather", t.full(x), t.full(index), axis=axis)


@of("aten.gather.default")
def _gather(t: Translation, node: fx.Node, x: fx.Node, axis: int, index: fx.Node, *_: Any) -> Value:
    return t.graph.op("GatherElements", t.full(x), t.full(index), axis=axis)


@of("aten.scatter.value", "aten.scatter.src", "aten.scatter_add.default")
def _scatter(t: Translation, node: fx.Node, x: fx.Node, axis: int, index: fx.Node, source: Any) -> Value:
    new = t.operand(source, t.dtype(node))
    new = t.graph.expand(new, t.shape(index))
    kind = {"reduction": "add"} if "scatter_add" in str(node.target) else {}
    return t.graph.op("ScatterElements", t.full(x), t.full(index), new, axis=axis, **kind)


@of("aten.index.Tensor")
def _index(t: Translation, node: fx.Node, x: fx.Node, indices: Sequence[fx.Node | None]) -> Value:
    some = [(i, y) for i, y in enumerate(indices) if y is not None]
    if len(some) == 1:
        axis, index = some[0]
        return t.graph.op("Gather", t.full(x), t.full(index), axis=axis)
    return t.graph.op("GatherND", t.full(x), _places(t, indices))


@of("aten.index_put.default", "aten._unsafe_index_put.default")
def _index_put(
    t: Translation, node: fx.Node, x: fx.Node, indices: Sequence[fx.Node | None], values: fx.Node, adds: bool
) -> Value:
    where = _places(t, indices)
    new = t.graph.expand(t.loose(values), (*t.graph.shapes[where][:-1], *t.shape(x)[len(indices) :]))
    return t.graph.op("ScatterND", t.full(x), where, new, reduction="add" if adds else "none")


def _places(t: Translation, indices: Sequence[fx.Node | None]) -> str:
    """Indices of the leading axes, broadcast, as (…, axes)."""
    if None in indices:
        raise NotImplementedError("indices of axes that are not the first ones")
    names = [t.cast(t.loose(x), t.dtype(x), torch.int64) for x in indices if x is not None]
    shape = broadcast([t.graph.shapes[x] for x in names])
    columns = [t.graph.reshape(t.graph.expand(x, shape), (*shape, 1)) for x in names]
    where = columns[0] if len(columns) == 1 else t.graph.op("Concat", *columns, axis=-1)
    t.graph.shapes[where] = (*shape, len(columns))
    return where


@of("aten.embedding_dense_backward.default")
def _embedding_backward(t: Translation, node: fx.Node, slope: fx.Node, ids: fx.Node, *_: Any) -> Value:
    zeros = t.graph.expand(t.number(0, t.dtype(node)), t.shape(node))
    where = t.graph.reshape(t.full(ids), (*t.shape(ids), 1))
    return t.graph.op("ScatterND", zeros, where, t.full(slope), reduction="add")


@of("aten.arange.default")
def _arange(t: Translation, node: fx.Node, stop: Any, *_: Any) -> Value:
    return _range(t, node, 0, stop, 1)


@of("aten.arange.start")
def _arange_start(t: Translation, node: fx.Node, start: Any, stop: Any, *_: Any) -> Value:
    return _range(t, node, start, stop, 1)


@of("aten.arange.start_step")
def _arange_step(t: Translation, node: fx.Node, start: Any, stop: Any, step: Any, *_: Any) -> Value:
    return _range(t, node, start, stop, step)


def _range(t: Translation, node: fx.Node, *ends: Any) -> str:
    names = []
    for x in ends:
        if isinstance(x, float):
            raise NotImplementedError(f"a range of {x}")
        names.append(t.graph.once("Reshape", t.graph.size(_of(x)), t.graph.integers([])))
    found = t.graph.once("Range", *names)
    t.graph.shapes[found] = t.shape(node)
    return t.cast(found, torch.int64, t.dtype(node))


@of(
    "aten.zeros.default",
    "aten.new_zeros.default",
    "aten.zeros_like.default",
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.new_empty.default",
    "aten.empty_permuted.default",
    "aten.new_empty_strided.default",
)
def _zeros(t: Translation, node: fx.Node, *_: Any) -> Value:
    return t.number(0, t.dtype(node))


@of("aten.ones.default", "aten.new_ones.default", "aten.ones_like.default")
def _ones(t: Translation, node: fx.Node, *_: Any) -> Value:
    return t.number(1, t.dtype(node))


@of("aten.scalar_tensor.default")
def _scalar(t: Translation, node: fx.Node, value: Any, *_: Any) -> Value:
    return t.operand(value, t.dtype(node))


@of("aten.full.default", "aten.full_like.default", "aten.new_full.default", "aten.fill.Scalar")
def _full(t: Translation, node: fx.Node, _: Any, value: Any, *__: Any) -> Value:
    return t.operand(value, t.dtype(node))


@of("aten.tril.default", "aten.triu.default")
def _triangle(t: Translation, node: fx.Node, x: fx.Node, diagonal: int) -> Value:
    upper = "triu" in str(node.target)
    where = t.graph.constant(np.array(diagonal, KINDS[torch.int64][1]))
    return t.graph.op("Trilu", t.full(x), where, upper=int(upper))


@of("aten.constant_pad_nd.default")
def _pad(t: Translation, node: fx.Node, x: fx.Node, pads: Sequence[Any], value: float) -> Value:
    axes = [len(t.shape(x)) - 1 - i for i in range(len(pads) // 2)]
    ends = [_of(y) for y in (*pads[0::2], *pads[1::2])]
    number = t.number(value, t.dtype(node))
    return t.graph.op("Pad", t.full(x), t.graph.vector(ends), number, t.graph.integers(axes))
