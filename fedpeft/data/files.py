"""The user's own files as columns: JSONL, CSV, and folders of Hugging Face datasets."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedpeft.data.columns import Columns
from fedpeft.data.source import Source
from fedpeft.errors import ConfigError, DataError


def read_columns(source: Source, ranks: str = "") -> Columns:
    """The columns of a file or folder, told apart by their names, with that of ``ranks``.

    Raises DataError naming file and line.
    """
    path = Path(source.name)
    if path.is_dir():
        return read_folder(source, path, ranks)
    if path.suffix.lower() == ".jsonl":
        return read_jsonl(path)
    if path.suffix.lower() == ".csv":
        return read_csv(path)
    raise DataError(
        f"{path}: got a file ending in {path.suffix!r} (data.name); want .jsonl (one JSON object a line), "
        ".csv with a header, or a datasets folder"
    )


def read_jsonl(path: Path) -> Columns:
    """The columns of a file with one JSON object a line; blank lines don't count."""
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {number}: got {line.strip()[:60]}; want an object such as {{"text": ...}}')
        rows.append(row)
        places.append(f"line {number}")
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    return Columns(path, names, {name: [row.get(name) for row in rows] for name in names}, places)


def read_csv(path: Path) -> Columns:
    """The columns of a comma-separated file whose first line names them; blank lines don't count."""
    reader = csv.reader(_lines(path), strict=True)
    rows: list[list[str]] = []
    places: list[str] = []
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {number}: is not CSV: {error}") from error
        if row is None:
            break
        if header is None:
            header = [name.strip() for name in row]
            if not all(header) or len(set(header)) < len(header):
                raise DataError(f"{path}, line 1: got the header {row}; want a different name for each column")
        elif row:
            if len(row) != len(header):
                raise DataError(f"{path}, line {number}: got {len(row)} values; want {len(header)}, as the header has")
            rows.append(row)
            places.append(f"line {number}")
    names = tuple(header or ())
    return Columns(path, names, {name: [row[i] for row in rows] for i, name in enumerate(names)}, places)


def read_folder(source: Source, path: Path, ranks: str = "") -> Columns:
    """The columns of a folder saved by ``datasets``' save_to_disk; of its part ``split`` where it has several.

    Only the columns that the source names are read, and that of ``ranks``.
    """
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise DataError(f"{path}: is no datasets folder (data.name); want one made with save_to_disk")
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"data.name: reading the folder {path} needs the datasets package; install fedpeft[datasets]"
        ) from None
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever pyarrow, JSON or the file system has to say of a damaged folder
        raise DataError(f"{path}: can't be read as a datasets folder: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        if source.split not in found:
            raise ConfigError(f"data.split: {path} has no {source.split!r}; it has {', '.join(found)}")
        found = found[source.split]
    named = (source.text, source.label, source.client, source.prompt, source.reply, source.image, ranks)
    classes = {
        name: tuple(feature.names)
        for name, feature in found.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    values = {name: list(found[name]) for name in named if name in found.column_names}
    return Columns(path, tuple(found.column_names), values, [f"row {i}" for i in range(len(found))], classes)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, as they are. Raises DataError for one that isn't UTF-8 or can't be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text: {error}; want it saved as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error
