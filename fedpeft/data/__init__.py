"""Data sets as tables, and who holds which rows."""

from fedpeft.data.batches import Padded, by_length, order, padded
from fedpeft.data.federation import Federation, federate, own
from fedpeft.data.partition import Dirichlet, Iid, Natural, Partitioner, Quantity, Shards
from fedpeft.data.sampled import Sampled
from fedpeft.data.sets import SHORT_NAMES, assets, load
from fedpeft.data.source import Source
from fedpeft.data.split import Part, Size, Split
from fedpeft.data.table import Rows, Table, Task
from fedpeft.data.tokens import ABSENT, CUT, WHOLE, Encoded, Rendered, Store, dialogue, joined, turns

__all__ = [
    "ABSENT",
    "CUT",
    "SHORT_NAMES",
    "WHOLE",
    "Dirichlet",
    "Encoded",
    "Federation",
    "Iid",
    "Natural",
    "Padded",
    "Part",
    "Partitioner",
    "Quantity",
    "Rendered",
    "Rows",
    "Sampled",
    "Shards",
    "Size",
    "Source",
    "Split",
    "Store",
    "Table",
    "Task",
    "assets",
    "by_length",
    "dialogue",
    "federate",
    "joined",
    "load",
    "order",
    "own",
    "padded",
    "turns",
]
