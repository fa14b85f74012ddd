"""A training step as plain ONNX graphs, which a runtime without torch, transformers or gradients runs.

The traced step (``step_trace``) is translated one operation at a time (``step_values.OPERATIONS``), so that what runs,
in which order and what is held in memory is decided here. Any runtime of opset 21 may run it. To take little memory
onnxruntime is told to keep that order (PRIORITY_BASED, without optimisers, whose new nodes run after all others), to
plan no memory beforehand (``enable_mem_reuse``: most of a minute for 30 layers, and no lower peak) and to read fp32
weights where they are (``session.disable_prepacking``: else two copies of each); its arena halves the time of a step
for a few MB more. ``ondevice.session`` does so.

Measured with one thread, SmolLM2 (135 million) with LoRA of rank 8 on q and v, one row of 128 tokens: the process's
peak is 428 MB in int8 and 379 in int4, for a step of 1.0 s of CPU time, as in torch; 312 and 266 where activations are
computed again, for 1.5 s. Tracing and writing take half a minute.
"""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto, ValueInfoProto, helper
from torch import fx

from fedpeft.errors import ConfigError
from fedpeft.training import step_layers, step_numbers, step_shapes
from fedpeft.training.bases import Base
from fedpeft.training.bridge import Bridge
from fedpeft.training.kit import EVALUATE, STEP
from fedpeft.training.packed_file import PackedFile
from fedpeft.training.step_graph import Graph, write
from fedpeft.training.step_memory import WHOLE, recomputing
from fedpeft.training.step_trace import Traced, trace
from fedpeft.training.step_values import OPERATIONS, Translation, Weight, arguments
from fedpeft.training.step_weights import Stored

_TABLES = step_layers, step_numbers, step_shapes  # which fill OPERATIONS


def compile_step(
    base: Base, bridge: Bridge, *, trains: str, recompute: bool, weights: PackedFile, folder: Path
) -> None:
    """Write step.onnx and evaluate.onnx into a folder, beside the file of the frozen weights, which they read.

    trains: factors that have gradients, "ab" or "b", beside all dense leaves; recompute: whether activations are
    computed again in the backward half, which takes longer and less memory.
    ConfigError, naming model.name, for a model with an operation that has no translation.
    """
    write_step(trace(base, bridge, trains), Stored(weights), type(base.model).__name__, recompute, folder)


def write_step(traced: Traced, weights: Stored, model: str, recompute: bool, folder: Path) -> None:
    """What ``compile_step`` does with a traced step. model: its name, for errors."""
    graph, values = translate(traced, weights, model)
    inputs = [_info(n, TensorProto.INT64 if n in WHOLE else TensorProto.FLOAT, x) for n, x in traced.shapes.items()]
    units = traced.shapes["targets"]
    outputs = [_info("losses", TensorProto.FLOAT, units), _info("hits", TensorProto.BOOL, units)]
    few = graph.needed(values[x.name] for x in outputs)
    write(graph.model(inputs, outputs, few, values), folder / EVALUATE)
    outputs += [_info(n, TensorProto.FLOAT, traced.shapes[n.removeprefix("grad/")]) for n in traced.outputs[2:]]
    nodes = recomputing(graph, values, traced.shapes) if recompute else graph.needed(values.values())
    write(graph.model(inputs, outputs, nodes, values), folder / STEP)


def _info(name: str, kind: int, shape: Sequence[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def translate(traced: Traced, weights: Stored, model: str) -> tuple[Graph, dict[str, str]]:
    """The step's graph, and its values by the outputs' names. ConfigError, naming the model, as ``compile_step``."""
    graph = Graph(weights.file.path.name)
    t = Translation(graph, weights)
    fed = {at: n for n, at in traced.inputs.items()}
    frozen = {at: n for n, at in traced.frozen.items()}
    for node in traced.graph.graph.nodes:
        if node.op == "output":
            (results,) = node.args
            return graph, {n: t.full(x) for n, x in zip(traced.outputs, results, strict=True)}
        if node.op == "get_attr":
            t.values[node] = graph.constant(getattr(traced.graph, str(node.target)).detach().numpy())
        elif node.op == "call_function":
            _call(t, node, model)
        elif node.name in fed:
            _feed(t, node, fed[node.name], traced.shapes[fed[node.name]], model)
        elif node.name in frozen:
            t.values[node] = Weight(frozen[node.name])
        else:
            t.values[node] = graph.constant(traced.constants[node.name].numpy())
    raise AssertionError("a graph without outputs")


def _feed(t: Translation, node: fx.Node, name: str, shape: Sequence[int | str], model: str) -> None:
    t.values[node] = name
    t.graph.shapes[name] = t.shape(node)
    for axis, (size, want) in enumerate(zip(t.shape(node), shape, strict=True)):
        if isinstance(want, str) and (isinstance(size, int) or not size.is_Symbol):
            raise ConfigError(
                f"model.name: the code of {model} fixes the {want} of {name} to {size}, and a graph is for any; "
                f"use clients with torch, or another model"
            )
        if isinstance(want, str):
            t.graph.symbols.setdefault(size, (name, axis))


def _call(t: Translation, node: fx.Node, model: str) -> None:
    if isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | torch.SymFloat | int | float):
        return  # sizes are read where they are used
    if node.target is operator.getitem:
        source: Any = node.args[0]
        several: Any = t.values[source]
        t.values[node] = several[node.args[1]]
        return
    made = OPERATIONS.get(str(node.target))
    try:
        if made is None:
            raise NotImplementedError("it is not in the table")
        t.values[node] = made(t, node, *arguments(node))
    except NotImplementedError as error:
        raise ConfigError(
            f"model.name: {model} computes {node.target}, which has no translation to ONNX here: {error}; use clients "
            f"with torch, or another model"
        ) from error
