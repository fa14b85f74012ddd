"""Where the data comes from: a short name, or a path to the user's own."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedpeft.data import packaged
from fedpeft.data.columns import table_of
from fedpeft.data.files import read_columns
from fedpeft.data.source import Source
from fedpeft.data.table import Table
from fedpeft.errors import ConfigError, DataError

_PACKAGED: Mapping[str, Callable[[], Table]] = {
    "chitchat": packaged.chitchat,
    "debian": packaged.debian,
    "fashion-mnist": packaged.fashion_mnist,
    "fortunes": packaged.fortunes,
    "wiki11": packaged.wiki11,
    "wordnet": packaged.wordnet,
}

SHORT_NAMES: tuple[str, ...] = tuple(_PACKAGED)
"""The data sets that are known by name."""


def load(source: Source, ranks: str = "") -> Table:
    """The data, all of it: ``federate`` applies ``source.examples`` once it's known who has what.

    ranks: the column of the user's own data that says each client's rank, if it is wanted.
    Loading the same again in a process is free while the file hasn't changed. Raises ConfigError, naming the key, for
    settings that don't fit the data; DataError, naming the file and the line, for data that can't be read, and with the
    way to install it for a data set that isn't here.
    """
    return _load(replace(source, examples=None), ranks, _stamp(source.name))


def assets() -> dict[str, str]:
    """Each data set that is known by name: where it is, or what to do to have it."""
    found = {}
    for name in SHORT_NAMES:
        try:
            found[name] = str(packaged.locate(name))
        except DataError as error:
            found[name] = str(error)
    return found


@lru_cache(maxsize=8)
def _load(source: Source, ranks: str, stamp: tuple[tuple[str, int, int], ...]) -> Table:
    if source.name in _PACKAGED:
        if ranks:
            raise ConfigError(
                f"ranks.name: got 'column', and data.name {source.name!r} is a packaged set without one of ranks; "
                f"want levels or listed, or a file of your own"
            )
        table = _of_classes(_PACKAGED[source.name](), source.classes)
    else:
        table = table_of(source, read_columns(source, ranks), ranks)
    return _of_clients(table, source.only)


def _stamp(name: str) -> tuple[tuple[str, int, int], ...]:
    """What changes when the user's data does: path, time and size of its files. Raises ConfigError or DataError."""
    if name in _PACKAGED:
        return ()
    path = Path(name)
    if not path.exists():
        if path.suffix or len(path.parts) > 1:
            raise DataError(
                f"{path}: no such file or folder (data.name); want a .jsonl or .csv file or a datasets folder"
            )
        raise ConfigError(
            f"data.name: got {name!r}; want one of {', '.join(SHORT_NAMES)}, "
            "or the path of a .jsonl or .csv file or a datasets folder"
        )
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return tuple((str(p.resolve()), p.stat().st_mtime_ns, p.stat().st_size) for p in files)


def _of_classes(table: Table, classes: tuple[str, ...]) -> Table:
    """The rows of these classes, which are numbered in this order; all of them where none are named."""
    if not classes:
        return table
    for name in classes:
        if name not in table.classes:
            known = ", ".join(table.classes) or "no classes"
            raise ConfigError(f"data.classes: got {name!r}; the data set has {known}")
    number = np.full(len(table.classes), -1, np.int64)
    number[[table.classes.index(name) for name in classes]] = np.arange(len(classes))
    labels = number[table.labels]
    kept = table.take(np.flatnonzero(labels >= 0))
    return replace(kept, targets=labels[labels >= 0], classes=classes)


def _of_clients(table: Table, only: tuple[str, ...]) -> Table:
    """The rows of these natural clients; all of them where none are named."""
    if not only:
        return table
    if table.clients is None:
        raise ConfigError("data.only: the data set does not say whose row is whose; leave it out, or see data.client")
    known = set(table.clients)
    for name in only:
        if name not in known:
            shown = ", ".join(sorted(known)) if len(known) <= 50 else f"{len(known)} others"
            raise ConfigError(f"data.only: no client is called {name!r}; there are {shown}")
    return table.take(np.array([i for i, name in enumerate(table.clients) if name in only], np.int64))
