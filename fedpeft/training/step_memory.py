"""A step that keeps less: activations of the forward half are computed again in the backward half, a stretch at a time.

Where one value alone goes on, as between the layers of a transformer, the forward half can be cut. What a stretch
between two cuts made for the backward half is forgotten, and made again from the value at its first cut when it is
asked for. That value is copied with a zero added that is made of a gradient's size, so that the second time is no copy
of the first that a runtime could do without, nor can begin before its turn.
"""

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

import numpy as np
from onnx import NodeProto, TensorProto

from fedpeft.training.step_graph import Graph

WHOLE = "input_ids", "attention_mask", "targets", "positions"
"""What a batch is; masks and the like, which all layers share, are made of it."""


@dataclass(frozen=True, slots=True)
class _Halves:
    """Nodes in their order; the forward half's are those that the losses need.

    forward: their numbers; deep: values that they make of weights, which are those worth forgetting; wanted: of these,
    what the backward half reads.
    """

    nodes: Sequence[NodeProto]
    forward: frozenset[int]
    deep: frozenset[str]
    wanted: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Forward nodes after number ``start``, up to ``stop``: from one value to another, both of which are kept."""

    start: int
    stop: int
    value: str
    end: str


def recomputing(graph: Graph, outputs: Mapping[str, str], inputs: Collection[str]) -> list[NodeProto]:
    """The nodes that make these outputs, with stretches of the forward half computed again in the backward half.

    outputs: values by name, "losses" being the forward half's; inputs: what the graph is fed. Time: most of a forward
    half more. Memory: the values at the cuts and one stretch's, about the square root of how many were kept.
    """
    nodes = graph.needed(outputs.values())
    halves = _halves(nodes, outputs, graph.small)
    fed = _after(nodes, set(inputs))
    before: dict[int, list[NodeProto]] = {}
    renamed: dict[str, str] = {}
    for stretch in _stretches(halves, _codes(graph, nodes)):
        wanted, chosen = _again(halves, stretch, fed)
        first = next((i for i, x in enumerate(nodes) if i not in halves.forward and wanted & set(x.input)), None)
        gradient = "" if first is None else _gradient(halves, first)
        if first is None or not gradient:  # what is wanted at once is kept
            continue
        start = len(graph.nodes)
        names = {stretch.value: _late(graph, stretch.value, gradient)}
        for i in chosen:
            names |= graph.repeat(nodes[i], names)
        before.setdefault(first, []).extend(graph.nodes[start:])
        renamed |= {x: names[x] for x in wanted}
    made = list[NodeProto]()
    for i, node in enumerate(nodes):
        made += before.get(i, [])
        if i not in halves.forward:
            for k, x in enumerate(node.input):
                node.input[k] = renamed.get(x, x)
        made.append(node)
    return made


def _halves(nodes: Sequence[NodeProto], outputs: Mapping[str, str], small: Collection[str]) -> _Halves:
    needed, forward = {outputs["losses"], outputs["hits"]}, set[int]()
    for i in range(len(nodes) - 1, -1, -1):
        if needed & set(nodes[i].output):
            forward.add(i)
            needed |= set(nodes[i].input)
    made = {x for node in nodes for x in node.output}
    deep = set[str]()
    for i in sorted(forward):
        node = nodes[i]
        given = [x for x in node.input if x and x not in made and x not in small]
        if node.op_type != "Shape" and (deep & set(node.input) or set(given) - set(WHOLE)):
            deep |= set(node.output)
    read = {x for i, node in enumerate(nodes) if i not in forward for x in node.input} | set(outputs.values())
    return _Halves(nodes, frozenset(forward), frozenset(deep), frozenset(deep & read))


def _after(nodes: Sequence[NodeProto], values: set[str]) -> set[str]:
    """What depends on these values, and they themselves."""
    found = set(values)
    for node in nodes:
        if found & set(node.input):
            found |= set(node.output)
    return found


def _stretches(halves: _Halves, codes: AbstractSet[str]) -> list[_Stretch]:
    """Stretches between cuts, each with about the square root of all that is wanted. codes: values no cut is at."""
    order = sorted(halves.forward)
    last = {x: i for i in order for x in halves.nodes[i].input}
    total = sqrt(len(halves.wanted))
    open_: set[str] = set()
    cuts: list[tuple[int, str]] = []
    count = 0
    for i in order:
        outputs = set(halves.nodes[i].output)
        open_ = {x for x in open_ | (outputs & halves.deep) if last.get(x, -1) > i}
        count += len(outputs & halves.wanted)
        if len(open_) == 1 and (not cuts or count >= total) and not open_ & codes:
            (value,) = open_
            cuts.append((i, value))
            count = 0
    return [_Stretch(i, j, x, y) for (i, x), (j, y) in pairwise(cuts)]


def _codes(graph: Graph, nodes: Sequence[NodeProto]) -> set[str]:
    """Rows of packed weights before they are expanded."""
    floats = {n for n, x in graph.constants.items() if x.data_type == TensorProto.FLOAT}
    return {x for node in nodes if node.op_type == "Gather" and node.input[0] not in floats for x in node.output}


def _again(halves: _Halves, stretch: _Stretch, fed: AbstractSet[str]) -> tuple[set[str], list[int]]:
    """What the backward half wants of a stretch, and the nodes that make it once more, in their order."""
    inside = [i for i in sorted(halves.forward) if stretch.start < i <= stretch.stop]
    under = _after([halves.nodes[i] for i in inside], {stretch.value})
    wanted = (under & halves.wanted) - {stretch.value, stretch.end}
    needed, chosen = set(wanted), list[int]()
    for i in reversed(inside):
        node = halves.nodes[i]
        outputs = set(node.output)
        if needed & outputs and (under & outputs or not fed & outputs):
            chosen.append(i)
            needed |= set(node.input)
    return wanted, chosen[::-1]


def _gradient(halves: _Halves, first: int) -> str:
    """A value of the backward half that is there when this node's turn comes, or nothing."""
    made = [str(x) for i, node in enumerate(halves.nodes[:first]) if i not in halves.forward for x in node.output]
    own = [str(x) for x in halves.nodes[first].input if x in made]
    return (own or made[-1:] or [""])[0]


def _late(graph: Graph, value: str, gradient: str) -> str:
    """``value`` once more, when ``gradient`` is there."""
    size = graph.op("ReduceSum", graph.op("Shape", gradient), keepdims=0)
    number = graph.op("Cast", size, to=TensorProto.FLOAT)
    return graph.op("Add", value, graph.op("Mul", number, graph.constant(np.array(0, np.float32))))
