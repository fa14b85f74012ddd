"""A SQLite file that outlives being killed at any moment."""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from weakref import finalize

from fedpeft.errors import DataError

_PAGE = 16384  # measured for states of 300 kB: half of the time that SQLite's 4096 takes
_BUSY_SECONDS = 60.0
_PAUSE = 0.02


@dataclass(slots=True, eq=False, weakref_slot=True)
class Database:
    """Tables in the file ``path``, or in a temporary one, gone with this process, if there is none.

    Opened, and made, when first needed. schema: the statements that make the tables, and a version's number with
    them: a file of another version is refused. Whatever ends this process, a transaction is there whole or not at
    all, and one that ``writing`` has ended is on the disk. Processes of one machine may share a file, but not one on a
    network drive. Errors are DataErrors that name the file.
    """

    path: Path | None
    schema: tuple[str, ...]
    version: int
    _connection: sqlite3.Connection | None = field(default=None, init=False, repr=False)
    _process: int = field(default=0, init=False, repr=False)

    @property
    def is_there(self) -> bool:
        """Whether something may have been written: a temporary one, or the file exists."""
        return self.path is None or self.path.exists()

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection of this process: a fork opens one of its own, as SQLite asks for."""
        if self._connection is None or self._process != os.getpid():
            with self.checked():
                self._connection = self._open()
            self._process = os.getpid()
            finalize(self, _close, self._connection, self._process)
        return self._connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, which ends with the block; an error in it undoes all of it."""
        connection = self.connection
        with self.checked():
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk may have ended it already
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Errors of SQLite in the block as DataErrors."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise DataError(f"{self.path or 'temporary database'}: {error}; {_advice(error)}") from error

    def _open(self) -> sqlite3.Connection:
        """Opened again where another process is just making the file: SQLite then says at once that it is locked, for
        neither could wait for the other."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                return self._opened()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(_PAUSE)

    def _opened(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path or "", timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute(f"PRAGMA page_size = {_PAGE}")
            if self.path is not None:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
            (found,) = connection.execute("PRAGMA user_version").fetchone()
            if found == 0:  # new: whoever else is making it waits, and then finds it made
                connection.execute("BEGIN IMMEDIATE")
                for statement in self.schema:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {self.version}")
                connection.execute("COMMIT")
            elif found != self.version:
                raise DataError(
                    f"{self.path}: has version {found}; this version reads {self.version}: use the one that wrote it"
                )
        except BaseException:
            connection.close()
            raise
        return connection


def _close(connection: sqlite3.Connection, process: int) -> None:
    if process == os.getpid():  # a fork leaves its parent's connection alone
        connection.close()


def _advice(error: Exception) -> str:
    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
        return "another process has held it for a minute: end that one"
    if isinstance(error, sqlite3.OperationalError | OSError):
        return "make room, or make it writable; what was there before is as it was"
    return "it is damaged: restore it, or delete it and start anew"
