"""How much memory a client's training takes, by its rank, and the rank that fits."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.errors import ConfigError
from fedpeft.training.kit import CONFIG, Kit
from fedpeft.training.memory import parts
from fedpeft.training.predict import Sizes
from fedpeft.training.settings import Training

if TYPE_CHECKING:
    from fedpeft.training.loop import TorchTrainer


class Needs:
    """Bytes that training takes at its peak in a device's own process, as ``training.memory.estimate`` has it.

    What a client of a low rank runs frozen is not counted: it has neither gradients nor moments.
    """

    def __init__(self, trainer: "TorchTrainer") -> None:
        self._trainer = trainer
        self._bytes = cache(self._estimate)

    def of(self, rows: int, rank: int) -> int:
        """With so many rows to train on, and this rank."""
        return self._bytes(min(self._trainer.training.batch, max(rows, 1)), rank)

    def fitting(self, levels: Sequence[int], rows: int, memory: float) -> int:
        """The largest level with which training takes at most this memory; the smallest where none does."""
        return _largest(levels, lambda rank: self.of(rows, rank), memory)

    def _estimate(self, batch: int, rank: int) -> int:
        from fedpeft.training.memory import estimate

        trainer, base = self._trainer, self._trainer.frozen
        spec, training = trainer.start().cut(rank).spec, replace(trainer.training, batch=batch)
        return estimate(base.model.config, base.parameters, spec, training, base.quantise, sparing=True)


def fitting_on_device(kit: Kit, training: Training, levels: Sequence[int], rows: int, memory: float) -> int:
    """As ``Needs.fitting``, on onnxruntime from a kit: no torch is needed."""
    config, spec = _Config(kit.folder / CONFIG), kit.spec
    training = replace(training, batch=min(training.batch, max(rows, 1)), checkpointing=kit.facts.recompute)

    parameters = Sizes.of(config.to_dict()).parameters

    def of(rank: int) -> int:
        mine = replace(spec, layers=tuple(replace(x, rank=min(rank, x.rank)) for x in spec.layers))
        return parts(config, parameters, mine, training, kit.facts.quantise, "onnx").total

    return _largest(levels, of, memory)


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
