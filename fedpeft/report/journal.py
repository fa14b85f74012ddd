"""The lines of metrics.jsonl, read and checked."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import DataError
from fedpeft.report.fields import Fields
from fedpeft.report.records import KINDS, SCHEMA, Record

METRICS = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Line:
    """One line. raw: as it is in the file, with its newline; record: None for a kind that is not known here."""

    raw: bytes
    kind: str
    round: int
    record: Record | None


def journal(path: Path) -> list[Line]:
    """The lines of a file of records; none if there is no such file.

    A last line that is torn (its writer was killed, or the machine lost power) is left out. Raises
    DataError for a line that is damaged elsewhere, and for another schema.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error
    return list(_lines(content, path))


def parse(text: str, where: str) -> Record | None:
    """The record in one line of text; None for a kind that is not known here. Raises DataError if it can't be read."""
    return _record(Fields.of(json.loads(text), where))


def _lines(content: bytes, path: Path) -> Iterator[Line]:
    raws = content.splitlines(keepends=True)
    for number, raw in enumerate(raws, start=1):
        where = f"{path}, line {number}"
        is_last = number == len(raws)
        if is_last and not raw.endswith(b"\n"):
            return
        try:
            value = json.loads(raw.decode())
        except ValueError as error:  # of decoding or of parsing
            if is_last:
                return
            raise DataError(
                f"{where}: not a record, so the file is damaged; restore the file, or remove that line"
            ) from error
        fields = Fields.of(value, where)
        record = _record(fields)
        yield Line(raw, fields.text("kind"), fields.whole("round") or 0, record)


def _record(fields: Fields) -> Record | None:
    if fields.values.get("schema") != SCHEMA:
        got = fields.values.get("schema", "none")
        raise DataError(
            f"{fields.where}: has schema {got}; this version reads schema {SCHEMA}: use the version that wrote it"
        )
    kind = KINDS.get(fields.text("kind"))
    return None if kind is None else kind.read(fields)
