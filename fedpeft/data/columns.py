"""Columns of the user's own data as a table, with errors that name file, line, column and key."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fedpeft.data.images import stack
from fedpeft.data.source import Source
from fedpeft.data.table import Table, Task
from fedpeft.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """A file's columns: the names of all, and the values of those that may be needed, None where a row has none.

    places: what to call each row, such as "line 7"; classes: for columns whose labels are numbers of named classes.
    """

    path: Path
    names: tuple[str, ...]
    values: Mapping[str, Sequence[object]]
    places: Sequence[str]
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def error(self, row: int, column: str, what: str) -> DataError:
        """A DataError that says where: file, place and column."""
        return DataError(f"{self.path}, {self.places[row]}, column {column!r}: {what}")


def table_of(source: Source, columns: Columns, ranks: str = "") -> Table:
    """The table of these columns. ranks: the column of each client's rank, if it is wanted.

    Raises ConfigError for a column that isn't there, DataError for a bad value.
    """
    if not columns.places:
        raise DataError(f"{columns.path}: has no rows; want at least one")
    found = _examples(source, columns)
    return replace(found, ranks=_ranks(ranks, columns)) if ranks else found


def _examples(source: Source, columns: Columns) -> Table:
    task = _task(source, columns)
    clients = _clients(source.client, columns)
    if task == "lm":
        replies = _texts("reply", source.reply, columns)
        prompts = _texts("prompt", source.prompt, columns, True) if source.prompt else ("",) * len(replies)
        return Table("lm", prompts, replies, (), clients)
    if task == "image":
        images = _column("image", source.image, columns)
        pixels = stack(images, columns, source.image, source.side)
        return Table("image", pixels, *_labels(source, columns), clients)
    return Table("classify", _texts("text", source.text, columns), *_labels(source, columns), clients)


def _task(source: Source, columns: Columns) -> Task:
    if source.task != "auto":
        return source.task
    names = columns.names
    if source.label in names and (source.text in names or source.image in names or source.reply not in names):
        return "image" if source.image in names else "classify"
    if source.reply in names:
        return "lm"
    raise ConfigError(
        f"data.label: no column {source.label!r} in {columns.path}; it has {', '.join(names)}; name the "
        "label column with data.label, or for language modelling the columns data.prompt and data.reply"
    )


def _column(key: str, name: str, columns: Columns) -> Sequence[object]:
    if name not in columns.names:
        hint = ', or set it to "" where there are no prompts' if key == "prompt" else ""
        raise ConfigError(
            f"data.{key}: no column {name!r} in {columns.path}; it has {', '.join(columns.names)}; "
            f"name the {key} column with data.{key}{hint}"
        )
    return columns.values[name]


def _texts(key: str, name: str, columns: Columns, may_be_empty: bool = False) -> tuple[str, ...]:
    values = _column(key, name, columns)
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise columns.error(row, name, f"got {_shown(value)}; want text")
        if not may_be_empty and not value.strip():
            raise columns.error(row, name, "is empty; want text: fill it in or leave the row out")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise columns.error(row, name, "got half a character; want text that UTF-8 can hold")
    return tuple(str(value) for value in values)


def _clients(name: str, columns: Columns) -> tuple[str, ...] | None:
    """The client of each row; None where there's no such column and none but the default was asked for."""
    if not name or (name == "client" and name not in columns.names):
        return None
    values = _column("client", name, columns)
    return tuple(_name(value, row, name, columns) for row, value in enumerate(values))


def _ranks(name: str, columns: Columns) -> tuple[int, ...]:
    if name not in columns.names:
        raise ConfigError(
            f"ranks.column: no column {name!r} in {columns.path}; it has {', '.join(columns.names)}; "
            f"name the column of each client's rank"
        )
    found = []
    for row, value in enumerate(columns.values[name]):
        text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
        if isinstance(value, bool) or not re.fullmatch(r"[1-9][0-9]{0,8}", text):
            raise columns.error(row, name, f"got {_shown(value)}; want a rank, a whole number of at least 1")
        found.append(int(text))
    return tuple(found)


def _labels(source: Source, columns: Columns) -> tuple[np.typing.NDArray[np.int64], tuple[str, ...]]:
    """The class number of each row, and the classes: as named, or as the file has them, or as found.

    Found ones are sorted, by value if all are whole numbers.
    """
    values = _column("label", source.label, columns)
    given = columns.classes.get(source.label)
    if given is None:
        names = [_name(value, row, source.label, columns) for row, value in enumerate(values)]
    else:
        names = [_named(value, given, row, source.label, columns) for row, value in enumerate(values)]
    by_value = all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names)
    found = sorted(set(names), key=lambda name: (int(name) if by_value else 0, name))
    classes = source.classes or given or tuple(found)
    number = {name: i for i, name in enumerate(classes)}
    for row, name in enumerate(names):
        if name not in number:
            raise columns.error(row, source.label, f"got {name!r}; want one of data.classes: {', '.join(classes)}")
    if len(classes) < 2:
        raise DataError(
            f"{columns.path}, column {source.label!r}: all labels are {classes[0]!r}; want at least 2 classes "
            "(name them all with data.classes where this file has only some)"
        )
    return np.array([number[name] for name in names], np.int64), classes


def _named(value: object, names: tuple[str, ...], row: int, column: str, columns: Columns) -> str:
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise columns.error(row, column, f"got {_shown(value)}; want a class number from 0 to {len(names) - 1}")
    return names[value]


def _name(value: object, row: int, column: str, columns: Columns) -> str:
    """A label's or a client's name: text without space around it, a whole number, or true or false."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise columns.error(row, column, f"got {_shown(value)}; want text or a whole number")


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
