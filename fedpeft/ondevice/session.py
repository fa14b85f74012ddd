"""A kit's graph, opened in stock onnxruntime."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from fedpeft.data import Padded
from fedpeft.errors import ConfigError
from fedpeft.ondevice.weights import mapped
from fedpeft.training.environment import allocator, give_back
from fedpeft.training.kit import BASE, STEP, Kit

_QUIET = 4  # nothing but what ends the process
_ALLOCATOR = {-1: 1 << 17, -2: 0, -3: 1 << 17}  # trim threshold, top pad, mmap threshold (glibc's malloc.h)


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """An opened graph: of a batch and an adapter it gives losses, and gradients of their sum where it has them.

    weights: what the session reads, which does not keep them alive.
    """

    session: Any
    weights: Mapping[str, Any]

    @classmethod
    def open(cls, kit: Kit, name: str, threads: int, frugal: bool = False) -> Self:
        """Open a file of a kit. ConfigError, naming it, if onnxruntime can't, or if its names are not of this kit.

        frugal: whether every block of memory goes back to the system when it is free, from now on in this process.
        Else onnxruntime keeps what it has taken, which halves the time of a step: with MiniLM in int8, 8 rows of 128
        tokens, 0.7 s against 1.6 s, for a peak of 260 against 240 MB and twice as much that is reserved.
        Cost: the graph is read and planned, seconds for 30 layers; its weights are mapped from the base's file.
        """
        file = kit.path(name)
        if frugal:
            _give_back_at_once()
            give_back()  # what tokenising left, and the graph that was open before: 22 and 39 MB for SmolLM2
        options = _options(threads, frugal)
        try:
            weights = mapped(file, kit.path(BASE))
            for weight, value in weights.items():
                options.add_initializer(weight, value)  # its like for weights outside, of several at once, copies them
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of many kinds, nearly all onnxruntime's own
            why = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"kit: {file} can't be run by onnxruntime {onnxruntime.__version__}: {why}; install the version that "
                f"the kit was made for, or export it anew"
            ) from error
        graph = cls(session, weights)
        graph._check(str(file), kit, name)
        return graph

    def run(self, batch: Padded, adapter: Mapping[str, NDArray[Any]], wanted: Sequence[str]) -> list[NDArray[Any]]:
        """These outputs, in this order. adapter: its tensors by name, fp32, all layers of one rank."""
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": batch.ids,
            "attention_mask": batch.mask,
            "targets": batch.targets,
            **adapter,
        }
        if batch.where is not None:
            feeds["positions"] = np.flatnonzero(batch.where)
        found: list[NDArray[Any]] = self.session.run(list(wanted), feeds, _ONLY_WANTED)
        return found

    def _check(self, file: str, kit: Kit, name: str) -> None:
        spec, facts = kit.spec, kit.facts
        tensors = [n for n, _ in (spec.factors("ab") + spec.leaves).shapes]
        trained = [n for n, _ in (spec.factors(facts.trains) + spec.leaves).shapes]
        batch = ["input_ids", "attention_mask", "targets", *(["positions"] if facts.task == "lm" else [])]
        slopes = [f"grad/{n}" for n in trained] if name == STEP else []
        for what, got, want in (
            ("input", self.session.get_inputs(), [*batch, *tensors]),
            ("output", self.session.get_outputs(), ["losses", "hits", *slopes]),
        ):
            names = [x.name for x in got]
            if odd := sorted(set(names) ^ set(want)):
                has = "has" if odd[0] in names else "has no"
                raise ConfigError(
                    f"kit: {file} {has} {what} {odd[0]!r}; kit.json wants {len(want)}, such as {want[-1]!r}: the graph "
                    f"is for another adapter; export the kit anew"
                )


def limited() -> bool:
    """Whether the system limits how much memory this process may reserve."""
    if sys.platform == "win32":
        return False
    import resource

    return resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY


def _options(threads: int, frugal: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = not frugal
    # Both are plans made beforehand: the first is for shapes that stay the same; the second takes a time that grows
    # with the square of the graph, for SmolLM2 most of a minute against seconds, and the peak is no lower for it.
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    # The graph's nodes stand in the order that needs least memory. Optimisers add nodes at its end, which then wait for
    # all others; they would also hold two weights expanded where one is, or none.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Weights in fp32 are read where the file is mapped; packed for products they would be two copies, forward and back.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _give_back_at_once() -> None:
    """Have glibc map blocks of 128 KiB and more by themselves, and unmap them when they are free.

    What it does else, and still more what ``environment.prepare`` asks of it for torch's sake, leaves holes in its heap
    that double the peak of a step.
    """
    allocator(_ALLOCATOR)


def _only_wanted() -> Any:
    options = onnxruntime.RunOptions()
    options.log_severity_level = _QUIET
    options.only_execute_path_to_fetches = True
    return options


_ONLY_WANTED = _only_wanted()
