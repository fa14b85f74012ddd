"""A federation: whose rows are whose, and which of them are for training, validation and test."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpeft.data.lazy import Lazy
from fedpeft.data.partition import Partitioner
from fedpeft.data.sampled import Pool, Sampled
from fedpeft.data.shares import whole
from fedpeft.data.split import PARTS, Part, Size, Split, counts, divide, part_from, share_of
from fedpeft.data.table import Rows, Table
from fedpeft.errors import ConfigError, DataError
from fedpeft.rounds import derive

# The paths of the seeds of this room, after purpose "split".
_CAP, _CENTRAL, _CLIENT, _POOLS = 1, 2, 3, 4
_SOME = 300


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """The rows that clients draw those for training, validation and test from, and how many rows each draws."""

    pools: tuple[Rows, Rows, Rows]
    sizes: Sequence[Size]


@dataclass(frozen=True, slots=True, eq=False)
class Federation:
    """A table shared out. No row, and no two equal rows, are in two places.

    names: of the clients, which are numbered from ``first``; train, validation, test: the rows of each, ascending;
    central: the rows of the central test set; duplicates: how many rows were left out for being equal to another;
    drawn: from what clients draw their rows, where they do (``Sampled``). Then clients may share rows of one kind, but
    no row is of two kinds, and what is of a client is made anew whenever it is asked for, so that nothing here grows
    with the number of clients.
    """

    table: Table
    names: Sequence[str]
    train: Sequence[Rows]
    validation: Sequence[Rows]
    test: Sequence[Rows]
    central: Rows
    duplicates: int = 0
    first: int = 0
    drawn: Drawn | None = None

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return len(self.names)

    def part(self, client: int | None, name: Part) -> Table:
        """A table of one client's rows for ``name``, or of the central test set for client None.

        Raises ValueError for a client that isn't here, and where there is no central test set.
        """
        return self.table.take(self.rows(client, name))

    def rows(self, client: int | None, name: Part) -> Rows:
        """The numbers of the rows that ``part`` is made of; errors are the same."""
        if client is None:
            if name != "test" or not len(self.central):
                raise ValueError(f"got {name!r} of no client; want 'test', and a share split.central above 0")
            return self.central
        return self._rows(name)[self._index(client)]

    def used(self) -> Rows:
        """The rows that are, or may be, in some client's part or in the central test set; ascending, each once."""
        parts = self.drawn.pools if self.drawn else (*self.train, *self.validation, *self.test)
        return np.unique(np.concatenate([*parts, self.central]))

    def union(self, name: Part) -> Rows:
        """The rows of all clients for ``name``, ascending, each once: what training in one place would have."""
        found = np.zeros(len(self.table), np.bool_)
        all_of_them = None if self.drawn is None else len(self.drawn.pools[PARTS.index(name)])
        for i, rows in enumerate(self._rows(name)):
            found[rows] = True
            if i % _SOME == 0 and np.count_nonzero(found) == all_of_them:
                break
        return np.flatnonzero(found)

    def pooled(self, name: Part) -> Table:
        """The table of the rows of all clients for ``name``."""
        return self.table.take(self.union(name))

    def size(self, client: int) -> Size:
        """How many rows a client has. Raises ValueError for one that isn't here."""
        return self.sizes()[self._index(client)] if self.drawn else Size(*(len(self.rows(client, x)) for x in PARTS))

    def sizes(self) -> Sequence[Size]:
        """How many rows each client has, in the order of their numbers."""
        if self.drawn is not None:
            return self.drawn.sizes
        return tuple(Size(*map(len, rows)) for rows in zip(self.train, self.validation, self.test, strict=True))

    def some(self, most: int = _SOME) -> Sequence[int]:
        """The numbers of all clients, or of this many of them, evenly spaced."""
        return [self.first + i * self.clients // most for i in range(most)] if self.clients > most else [
            self.first + i for i in range(self.clients)
        ]  # fmt: skip

    def missing_classes(self) -> tuple[str, ...]:
        """The classes that no client trains on, which the model can't learn."""
        if not self.table.classes:
            return ()
        labels = self.table.labels
        possible = set(labels[self.drawn.pools[0]].tolist() if self.drawn else range(len(self.table.classes)))
        seen: set[int] = set()
        for rows in self.train:
            seen.update(labels[rows].tolist())
            if seen == possible:
                break
        return tuple(name for i, name in enumerate(self.table.classes) if i not in seen)

    def summary(self, clients: Sequence[int] | None = None) -> dict[str, Any]:
        """All this as plain values for the report, and for each of the ``clients`` the training rows of each class.

        They are ``some`` of the clients, if not given; "population" says how many there are.
        """
        return {
            "task": self.table.task,
            "fingerprint": self.table.fingerprint,
            "rows": len(self.table),
            "duplicates": self.duplicates,
            "central": len(self.central),
            "classes": list(self.table.classes),
            "missing_classes": list(self.missing_classes()),
            "population": self.clients,
            "clients": [
                {
                    "client": client,
                    "name": self.names[client - self.first],
                    **self.size(client)._asdict(),
                    "labels": self._labels(self.rows(client, "train")),
                }
                for client in (self.some() if clients is None else clients)
            ],
        }

    def _index(self, client: int) -> int:
        if not 0 <= client - self.first < self.clients:
            raise ValueError(f"got client {client}; want {self.first} to {self.first + self.clients - 1}")
        return client - self.first

    def _rows(self, name: Part) -> Sequence[Rows]:
        places = {"train": self.train, "validation": self.validation, "test": self.test}
        if name not in places:
            raise ValueError(f"got {name!r}; want train, validation or test")
        return places[name]

    def _labels(self, rows: Rows) -> list[int]:
        if not self.table.classes:
            return []
        return list(self.table.take(rows).histogram())


def federate(
    table: Table, partitioner: Partitioner, split: Split, seed: int, examples: int | None = None
) -> Federation:
    """The table shared out by ``seed``: the same rows in every process.

    Equal rows count once (``Table.distinct``), so no example is on two sides. ``examples`` caps the rows of the
    whole federation, central test set included. The central test set is drawn before the partition; but where
    the clients are given by nature it is held-out rows of the chosen clients, and the cap comes after the choice
    and takes from all of them in proportion, down to the partitioner's ``fewest``. Where clients draw their rows, those
    that are left are divided as a client's are, and clients draw each kind from its own.
    Raises ConfigError naming the key where that can't be done.
    """
    rows = _distinct(table)
    duplicates = len(table) - len(rows)
    rng = np.random.default_rng(derive(seed, "partition"))
    if partitioner.is_natural:
        parts = [rows[part] for part in partitioner.assign(table.take(rows), rng)]
        parts = _cap(parts, examples, partitioner.fewest, seed)
        parts, central = _hold_out(parts, split.central, seed)
    else:
        if examples is not None and examples < len(rows):
            rows = np.sort(_rng(seed, _CAP).choice(rows, examples, replace=False))
        size = min(max(1, share_of(split.central, len(rows))), len(rows) - 1) if split.central else 0
        central, rest = part_from(rows, size, _rng(seed, _CENTRAL))
        if isinstance(partitioner, Sampled):
            return _drawn(table, rest, central, partitioner, split, seed, duplicates)
        parts = [rest[part] for part in partitioner.assign(table.take(rest), rng)]
    names = partitioner.names(table, parts)
    divided = [divide(part, split, _rng(seed, _CLIENT, i)) for i, part in enumerate(parts)]
    train, validation, test = zip(*divided, strict=True)
    return Federation(table, names, train, validation, test, central, duplicates)


def _drawn(
    table: Table, rest: Rows, central: Rows, partitioner: Sampled, split: Split, seed: int, duplicates: int
) -> Federation:
    kinds = divide(rest, split, _rng(seed, _POOLS))
    pools = tuple(Pool.of(table, rows, partitioner.alpha is not None) for rows in kinds)
    for count, pool, name in zip(counts(partitioner.most, split), pools, PARTS, strict=True):
        partitioner.check(count, pool, f"different rows for {name}")

    sizes = Lazy(partitioner.clients, lambda client: counts(partitioner.count(client, seed), split))

    def part(kind: int) -> Sequence[Rows]:
        return Lazy(
            partitioner.clients,
            lambda client: partitioner.draw(pools[kind], pools[0], sizes[client][kind], client, kind, seed),
        )

    names, drawn = Lazy(partitioner.clients, str), Drawn(kinds, sizes)
    return Federation(table, names, part(0), part(1), part(2), central, duplicates, drawn=drawn)


def own(table: Table, split: Split, seed: int, client: int = 0, examples: int | None = None) -> Federation:
    """The federation as a node sees it that holds one client's data and nothing else.

    All rows are the client's, which has the number ``client`` in the fleet; there is no central test set, and
    ``split.central`` is not used.
    """
    rows = _distinct(table)
    duplicates = len(table) - len(rows)
    if examples is not None and examples < len(rows):
        rows = np.sort(_rng(seed, _CAP, client).choice(rows, examples, replace=False))
    train, validation, test = divide(rows, split, _rng(seed, _CLIENT, client))
    return Federation(table, (str(client),), (train,), (validation,), (test,), rows[:0], duplicates, client)


def _distinct(table: Table) -> Rows:
    if not len(table):
        raise DataError("the data set has no rows; want at least one for each client")
    return table.distinct()


def _rng(seed: int, *path: int) -> np.random.Generator:
    return np.random.default_rng(derive(seed, "split", *path))


def _cap(parts: Sequence[Rows], examples: int | None, least: int, seed: int) -> list[Rows]:
    """The parts cut down to ``examples`` rows in all: ``least`` each, and in proportion to what each has above it."""
    sizes = np.array([len(part) for part in parts])
    if examples is None or examples >= sizes.sum():
        return list(parts)
    if examples < least * len(parts):
        raise ConfigError(
            f"data.examples: got {examples}; want at least {least * len(parts)}, {least} (partition.least) "
            f"for each of {len(parts)} clients; or want fewer clients with partition.clients"
        )
    wanted = least + whole((sizes - least) * (examples - least * len(parts)) / (sizes - least).sum())
    return [
        np.sort(_rng(seed, _CAP, i).choice(part, size, replace=False))
        for i, (part, size) in enumerate(zip(parts, wanted.tolist(), strict=True))
    ]


def _hold_out(parts: Sequence[Rows], share: float, seed: int) -> tuple[list[Rows], Rows]:
    """The parts without a share of each, and the rows held out, ascending. Every part keeps a row."""
    wanted = whole(np.array([len(part) * share for part in parts]))
    drawn = [
        part_from(part, min(size, len(part) - 1), _rng(seed, _CENTRAL, i))
        for i, (part, size) in enumerate(zip(parts, wanted.tolist(), strict=True))
    ]
    return [rest for _, rest in drawn], np.sort(np.concatenate([central for central, _ in drawn]))
