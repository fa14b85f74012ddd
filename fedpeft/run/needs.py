"""How much memory a client's training takes, by its rank, and the rank that fits."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.adapters import Spec
from fedpeft.config.runtimes import Runtime
from fedpeft.errors import ConfigError
from fedpeft.training.kit import CONFIG, Kit
from fedpeft.training.memory import parts
from fedpeft.training.predict import Engine, Sizes
from fedpeft.training.settings import Training

if TYPE_CHECKING:
    from fedpeft.training.loop import TorchTrainer


CARRIER: Mapping[Engine, int] = {"torch": 80_000_000, "onnx": 100_000_000}
"""Bytes of a deployed node's process beside what the plan's formula is of: Flower's client, which imports grpc,
cryptography and others (73 MB beside transformers, 83 MB without), the run itself (6 MB) and its table of rows."""


class Needs:
    """Bytes that training takes at its peak in a device's own process, as ``training.memory.estimate`` has it.

    What a client of a low rank runs frozen is not counted: it has neither gradients nor moments.
    """

    def __init__(self, trainer: "TorchTrainer") -> None:
        self._trainer = trainer
        self._bytes = cache(self._estimate)

    def of(self, rows: int, rank: int) -> int:
        """With so many rows to train on, and this rank."""
        training = self._trainer.training
        return self._bytes(min(training.batch, max(rows, 1)), rank, rows if training.bytes_lower else 0)

    def fitting(self, levels: Sequence[int], rows: int, memory: float) -> int:
        """The largest level with which training takes at most this memory; the smallest where none does."""
        return _largest(levels, lambda rank: self.of(rows, rank), memory)

    def _estimate(self, batch: int, rank: int, texts: int) -> int:
        spec = self._trainer.start().cut(rank).spec
        return taken(self._trainer, Runtime("torch", self._trainer.frozen.quantise), spec, batch, texts)


def fitting_on_device(kit: Kit, training: Training, levels: Sequence[int], rows: int, memory: float) -> int:
    """As ``Needs.fitting``, on onnxruntime from a kit: no torch is needed."""
    training = replace(training, batch=min(training.batch, max(rows, 1)))

    def of(rank: int) -> int:
        layers = tuple(replace(x, rank=min(rank, x.rank)) for x in kit.spec.layers)
        return taken_on_device(kit, training, replace(kit.spec, layers=layers))

    return _largest(levels, of, memory)


def taken_on_device(kit: Kit, training: Training, spec: Spec, trains: str = "ab") -> int:
    """Bytes that training an adapter of this spec takes on onnxruntime from a kit. trains: the factors trained."""
    config, training = _Config(kit.folder / CONFIG), replace(training, checkpointing=kit.facts.recompute)
    parameters = Sizes.of(config.to_dict()).parameters
    return parts(config, parameters, spec, training, kit.facts.quantise, "onnx", trains).total


def taken(
    trainer: "TorchTrainer",
    runtime: Runtime,
    spec: Spec,
    batch: int,
    texts: int | None,
    trains: str = "ab",
    spares: bool = True,
) -> int:
    """Bytes that training an adapter of this spec takes on a device with such a runtime.

    trainer: whose model and settings these are; texts: as for ``training.memory.estimate``; trains: the factors that
    are trained; spares: whether the device's process gives back what is freed, as it does on onnxruntime in any case.
    """
    from fedpeft.training.memory import estimate

    base, training = trainer.frozen, replace(trainer.training, batch=batch)
    config, parameters = base.model.config, base.parameters
    if runtime.engine == "onnx":
        return parts(config, parameters, spec, training, runtime.quantise, "onnx", trains).total
    return estimate(config, parameters, spec, training, runtime.quantise, spares, trains, texts)


def largest(spec: Spec) -> int:
    """The largest rank in an adapter; 0 where no layer has one."""
    return max((x.rank for x in spec.layers), default=0)


def _largest(levels: Sequence[int], takes: Callable[[int], int], memory: float) -> int:
    """The largest level that takes at most this memory; the smallest where none does."""
    return max((x for x in levels if takes(x) <= memory), default=min(levels))


@dataclass(frozen=True, slots=True)
class _Config:
    """A transformers configuration in a file. ConfigError for one that can't be read."""

    file: Path

    def to_dict(self) -> dict[str, object]:
        try:
            return dict(json.loads(self.file.read_text(encoding="utf8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"kit: {self.file} can't be read: {error}; export it anew") from error
