"""Gradients: base models, the bridge to peft, the train loop, evaluation. The only room that imports torch.

Importing this package, its ``settings``, ``environment``, ``memory`` and ``packaged`` imports no torch,
so that a coordinator without it can read an experiment file; everything else does.
"""

from fedpeft.training.settings import Method, Model, Training

__all__ = ["Method", "Model", "Training"]
