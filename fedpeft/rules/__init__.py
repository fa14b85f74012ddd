"""What is averaged: one file a rule, or a family of rules that differ in a field."""

from fedpeft.rules.base import Broadcast, ListRule, MeanRule, Rule, ServerState, Task
from fedpeft.rules.factors import FactorMean
from fedpeft.rules.median import Median
from fedpeft.rules.server import Adagrad, Adam, Averaging, Momentum, ServerOptimiser, Yogi
from fedpeft.rules.weighting import Examples, SquareRoot, Uniform, Weighting

__all__ = [
    "Adagrad",
    "Adam",
    "Averaging",
    "Broadcast",
    "Examples",
    "FactorMean",
    "ListRule",
    "MeanRule",
    "Median",
    "Momentum",
    "Rule",
    "ServerOptimiser",
    "ServerState",
    "SquareRoot",
    "Task",
    "Uniform",
    "Weighting",
    "Yogi",
]
