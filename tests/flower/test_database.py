"""A file that another process is making at this moment."""

import sqlite3
from functools import partial

import pytest

from fedpeft.errors import DataError
from fedpeft.flower import database
from fedpeft.flower.database import Database

SCHEMA = ("CREATE TABLE IF NOT EXISTS names (name TEXT)",)


def busy(times, monkeypatch, text="database is locked"):
    """As SQLite does where two processes want the journal of a new file: it does not wait, so often."""
    left = [times]

    class Busy(sqlite3.Connection):
        def execute(self, statement, *arguments):
            if "journal_mode" in statement and left[0]:
                left[0] -= 1
                raise sqlite3.OperationalError(text)
            return super().execute(statement, *arguments)

    monkeypatch.setattr(database.sqlite3, "connect", partial(sqlite3.connect, factory=Busy))
    return left


def test_a_file_that_another_process_is_making_is_opened_once_it_is_made(tmp_path, monkeypatch):
    left = busy(3, monkeypatch)
    with Database(tmp_path / "a.sqlite", SCHEMA, 1).writing() as connection:
        connection.execute("INSERT INTO names VALUES ('x')")
    assert left == [0]
    assert Database(tmp_path / "a.sqlite", SCHEMA, 1).connection.execute("SELECT * FROM names").fetchall() == [("x",)]


def test_a_file_that_stays_locked_is_an_error_and_any_other_trouble_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.1)
    left = busy(99, monkeypatch)
    with pytest.raises(DataError, match="database is locked; another process has held it"):
        _ = Database(tmp_path / "a.sqlite", SCHEMA, 1).connection
    assert 80 < left[0] < 98  # tried for a tenth of a second, with pauses
    left = busy(99, monkeypatch, "disk I/O error")
    with pytest.raises(DataError, match="disk I/O error; make room"):
        _ = Database(tmp_path / "a.sqlite", SCHEMA, 1).connection
    assert left == [98]
