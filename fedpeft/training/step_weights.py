"""Frozen weights in an ONNX graph: read from a kit's file, and expanded where they are used, each time anew.

A runtime that can work out an expanded weight before it has an input does so, once and for good, and then holds the
whole base in fp32. Here a zero is added to the scales, which is made of the size of what the weight is multiplied with,
so that no weight can be expanded before that is there, neither when the graph is loaded nor early in a run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import TensorProto

from fedpeft.training.formats import BLOCK, EXPANDED, LEVELS
from fedpeft.training.packed_file import Held, PackedFile
from fedpeft.training.step_graph import Graph
from fedpeft.training.step_values import Weight

WORDS = 8192
"""Rows of a language model's head that are expanded, and multiplied with, at a time."""

GROUP = 64
"""Exponentials that are summed by themselves, before the sums are: most are so small beside the largest that each
would be lost in a sum that has it, and all of them together are not.

Of SmolLM2 on real rows the gradients are up to 1.3e-5 of the largest away from those in fp64 where 8192 are added one
after another, and up to 5e-6 where they are in groups, which takes no longer."""

_WHOLE = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
_BITS: Mapping[int, int] = {
    TensorProto.INT4: 4,
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
    TensorProto.FLOAT16: 16,
    TensorProto.FLOAT: 32,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """The weights of a file, as ``step_values.Weights`` wants them. late: whether expansion waits for its input."""

    file: PackedFile
    late: bool = True

    def product(self, graph: Graph, x: str, weight: Weight, bias: str | None) -> str:
        """x @ W and a bias, for x (n, k); some rows of a large W at a time."""
        held = self._held(weight.name)
        more = [] if bias is None else [bias]
        if held is None:
            return graph.op("Gemm", x, self._plain(graph, weight.name), *more, transB=int(weight.flipped))
        turned = weight.flipped != held.transposed
        count = len(self.file.tensors[held.codes])
        parts = _parts(count, max(1, EXPANDED // held.columns))
        if len(parts) == 1:
            return graph.op("Gemm", x, self._expanded(graph, held, x, 0, count), *more, transB=int(turned))
        found, after = list[str](), x
        for start, stop in parts:
            matrix = self._expanded(graph, held, after, start, stop)
            side = x if turned else graph.op("Slice", x, *(graph.integers([i]) for i in (start, stop, 1)))
            if turned or not found:
                after = graph.op("Gemm", side, matrix, transB=int(turned))
            else:
                after = graph.op("Gemm", side, matrix, after)
            found.append(after)
        whole = graph.op("Concat", *found, axis=1) if turned else after
        return graph.op("Add", whole, bias) if bias else whole

    def rows(self, graph: Graph, weight: Weight, ids: str) -> str:
        """Rows of W (words, width) for ids: their shape, and the width."""
        held = self._held(weight.name)
        if weight.flipped or (held is not None and held.transposed):
            raise NotImplementedError("rows of a transposed weight")
        shape = graph.shapes[ids]
        if held is None:
            found = graph.op("Gather", self._plain(graph, weight.name), ids, axis=0)
            graph.shapes[found] = (*shape, *self.file.tensors[weight.name].shape[1:])
            return found
        count = len(self.file.tensors[held.codes])
        flat = graph.reshape(ids, (prod(shape),))
        kind = TensorProto.INT8 if held.format == "int8" else TensorProto.UINT8
        codes = graph.op("Gather", self._slice(graph, held.codes, kind, 0, count), flat, axis=0)
        scales = graph.op("Gather", self._scales(graph, held, 0, count), flat, axis=0)
        if held.format == "int8":
            numbers = graph.op("Cast", codes, to=TensorProto.FLOAT)
            found = graph.op("Mul", numbers, graph.op("Unsqueeze", scales, graph.integers([1])))
        else:
            found = self._looked_up(graph, held, codes, graph.op("Cast", scales, to=TensorProto.FLOAT))
        graph.shapes[found] = (*graph.shapes[flat], held.columns)
        return graph.reshape(found, (*shape, held.columns))

    def whole(self, graph: Graph, weight: Weight) -> str:
        """All of a weight that is not packed."""
        if self._held(weight.name) is not None:
            raise NotImplementedError(f"all of the packed {weight.name}")
        name = self._plain(graph, weight.name)
        if not weight.flipped:
            return name
        turned = graph.op("Transpose", name, perm=[1, 0])
        graph.shapes[turned] = graph.shapes[name][::-1]
        return turned

    def losses(
        self, graph: Graph, hidden: str, weight: Weight, bias: str | None, targets: str, slope: bool
    ) -> tuple[str, str, str]:
        """−log p of the targets (units,), whether each is the largest, and the slope of their sum by hidden (units, k).

        The head's words are seen ``WORDS`` at a time: of each part the largest logit so far, the sum of exponentials
        below it, and the words weighted by them, so that neither logits nor head are ever there as a whole.
        """
        held, g = self._held(weight.name), graph
        if weight.flipped or (held is not None and held.transposed):
            raise NotImplementedError("a transposed head")
        count = len(self.file.tensors[weight.name if held is None else held.codes])
        own = self.rows(g, weight, targets)
        wanted = g.op("ReduceSum", g.op("Mul", hidden, own), g.integers([1]), keepdims=1)
        column = g.op("Unsqueeze", targets, g.integers([1]))
        if bias is not None:
            wanted = g.op("Add", wanted, g.op("Gather", bias, column, axis=0))
        top = total = best = mean = ""
        for start, stop in _parts(count, WORDS):
            after = top or hidden
            matrix = (
                self._slice(g, weight.name, TensorProto.FLOAT, start, stop)
                if held is None
                else self._expanded(g, held, after, start, stop)
            )
            # what is expanded has one reader, and that as many as it likes: else onnxruntime expands it for each
            matrix = g.op("Reshape", matrix, g.integers([0, 0]))
            more = [] if bias is None else [g.op("Slice", bias, *(g.integers([i]) for i in (start, stop, 0)))]
            logits = g.op("Gemm", hidden, matrix, *more, transB=1)
            largest = g.op("ReduceMax", logits, g.integers([1]), keepdims=1)
            place = g.op("ArgMax", logits, axis=1, keepdims=1)
            if start:
                place = g.op("Add", place, g.integers([start]))
                place = g.op("Where", g.op("Greater", largest, top), place, best)
                largest = g.op("Max", largest, top)
            powers = g.op("Exp", g.op("Sub", logits, largest))
            sums = _summed(g, powers, stop - start)
            if start:
                shrunk = g.op("Exp", g.op("Sub", top, largest))
                sums = g.op("Add", sums, g.op("Mul", total, shrunk))
            if slope and start:
                mean = g.op("Gemm", powers, matrix, g.op("Mul", mean, shrunk))
            elif slope:
                mean = g.op("Gemm", powers, matrix)
            top, total, best = largest, sums, place
        each = g.op("Sub", g.op("Add", top, g.op("Log", total)), wanted)
        flat = g.integers([1])
        losses = g.op("Squeeze", each, flat)
        hits = g.op("Squeeze", g.op("Equal", best, column), flat)
        return losses, hits, g.op("Sub", g.op("Div", mean, total), own) if slope else ""

    def _held(self, name: str) -> Held | None:
        return next((x for x in self.file.held if x.name == name), None)

    def _plain(self, graph: Graph, name: str) -> str:
        x = self.file.tensors.get(name)
        if x is None:
            raise NotImplementedError(f"{name}, which {self.file.path.name} does not hold")
        return graph.external(name, _WHOLE[x.dtype], x.shape, *self.file.places[name])

    def _slice(self, graph: Graph, name: str, kind: int, start: int, stop: int, columns: int = 0) -> str:
        """Some rows of a tensor of the file, without a copy. columns: where a row's numbers are not a byte or more."""
        shape = (stop - start, *self.file.tensors[name].shape[1:])
        shape = (shape[0], columns) if columns else shape
        offset, _ = self.file.places[name]
        row = prod(shape[1:]) * _BITS[kind] // 8
        part = "" if shape[0] == len(self.file.tensors[name]) else f".{start}-{stop}"
        return graph.external(
            f"{name}.{TensorProto.DataType.Name(kind).lower()}{part}", kind, shape, offset + start * row, row * shape[0]
        )

    def _scales(self, graph: Graph, held: Held, start: int, stop: int) -> str:
        kind = TensorProto.FLOAT if held.format == "int8" else TensorProto.FLOAT16
        return self._slice(graph, held.scales, kind, start, stop)

    def _expanded(self, graph: Graph, held: Held, after: str, start: int, stop: int) -> str:
        """Rows of a packed matrix in fp32, (stop − start, columns), when ``after`` is there: its first size is open."""
        scales = self._scales(graph, held, start, stop)
        if held.format != "int8":
            scales = graph.op("Cast", scales, to=TensorProto.FLOAT)
        if self.late:
            size = graph.once("Cast", graph.once("Shape", after, start=0, end=1), to=TensorProto.FLOAT)
            scales = graph.op("Add", scales, graph.once("Mul", size, graph.constant(np.array([0], np.float32))))
        if held.format == "int8":
            codes = self._slice(graph, held.codes, TensorProto.INT8, start, stop)
            return graph.op("DequantizeLinear", codes, scales, axis=0)
        if held.format == "int4" and held.columns % 2 == 0:
            codes = self._slice(graph, held.codes, TensorProto.INT4, start, stop, held.columns)
            return graph.op("DequantizeLinear", codes, scales, axis=1, block_size=BLOCK)
        codes = self._slice(graph, held.codes, TensorProto.UINT8, start, stop)
        return self._looked_up(graph, held, codes, scales)

    def _looked_up(self, graph: Graph, held: Held, codes: str, scales: str) -> str:
        """Rows of codes of 4 bits (n, bytes), each byte read in a table of pairs, times their scales (n, blocks)."""
        byte = np.arange(256)
        levels = np.array(LEVELS[held.format], np.float32)
        table = graph.constant(np.stack([levels[byte & 15], levels[byte >> 4]], axis=1))
        pairs = graph.op("Gather", table, graph.op("Cast", codes, to=TensorProto.INT32), axis=0)
        blocks = -(-held.columns // BLOCK)
        even = held.columns + held.columns % 2
        gap = blocks * BLOCK - even
        numbers = graph.op("Reshape", pairs, graph.integers([0, even]))
        if gap:
            numbers = graph.op("Pad", numbers, graph.integers([0, gap]), "", graph.integers([1]))
        wide = graph.op("Reshape", numbers, graph.integers([0, blocks, BLOCK]))
        scaled = graph.op("Mul", wide, graph.op("Unsqueeze", scales, graph.integers([2])))
        flat = graph.op("Reshape", scaled, graph.integers([0, blocks * BLOCK]))
        if blocks * BLOCK == held.columns:
            return flat
        return graph.op("Slice", flat, *(graph.integers([i]) for i in (0, held.columns, 1)))


def _summed(graph: Graph, x: str, columns: int) -> str:
    """The sum of each row of x (n, columns), as (n, 1), in groups."""
    groups = -(-columns // GROUP)
    gap = groups * GROUP - columns
    if gap:
        x = graph.op("Pad", x, graph.integers([0, gap]), "", graph.integers([1]))
    each = graph.op("Reshape", x, graph.integers([0, groups, GROUP]))
    sums = graph.op("ReduceSum", each, graph.integers([2]), keepdims=0)
    return graph.op("ReduceSum", sums, graph.integers([1]), keepdims=1)


def _parts(count: int, step: int) -> list[tuple[int, int]]:
    return [(i, min(i + step, count)) for i in range(0, count, step)]
