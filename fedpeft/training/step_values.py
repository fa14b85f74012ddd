"""What an operation of torch becomes in a graph: a value by name, or one that is written only when it is used."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from onnx import TensorProto
from torch import fx

from fedpeft.training.step_graph import Graph, Size, Sizes

KINDS: Mapping[torch.dtype, tuple[int, type[np.generic]]] = {
    torch.float32: (TensorProto.FLOAT, np.float32),
    torch.int64: (TensorProto.INT64, np.int64),
    torch.int32: (TensorProto.INT32, np.int32),
    torch.bool: (TensorProto.BOOL, np.bool_),
    torch.float64: (TensorProto.DOUBLE, np.float64),
}


@dataclass(frozen=True, slots=True)
class Weight:
    """A frozen tensor of the base. flipped: whether it is the transpose of what the model has."""

    name: str
    flipped: bool = False


@dataclass(frozen=True, slots=True)
class Flipped:
    """A matrix's transpose."""

    name: str


@dataclass(frozen=True, slots=True)
class Placed:
    """``name`` in zeros: along an axis it begins at ``start`` and ends at ``stop`` of ``size``."""

    name: str
    axis: int
    start: Size
    stop: Size
    size: Size


Value: TypeAlias = str | Weight | Flipped | Placed | tuple[str, ...]


class Weights(Protocol):
    """How frozen tensors are written where they are used."""

    def product(self, graph: Graph, x: str, weight: Weight, bias: str | None) -> str:
        """x @ W and a bias, for x (n, k)."""

    def rows(self, graph: Graph, weight: Weight, ids: str) -> str:
        """Rows of W, for ids of any shape."""

    def whole(self, graph: Graph, weight: Weight) -> str:
        """All of W."""

    def losses(
        self, graph: Graph, hidden: str, weight: Weight, bias: str | None, targets: str, slope: bool
    ) -> tuple[str, str, str]:
        """−log p of the targets, whether each is the largest, and the slope of their sum by hidden, if wanted."""


@dataclass(slots=True)
class Translation:
    """The values of a traced graph's nodes so far, and the graph that they are written to."""

    graph: Graph
    weights: Weights
    values: dict[fx.Node, Value] = field(default_factory=dict[fx.Node, Value])

    def shape(self, node: fx.Node) -> Sizes:
        """Its sizes: numbers, or expressions of the symbols of the inputs."""
        return sizes(node.meta["val"].shape)

    def dtype(self, node: fx.Node) -> torch.dtype:
        found: torch.dtype = node.meta["val"].dtype
        return found

    def loose(self, x: Any) -> str:
        """The name of a value that can be broadcast to the node's shape; of a number, a constant."""
        if not isinstance(x, fx.Node):
            raise NotImplementedError(f"an argument {x!r}")
        value, g = self.values[x], self.graph
        if isinstance(value, Weight):
            value = self.weights.whole(g, value)
        elif isinstance(value, Flipped):
            value = g.op("Transpose", value.name, perm=[1, 0])
        elif isinstance(value, Placed):
            value = self._padded(value)
        elif isinstance(value, tuple):
            raise NotImplementedError(f"the outputs of {x.target} together")
        g.shapes.setdefault(value, self.shape(x))
        self.values[x] = value
        return value

    def full(self, x: Any) -> str:
        """The name of a value of exactly the node's shape."""
        return self.graph.expand(self.loose(x), self.shape(x))

    def number(self, x: float | int | bool, dtype: torch.dtype) -> str:
        return self.graph.constant(np.array(x, KINDS[dtype][1]))

    def operand(self, x: Any, dtype: torch.dtype) -> str:
        """``loose`` of a node or number, in this type."""
        if isinstance(x, fx.Node) and isinstance(x.meta["val"], torch.Tensor):
            return self.cast(self.loose(x), self.dtype(x), dtype)
        if isinstance(x, fx.Node):
            name = self.graph.size(expression(x.meta["val"]))
            self.graph.shapes[name] = (1,)
            return self.cast(name, torch.int64, dtype)
        return self.number(x, dtype)

    def cast(self, name: str, have: torch.dtype, want: torch.dtype) -> str:
        if have == want:
            return name
        made = self.graph.op("Cast", name, to=KINDS[want][0])
        self.graph.shapes[made] = self.graph.shapes[name]
        return made

    def each(self, kind: str, *names: str) -> str:
        """A node that works on each number, on values that are broadcast."""
        made = self.graph.op(kind, *names)
        self.graph.shapes[made] = broadcast([self.graph.shapes[x] for x in names])
        return made

    def _padded(self, x: Placed) -> str:
        pads = self.graph.vector([x.start, x.size - x.stop])
        return self.graph.op("Pad", x.name, pads, "", self.graph.integers([x.axis]))


def expression(x: Any) -> Size:
    """A size of torch's as a number, or as an expression of symbols."""
    if isinstance(x, torch.SymInt):
        found: Size = x.node.expr
        return int(found) if not isinstance(found, int) and found.is_Integer else found
    return int(x)


def sizes(shape: Sequence[Any]) -> Sizes:
    return tuple(expression(x) for x in shape)


def broadcast(shapes: Sequence[Sizes]) -> Sizes:
    """The shape of what works on each number of values of these shapes."""
    dims = max(map(len, shapes))
    made: list[Size] = [1] * dims
    for shape in shapes:
        for i, size in enumerate(shape, dims - len(shape)):
            if size != 1:
                made[i] = size
    return tuple(made)


Operation: TypeAlias = Callable[..., Value]
"""(translation, node, and all arguments of torch's operation, in its order) -> value."""

OPERATIONS: dict[str, Operation] = {}
"""By torch's name, such as "aten.mm.default"."""


def of(*names: str) -> Callable[[Operation], Operation]:
    """Put a function into ``OPERATIONS``."""

    def put(function: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return put


def arguments(node: fx.Node) -> list[Any]:
    """What an operation is called with, in the order of its schema."""
    target: Any = node.target
    given = list(node.args)
    return [
        given[i] if i < len(given) else node.kwargs.get(x.name, x.default_value if x.has_default_value() else None)
        for i, x in enumerate(target._schema.arguments)
    ]
