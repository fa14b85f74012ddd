"""A program that trains a job from the kit in a folder, where importing torch and its like is an error.

python without_torch.py FOLDER: prints "loss before, loss after, modules" as JSON.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path

from typing_extensions import override

BLOCKED = frozenset({"torch", "transformers", "peft", "onnx", "onnxscript", "accelerate"})


class Refusing(MetaPathFinder):
    """Finds no blocked module, as if it were not installed."""

    @override
    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not for devices")
        return None


def main(folder: str) -> None:
    """Train one job, and print what it came to."""
    for room in ("config", "flower", "ondevice", "run.node"):
        importlib.import_module(f"fedpeft.{room}")

    import numpy as np

    from fedpeft.data import Federation, Table
    from fedpeft.ondevice.trainer import OnnxTrainer
    from fedpeft.rounds import Done, Job, Metrics, Trial
    from fedpeft.training.kit import Kit
    from fedpeft.training.settings import Model, Training

    kit = Kit.open(Path(folder))
    texts = ("a b c", "d e", "f g h i", "j k l a")
    table = (
        Table("lm", texts, tuple(reversed(texts)))
        if kit.facts.task == "lm"
        else Table("classify", texts, np.array([0, 1, 2, 1]), kit.facts.classes)
    )
    rows, none = np.arange(4), np.arange(0)
    federation = Federation(table, ("zero",), (rows,), (none,), (none,), none)
    training = Training(lr=0.05, batch=2, epochs=3, length=12)
    trainer = OnnxTrainer.open(kit, training, federation, Model(kit.facts.model), 1)
    [done] = trainer.train_many([Job(0, 0, 1, trainer.start())])
    assert isinstance(done, Done), done
    losses = []
    for found in trainer.evaluate_many([Trial(0, "train", x) for x in (trainer.start(), done.trained)]):
        assert isinstance(found, Metrics), found
        losses.append(found.mean_loss)
    print(json.dumps([*losses, sorted(BLOCKED & {x.partition(".")[0] for x in sys.modules})]))


sys.meta_path.insert(0, Refusing())
main(sys.argv[1])
