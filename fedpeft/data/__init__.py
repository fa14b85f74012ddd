"""Data sets as tables, and who holds which rows."""

from fedpeft.data.federation import Federation, federate, own
from fedpeft.data.partition import Dirichlet, Iid, Natural, Partitioner, Quantity, Shards
from fedpeft.data.sampled import Sampled
from fedpeft.data.sets import SHORT_NAMES, assets, load
from fedpeft.data.source import Source
from fedpeft.data.split import Part, Size, Split
from fedpeft.data.table import Rows, Table, Task

__all__ = [
    "SHORT_NAMES",
    "Dirichlet",
    "Federation",
    "Iid",
    "Natural",
    "Part",
    "Partitioner",
    "Quantity",
    "Rows",
    "Sampled",
    "Shards",
    "Size",
    "Source",
    "Split",
    "Table",
    "Task",
    "assets",
    "federate",
    "load",
    "own",
]
