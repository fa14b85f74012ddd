"""Partitioners: which rows each client gets.

They share out a table in plain numpy, a draw for a draw from the generator that they are handed. The flwr-datasets
package has partitioners too, and none of them is used here: measured for flwr-datasets 0.6.1, it needs 260 MB of
pyarrow, pandas and datasets (and seaborn and aiohttp beside them) where this needs numpy, it keeps its seeds to
itself, and it holds datasets below 5 and with it huggingface_hub below 2.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from math import isfinite
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from fedpeft.data.shares import dirichlet, fill, whole
from fedpeft.data.table import Rows, Table
from fedpeft.errors import ConfigError


class Partitioner(ABC):
    """Shares the rows of a table out to clients.

    Law: the parts are ascending, share no row but those of ``Sampled``, and hold at least ``fewest`` rows each. All
    but ``Natural`` and ``Sampled`` also leave no row out.
    """

    __slots__ = ()
    is_natural: ClassVar[bool] = False
    """Whether the data set says whose row is whose, so that held-out rows come from the same clients."""

    @property
    @abstractmethod
    def fewest(self) -> int:
        """The fewest rows that any client gets."""

    @abstractmethod
    def assign(self, table: Table, rng: np.random.Generator) -> Sequence[Rows]:
        """The rows of each client. Raises ConfigError, naming the key, where the table can't be shared out so."""

    def names(self, table: Table, parts: Sequence[Rows]) -> tuple[str, ...]:
        """What to call each client: its number, where nothing better is known."""
        return tuple(str(i) for i in range(len(parts)))


@dataclass(frozen=True, slots=True)
class Iid(Partitioner):
    """Every client gets the same number of rows (one more or less), drawn uniformly."""

    clients: int = 10

    def __post_init__(self) -> None:
        at_least("clients", self.clients, 1)

    @property
    @override
    def fewest(self) -> int:
        return 1

    @override
    def assign(self, table: Table, rng: np.random.Generator) -> list[Rows]:
        _need_rows(self.clients, 1, len(table))
        return [np.sort(part) for part in np.array_split(_shuffled(len(table), rng), self.clients)]


@dataclass(frozen=True, slots=True)
class Skewed(Partitioner):
    """What shares out by a Dirichlet distribution has: ``alpha``, and the rows that every client gets at ``least``."""

    clients: int = 10
    alpha: float = 0.5
    least: int = 2

    def __post_init__(self) -> None:
        at_least("clients", self.clients, 1)
        positive("alpha", self.alpha)
        at_least("least", self.least, 1)

    @property
    @override
    def fewest(self) -> int:
        return self.least


@dataclass(frozen=True, slots=True)
class Dirichlet(Skewed):
    """Label skew: the rows of each label go to the clients in proportions drawn from Dirichlet(``alpha``).

    Large ``alpha`` tends to equal mixtures, small to labels that one client has all of; sizes differ with
    it. A client that would get less than ``least`` rows is given rows of the largest clients' commonest
    label, so that every client can train, and small ``alpha`` stays one-sided.
    Source: Yurochkin et al., arXiv:1905.12022, section 4 (proportions per label, as here); Hsu et al.,
    arXiv:1909.06335, section 4.1, draw each client's mixture of labels from the same distribution instead.
    """

    @override
    def assign(self, table: Table, rng: np.random.Generator) -> list[Rows]:
        labels = labels_of(table, "dirichlet")
        _need_rows(self.clients, self.least, len(table))
        parts: list[list[Rows]] = [[] for _ in range(self.clients)]
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            counts = whole(dirichlet(self.alpha, self.clients, rng) * len(rows), rng.random())
            for part, share in zip(parts, np.split(rows, np.cumsum(counts)[:-1]), strict=True):
                part.append(share)
        return [np.sort(part) for part in fill([np.concatenate(part) for part in parts], labels, self.least)]


@dataclass(frozen=True, slots=True)
class Shards(Partitioner):
    """Every client gets shards of exactly ``labels`` different labels.

    Each label is cut into about as many equal shards as its share of the rows asks for, no two of them for
    the same client. So shards differ in size where labels do.
    Source: McMahan et al., arXiv:1602.05629, section 3, where shards are equal and may straddle two labels.
    """

    clients: int = 10
    labels: int = 2

    def __post_init__(self) -> None:
        at_least("clients", self.clients, 1)
        at_least("labels", self.labels, 1)

    @property
    @override
    def fewest(self) -> int:
        return self.labels

    @override
    def assign(self, table: Table, rng: np.random.Generator) -> list[Rows]:
        labels = labels_of(table, "shards")
        found, sizes = np.unique(labels, return_counts=True)
        if self.labels > len(found):
            raise ConfigError(f"partition.labels: got {self.labels}; want at most {len(found)}, the number of labels")
        if self.clients * self.labels < len(found):
            raise ConfigError(
                f"partition.labels: got {self.labels} for each of {self.clients} clients, too few for all of the "
                f"{len(found)} labels; want clients x labels to be at least {len(found)}"
            )
        shards = self._shards(sizes)
        room = np.full(self.clients, self.labels)
        parts: list[list[Rows]] = [[] for _ in range(self.clients)]
        # To the clients with most room: so all have as much to within one label, and none gets stuck.
        for i in range(len(found)):
            takers = np.lexsort((rng.permutation(self.clients), -room))[: shards[i]]
            room[takers] -= 1
            rows = rng.permutation(np.flatnonzero(labels == found[i]))
            for taker, shard in zip(takers, np.array_split(rows, shards[i]), strict=True):
                parts[taker].append(shard)
        return [np.sort(np.concatenate(part)) for part in parts]

    def _shards(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Shards of each label: one at least, the rest where shards are largest; at most one a client or row."""
        most = np.minimum(sizes, self.clients)
        if most.sum() < self.clients * self.labels:
            raise ConfigError(
                f"partition.labels: got {self.labels} for each of {self.clients} clients; want at most "
                f"{most.sum()} in all, as some labels have too few rows"
            )
        shards = np.ones(len(sizes), np.int64)
        heap = [(-size / 2 if most[i] > 1 else 0.0, i) for i, size in enumerate(sizes.tolist())]
        heapify(heap)
        for _ in range(self.clients * self.labels - len(sizes)):
            i = heap[0][1]
            shards[i] += 1
            heapreplace(heap, (-float(sizes[i]) / (shards[i] + 1) if shards[i] < most[i] else 0.0, i))
        return shards


@dataclass(frozen=True, slots=True)
class Quantity(Skewed):
    """Quantity skew: sizes drawn from Dirichlet(``alpha``), rows drawn uniformly.

    Every client gets ``least`` rows, and its share of the rest on top. Large ``alpha`` tends to equal sizes.
    Source: Li et al., arXiv:2102.02079, section 4.3.
    """

    @override
    def assign(self, table: Table, rng: np.random.Generator) -> list[Rows]:
        _need_rows(self.clients, self.least, len(table))
        spare = len(table) - self.clients * self.least
        sizes = self.least + whole(dirichlet(self.alpha, self.clients, rng) * spare, rng.random())
        return [np.sort(part) for part in np.split(_shuffled(len(table), rng), np.cumsum(sizes)[:-1])]


@dataclass(frozen=True, slots=True)
class Natural(Partitioner):
    """The data set's own clients that have ``least`` rows or more: all of them, or ``clients`` of them.

    Those are drawn uniformly, not the largest: the few largest clients of real data hold most of it and are
    unlike the rest (of chitchat's users a tenth hold 79%). Clients are in the order of their names.
    """

    clients: int | None = None
    least: int = 10
    is_natural: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.clients is not None:
            at_least("clients", self.clients, 1)
        at_least("least", self.least, 1)

    @property
    @override
    def fewest(self) -> int:
        return self.least

    @override
    def assign(self, table: Table, rng: np.random.Generator) -> list[Rows]:
        if table.clients is None:
            raise ConfigError(
                "partition.name: got natural, and the data set does not say whose row is whose; "
                "name the column that does with data.client, or use another partition"
            )
        rows: dict[str, list[int]] = defaultdict(list)
        for row, name in enumerate(table.clients):
            rows[name].append(row)
        large = sorted(name for name in rows if len(rows[name]) >= self.least)
        wanted = len(large) if self.clients is None else self.clients
        if not large:
            most = max(map(len, rows.values()), default=0)
            raise ConfigError(f"partition.least: got {self.least}; want at most {most}, the rows of the largest client")
        if wanted > len(large):
            raise ConfigError(
                f"partition.clients: got {wanted}; want at most {len(large)}, the number of clients with "
                f"{self.least} rows or more (partition.least)"
            )
        chosen = np.sort(rng.choice(len(large), wanted, replace=False)) if wanted < len(large) else range(wanted)
        return [np.array(rows[large[i]], np.int64) for i in chosen]

    @override
    def names(self, table: Table, parts: Sequence[Rows]) -> tuple[str, ...]:
        if table.clients is None:
            raise ValueError("got a table without clients; want the one that the parts are of")
        return tuple(table.clients[int(part[0])] for part in parts)


def _shuffled(rows: int, rng: np.random.Generator) -> Rows:
    return rng.permutation(rows).astype(np.int64, copy=False)


def labels_of(table: Table, name: str) -> NDArray[np.int64]:
    """The class numbers, for the partitioner of this name. Raises ConfigError for data without labels."""
    if table.task == "lm":
        raise ConfigError(f"partition.name: got {name}, which shares out labels, and lm data has none; want iid, "
                          "quantity or natural")  # fmt: skip
    return table.labels


def _need_rows(clients: int, least: int, rows: int) -> None:
    if clients * least > rows:
        raise ConfigError(
            f"partition.clients: got {clients}, with {least} rows at least for each; want at most {rows // least}, "
            f"as there are {rows} different rows to share out"
        )


def at_least(key: str, value: int, least: int) -> None:
    """Raise ValueError for a setting that is less."""
    if value < least:
        raise ValueError(f"{key}: got {value}; want at least {least}")


def positive(key: str, value: float) -> None:
    """Raise ValueError for a setting that is not a number above 0."""
    if not (isfinite(value) and value > 0):
        raise ValueError(f"{key}: got {value}; want a number above 0")
