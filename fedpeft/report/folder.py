"""The folder of a run: made, opened, appended to, rewound."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from fedpeft.errors import DataError
from fedpeft.report.checkpoint import Checkpoints
from fedpeft.report.files import append, refusal, settle_names, write_whole
from fedpeft.report.journal import METRICS, Line, journal, parse
from fedpeft.report.records import KINDS, SCHEMA, Record
from fedpeft.report.sessions import PRIVACY
from fedpeft.report.strict import Json, plain

LOCK = "config.lock.toml"
FLEET = "fleet.sqlite"
_OURS = (
    METRICS, "report.html", PRIVACY, "checkpoints", "adapter", "merged", "clients", "versions",
    *(FLEET + x for x in ("", "-wal", "-shm")),
    LOCK,  # last: it makes a run
)  # fmt: skip


@dataclass(slots=True)
class RunFolder:
    """The files of one run: ``config.lock.toml``, ``metrics.jsonl``, ``checkpoints/``, and what others put beside them.

    Order that makes ``kill -9`` harmless: append the round's record, then save its checkpoint; to
    resume, load a checkpoint, then ``rewind`` to its round. Reading never changes a file.
    """

    path: Path
    _end: int | None = field(init=False, default=None, repr=False)

    @classmethod
    def create(cls, path: Path, lock_text: str, force: bool = False) -> Self:
        """A new run in a folder that is empty or does not exist yet, with this ``config.lock.toml``.

        force: start over in the folder of an earlier run, whose files are removed. Raises DataError
        for any other folder that holds something, and where nothing can be written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(not x.name.startswith(".") for x in path.iterdir()):
                if not (path / LOCK).is_file():
                    raise DataError(f"{path}: holds files that are not a run's; name a new or an empty folder")
                if not force:
                    raise DataError(f"{path}: holds a run already; resume it, name another folder, or use --force")
                with cls(path).held():
                    _clear(path)
            settle_names(path.parent)
        except OSError as error:
            raise refusal(path, error) from error
        write_whole(path / LOCK, lock_text.encode())
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """The run in this folder. Raises DataError if there is none."""
        if not path.is_dir():
            raise DataError(f"{path}: no such folder; name the folder of a run")
        if not (path / LOCK).is_file():
            raise DataError(f"{path}: not a run, it has no {LOCK}; name the folder of a run")
        return cls(path)

    @property
    def lock_text(self) -> str:
        """All settings of the run, as they were resolved when it started."""
        return (self.path / LOCK).read_text(encoding="utf-8")

    @property
    def metrics(self) -> Path:
        """The file of records, one JSON object a line."""
        return self.path / METRICS

    @property
    def checkpoints(self) -> Checkpoints:
        """The server's states, one file a round, the last two kept."""
        return Checkpoints(self.path / "checkpoints")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Only this process writes to the run meanwhile; DataError if another one does. Ends with the process."""
        try:
            file = os.open(self.path / ".writing", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise refusal(self.path / ".writing", error) from error
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f"{self.path}: another process is writing this run; wait for it, or end it") from error
            yield
        finally:
            os.close(file)

    def append(self, record: Record | Mapping[str, Json]) -> None:
        """Write one record for good: once this returns, it outlives the process and a loss of power.

        A mapping needs a "kind" and must read back as that kind. A line torn by a killed process is
        cut off first. Raises DataError on a full disk, with the records before this one intact.
        """
        values = plain(record if isinstance(record, Mapping) else record.json())
        if not isinstance(values, Mapping):
            raise ValueError("a record is a mapping")
        line = json.dumps({"schema": SCHEMA, **values}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        if parse(line, "the new record") is None:
            raise ValueError(f"kind: got {values.get('kind')!r}; want {', '.join(KINDS)}")
        if self._end is None or self._end != self._size():  # not ours alone since then: look at what is there
            self._end = sum(len(x.raw) for x in journal(self.metrics))
        start, self._end = self._end, None  # after a failed write, look again
        self._end = append(self.metrics, line.encode() + b"\n", start)

    def _size(self) -> int:
        return self.metrics.stat().st_size if self.metrics.is_file() else 0

    def rewind(self, round: int) -> None:
        """Forget what was recorded after this many rounds: later rounds and the end of the run,
        and what its devices said then."""
        kept = [x.raw for x in journal(self.metrics) if not _is_after(x, round)]
        self._end = None
        write_whole(self.metrics, b"".join(kept))

    def write(self, name: str, content: str | bytes) -> Path:
        """Put a file into the folder, whole or not at all; its path."""
        path = self.path / name
        write_whole(path, content.encode() if isinstance(content, str) else content)
        return path


def _is_after(line: Line, round: int) -> bool:
    return line.kind in ("memory", "final") or (line.kind == "round" and line.round > round)


def _clear(path: Path) -> None:
    for name in _OURS:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            with suppress(FileNotFoundError):
                (path / name).unlink()
