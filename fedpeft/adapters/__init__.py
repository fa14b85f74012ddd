"""Values: layouts, low-rank layers, adapters, updates, and algebra on factors."""

from fedpeft.adapters.adapter import Adapter, Layer, Spec, Update, same
from fedpeft.adapters.cores import CORES, Basis, bases, basis_of, cored, drawn, lasting
from fedpeft.adapters.factored import (
    ROW,
    best_rank,
    compress,
    drift,
    factored_svd,
    orthogonal,
    orthonormal,
    stack,
    top_svd,
)
from fedpeft.adapters.layout import Array, Layout, Shape, Tensors
from fedpeft.adapters.lowrank import LowRank
from fedpeft.adapters.walks import MOVES, Pool, flat, places, retraced, walk_of, walked

__all__ = [
    "CORES",
    "MOVES",
    "ROW",
    "Adapter",
    "Array",
    "Basis",
    "Layer",
    "Layout",
    "LowRank",
    "Pool",
    "Shape",
    "Spec",
    "Tensors",
    "Update",
    "bases",
    "basis_of",
    "best_rank",
    "compress",
    "cored",
    "drawn",
    "drift",
    "factored_svd",
    "flat",
    "lasting",
    "orthogonal",
    "orthonormal",
    "places",
    "retraced",
    "same",
    "stack",
    "top_svd",
    "walk_of",
    "walked",
]
