"""A federation: whose rows are whose, and which of them are for training, validation and test."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from fedpeft.data.partition import Partitioner
from fedpeft.data.shares import whole
from fedpeft.data.table import Rows, Table
from fedpeft.errors import ConfigError, DataError
from fedpeft.rounds import derive

Part: TypeAlias = Literal["train", "validation", "test"]

# The paths of the seeds of this room, after purpose "split".
_CAP, _CENTRAL, _CLIENT = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Split:
    """central: the share of all rows that makes the central test set; of the rest, each client keeps the
    share ``validation`` and the share ``test`` out of its training."""

    central: float = 0.2
    validation: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        for key in ("central", "validation", "test"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}: got {getattr(self, key)}; want at least 0 and less than 1")
        if self.validation + self.test >= 1:
            raise ValueError(
                f"test: got {self.test} beside validation {self.validation}; want less than 1 together, "
                "so that rows are left to train on"
            )


class Size(NamedTuple):
    """How many rows one client has for what."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True, slots=True, eq=False)
class Federation:
    """A table shared out. No row, and no two equal rows, are in two places.

    names: of the clients, which are numbered from ``first``; train, validation, test: the rows of each, ascending;
    central: the rows of the central test set; duplicates: how many rows were left out for being equal to another.
    """

    table: Table
    names: tuple[str, ...]
    train: tuple[Rows, ...]
    validation: tuple[Rows, ...]
    test: tuple[Rows, ...]
    central: Rows
    duplicates: int = 0
    first: int = 0

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return len(self.names)

    def part(self, client: int | None, name: Part) -> Table:
        """One client's rows for ``name``, or the central test set for client None.

        Raises ValueError for a client that isn't here, and where there is no central test set.
        """
        if client is None:
            if name != "test" or not len(self.central):
                raise ValueError(f"got {name!r} of no client; want 'test', and a share split.central above 0")
            return self.table.take(self.central)
        if not 0 <= client - self.first < self.clients:
            raise ValueError(f"got client {client}; want {self.first} to {self.first + self.clients - 1}")
        return self.table.take(self._rows(name)[client - self.first])

    def pooled(self, name: Part) -> Table:
        """The rows of all clients for ``name``, in the table's order: what training in one place would have."""
        return self.table.take(np.sort(np.concatenate(self._rows(name))))

    def sizes(self) -> tuple[Size, ...]:
        """How many rows each client has, in the order of their numbers."""
        return tuple(Size(*map(len, rows)) for rows in zip(self.train, self.validation, self.test, strict=True))

    def missing_classes(self) -> tuple[str, ...]:
        """The classes that no client trains on, which the model can't learn."""
        if not self.table.classes:
            return ()
        seen = set(self.table.labels[np.concatenate(self.train)].tolist())
        return tuple(name for i, name in enumerate(self.table.classes) if i not in seen)

    def summary(self) -> dict[str, Any]:
        """All this as plain values for the report: sizes, and for each client the training rows of each class."""
        return {
            "task": self.table.task,
            "fingerprint": self.table.fingerprint,
            "rows": len(self.table),
            "duplicates": self.duplicates,
            "central": len(self.central),
            "classes": list(self.table.classes),
            "missing_classes": list(self.missing_classes()),
            "clients": [
                {"client": self.first + i, "name": name, **size._asdict(), "labels": self._labels(self.train[i])}
                for i, (name, size) in enumerate(zip(self.names, self.sizes(), strict=True))
            ],
        }

    def _rows(self, name: Part) -> tuple[Rows, ...]:
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
    and takes from all of them in proportion, down to the partitioner's ``fewest``.
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
        size = min(max(1, _share(split.central, len(rows))), len(rows) - 1) if split.central else 0
        central, rest = _draw(rows, size, _rng(seed, _CENTRAL))
        parts = [rest[part] for part in partitioner.assign(table.take(rest), rng)]
    names = partitioner.names(table, parts)
    divided = [_divide(part, split, _rng(seed, _CLIENT, i)) for i, part in enumerate(parts)]
    train, validation, test = zip(*divided, strict=True)
    return Federation(table, names, train, validation, test, central, duplicates)


def own(table: Table, split: Split, seed: int, client: int = 0, examples: int | None = None) -> Federation:
    """The federation as a node sees it that holds one client's data and nothing else.

    All rows are the client's, which has the number ``client`` in the fleet; there is no central test set, and
    ``split.central`` is not used.
    """
    rows = _distinct(table)
    duplicates = len(table) - len(rows)
    if examples is not None and examples < len(rows):
        rows = np.sort(_rng(seed, _CAP, client).choice(rows, examples, replace=False))
    train, validation, test = _divide(rows, split, _rng(seed, _CLIENT, client))
    return Federation(table, (str(client),), (train,), (validation,), (test,), rows[:0], duplicates, client)


def _distinct(table: Table) -> Rows:
    if not len(table):
        raise DataError("the data set has no rows; want at least one for each client")
    return table.distinct()


def _rng(seed: int, *path: int) -> np.random.Generator:
    return np.random.default_rng(derive(seed, "split", *path))


def _share(share: float, rows: int) -> int:
    """The share of the rows to the nearest whole number, halves up."""
    return int(np.floor(share * rows + 0.5))


def _draw(rows: Rows, size: int, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """``size`` of the rows, and the others, each ascending."""
    shuffled = rng.permutation(rows)
    return np.sort(shuffled[:size]), np.sort(shuffled[size:])


def _divide(rows: Rows, split: Split, rng: np.random.Generator) -> tuple[Rows, Rows, Rows]:
    """A client's rows for training (one at least), validation and test."""
    validation = min(_share(split.validation, len(rows)), len(rows) - 1)
    test = min(_share(split.test, len(rows)), len(rows) - 1 - validation)
    shuffled = rng.permutation(rows)
    ends = [validation, validation + test]
    held, tested, train = (np.sort(part) for part in np.split(shuffled, ends))
    return train, held, tested


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
        _draw(part, min(size, len(part) - 1), _rng(seed, _CENTRAL, i))
        for i, (part, size) in enumerate(zip(parts, wanted.tolist(), strict=True))
    ]
    return [rest for _, rest in drawn], np.sort(np.concatenate([central for central, _ in drawn]))
