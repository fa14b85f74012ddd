"""Values: layouts, low-rank layers, adapters, updates, and algebra on factors."""

from fedpeft.adapters.adapter import Adapter, Layer, Spec, Update, same
from fedpeft.adapters.factored import best_rank, factored_svd, stack
from fedpeft.adapters.layout import Array, Layout, Shape, Tensors
from fedpeft.adapters.lowrank import LowRank

__all__ = [
    "Adapter",
    "Array",
    "Layer",
    "Layout",
    "LowRank",
    "Shape",
    "Spec",
    "Tensors",
    "Update",
    "best_rank",
    "factored_svd",
    "same",
    "stack",
]
