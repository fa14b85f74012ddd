"""An ONNX graph as it is written: nodes in the order that they run in, constants, and weights that a file holds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch.utils._sympy.functions import FloorDiv

from fedpeft.training.kit import OPSET

Size: TypeAlias = Any
"""A number, or an expression (sympy's) of the sizes that are open."""
Sizes: TypeAlias = tuple[Size, ...]
Attribute: TypeAlias = int | float | str | Sequence[int]

IR = 10  # the version of the file format that came with the opset


@dataclass(slots=True)
class Graph:
    """What has been written so far. Values are their names.

    file: what weights are read from, beside the graph; constants: by name, weights among them; shapes: of the values
    whose shape is known; symbols: open sizes, and of which input and axis they are.
    """

    file: str
    nodes: list[NodeProto] = field(default_factory=list[NodeProto])
    constants: dict[str, TensorProto] = field(default_factory=dict[str, TensorProto])
    shapes: dict[str, Sizes] = field(default_factory=dict[str, Sizes])
    symbols: dict[Size, tuple[str, int]] = field(default_factory=dict[Size, tuple[str, int]])
    _made: dict[Any, str] = field(default_factory=dict[Any, str])
    _count: int = 0

    def op(self, kind: str, *inputs: str, **attributes: Attribute) -> str:
        """One more node; the name of its output."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, count: int, *inputs: str, **attributes: Attribute) -> tuple[str, ...]:
        """One more node; the names of its outputs."""
        outputs = tuple(self._name(kind) for _ in range(count))
        node = helper.make_node(kind, list(inputs), list(outputs))
        node.attribute.extend(helper.make_attribute(n, x) for n, x in attributes.items())
        self.nodes.append(node)
        return outputs

    def once(self, kind: str, *inputs: str, **attributes: Attribute) -> str:
        """The output of a small node, which is written once however often it is asked for."""
        key = kind, inputs, tuple(sorted((n, tuple(x) if isinstance(x, list) else x) for n, x in attributes.items()))
        if key not in self._made:
            self._made[key] = self.op(kind, *inputs, **attributes)
        return self._made[key]

    def constant(self, value: NDArray[Any]) -> str:
        """A small constant, kept in the graph."""
        key = value.dtype.str, value.shape, value.tobytes()
        if key not in self._made:
            name = self._made[key] = self._name("constant")
            self.constants[name] = numpy_helper.from_array(value, name)
            self.shapes[name] = value.shape
        return self._made[key]

    def integers(self, values: Iterable[int]) -> str:
        return self.constant(np.array(list(values), np.int64))

    def external(self, name: str, kind: int, shape: tuple[int, ...], offset: int, length: int) -> str:
        """A weight, or some rows of one, that is so many bytes of the file."""
        if name not in self.constants:
            tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", self.file), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            self.constants[name] = tensor
            self.shapes[name] = shape
        return name

    def size(self, size: Size) -> str:
        """A size as an int64 tensor of shape (1,). NotImplementedError for one that is not made of the inputs'."""
        if _fixed(size):
            return self.integers([int(size)])
        if size.is_Symbol and size in self.symbols:
            name, axis = self.symbols[size]
            return self.once("Shape", name, start=axis, end=axis + 1)
        kind = "Add" if size.is_Add else "Mul" if size.is_Mul else "Div" if isinstance(size, FloorDiv) else ""
        if not kind:
            raise NotImplementedError(f"a size of {size}")
        first, *rest = (self.size(x) for x in size.args)
        for x in rest:
            first = self.once(kind, first, x)
        return first

    def vector(self, sizes: Sequence[Size]) -> str:
        """Sizes as one int64 tensor."""
        names = [
            self.integers(map(int, some)) if is_fixed else self.once("Concat", *map(self.size, some), axis=0)
            for is_fixed, some in ((k, list(v)) for k, v in groupby(sizes, _fixed))
        ]
        return names[0] if len(names) == 1 else self.once("Concat", *names, axis=0) if names else self.integers([])

    def reshape(self, x: str, want: Sizes) -> str:
        """``x`` in another shape: sizes that stay where they are, and one more that is not known, cost nothing."""
        have = self.shapes[x]
        if have == want:
            return x
        cells: list[Size] = [0 if i < len(have) and have[i] == s and not _fixed(s) else s for i, s in enumerate(want)]
        open_ = [i for i, s in enumerate(cells) if not _fixed(s)]
        if len(open_) == 1:
            cells[open_[0]] = -1
        made = self.op("Reshape", x, self.vector(cells))
        self.shapes[made] = want
        return made

    def expand(self, x: str, want: Sizes) -> str:
        """``x`` repeated to a shape that it can be broadcast to."""
        if self.shapes[x] == want:
            return x
        made = self.op("Expand", x, self.vector(want))
        self.shapes[made] = want
        return made

    @property
    def small(self) -> frozenset[str]:
        """Constants that are kept in the graph."""
        return frozenset(n for n, x in self.constants.items() if x.data_location != TensorProto.EXTERNAL)

    def needed(self, values: Iterable[str]) -> list[NodeProto]:
        """The nodes that make these values, in their order."""
        wanted, kept = set(values), list[NodeProto]()
        for node in reversed(self.nodes):
            if any(x in wanted for x in node.output):
                kept.append(node)
                wanted |= set(node.input)
        return kept[::-1]

    def repeat(self, node: NodeProto, names: Mapping[str, str]) -> dict[str, str]:
        """The node once more, reading other values; the new names of what it makes, by the old."""
        made = {x: self._name(node.op_type) for x in node.output}
        copy = NodeProto()
        copy.CopyFrom(node)
        for k, x in enumerate(node.input):
            copy.input[k] = names.get(x, x)
        for k, x in enumerate(node.output):
            copy.output[k] = made[x]
        self.nodes.append(copy)
        return made

    def model(
        self,
        inputs: Sequence[ValueInfoProto],
        outputs: Sequence[ValueInfoProto],
        nodes: Sequence[NodeProto],
        values: Mapping[str, str],
    ) -> ModelProto:
        """These nodes as a graph of its own. values: by the outputs' names."""
        named = [helper.make_node("Identity", [values[x.name]], [x.name]) for x in outputs]
        read = {x for node in (*nodes, *named) for x in node.input}
        constants = [x for n, x in self.constants.items() if n in read]
        made = helper.make_graph([*nodes, *named], "step", list(inputs), list(outputs), constants)
        return helper.make_model(
            made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="fedpeft"
        )

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind.lower()}.{self._count}"


def _fixed(size: Size) -> bool:
    return isinstance(size, int) or bool(size.is_Integer)


def write(model: ModelProto, file: Path) -> None:
    file.write_bytes(model.SerializeToString(deterministic=True))
