"""How much memory a client's training takes, by its rank, and the rank that fits."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedpeft.training.loop import TorchTrainer


class Needs:
    """Bytes that training takes at its peak, as ``training.memory.estimate`` has it.

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
        return max((x for x in levels if self.of(rows, x) <= memory), default=min(levels))

    def _estimate(self, batch: int, rank: int) -> int:
        from fedpeft.training.memory import estimate

        trainer, base = self._trainer, self._trainer.frozen
        spec, training = trainer.start().cut(rank).spec, replace(trainer.training, batch=batch)
        return estimate(base.model.config, base.parameters, spec, training, base.quantise)
