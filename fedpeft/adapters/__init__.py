"""Values: layouts, low-rank layers, adapters, updates, and algebra on factors."""

from fedpeft.adapters.adapter import Adapter, Layer, Spec, Update, same
from fedpeft.adapters.factored import ROW, best_rank, compress, drift, factored_svd, orthogonal, stack, top_svd
from fedpeft.adapters.layout import Array, Layout, Shape, Tensors
from fedpeft.adapters.lowrank import LowRank

__all__ = [
    "ROW",
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
    "compress",
    "drift",
    "factored_svd",
    "orthogonal",
    "same",
    "stack",
    "top_svd",
]
