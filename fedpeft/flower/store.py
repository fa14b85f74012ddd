"""What a client keeps between messages: state by round, and constants by digest."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise

from fedpeft.errors import DataError
from fedpeft.flower.database import Database

State = Mapping[str, NDArray[Any]]
FILE = "state.sqlite"
_KEPT = 3
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS state (client INTEGER NOT NULL, round INTEGER NOT NULL, sum BLOB NOT NULL, "
    "content BLOB NOT NULL, UNIQUE (client, round))",
    "CREATE TABLE IF NOT EXISTS constants (digest TEXT PRIMARY KEY NOT NULL, sum BLOB NOT NULL, content BLOB NOT NULL)",
)
_LATER = """DELETE FROM state WHERE client = :client AND (round > :round OR round NOT IN (
    SELECT round FROM state WHERE client = :client AND round <= :round ORDER BY round DESC LIMIT :kept))"""


@dataclass(frozen=True, slots=True)
class ClientStore:
    """State of any number of clients in a database under ``folder``, or in a temporary one if there is none.

    Of each client the three newest rounds are kept, so that a run that was killed, and goes on from the
    last checkpoint or the one before it, finds the state from before that round. One folder serves one run: two that
    share it would read each other's state. What is read is what was written: each state has a checksum. A
    client's state, and each set of constants, takes less than 1 GB, which is SQLite's limit.
    """

    folder: Path | None = None
    _database: Database = field(init=False, repr=False)
    _constants: dict[str, State] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        path = None if self.folder is None else self.folder / FILE
        object.__setattr__(self, "_database", Database(path, _SCHEMA, 1))

    def load(self, client: int, before_round: int) -> State | None:
        """The newest state that this client saved in a round before this one; None if there is none.

        Raises DataError for one that can't be read.
        """
        where = "client = ? AND round < ? ORDER BY round DESC LIMIT 1"
        return self._read(f"SELECT round, sum, content FROM state WHERE {where}", client, before_round)

    def at(self, client: int, round: int) -> State | None:
        """The state that this client saved in this very round; None if there is none."""
        return self._read("SELECT round, sum, content FROM state WHERE client = ? AND round = ?", client, round)

    def save(self, client: int, round: int, tensors: State) -> None:
        """Keep this state, over any of the same or a later round: those are of a run that was killed.

        Once this returns, it outlives the process and a loss of power. Raises DataError if the disk is full; what was
        saved before is then still there.
        """
        content = _content(tensors)
        with self._database.writing() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO state VALUES (?, ?, ?, ?)", (client, round, _sum(content), content)
            )
            connection.execute(_LATER, {"client": client, "round": round, "kept": _KEPT})

    def constants(self, digest: str) -> State | None:
        """The constants of this digest; None if they are not held, or no longer readable."""
        if not _DIGEST.fullmatch(digest):
            return None
        if digest not in self._constants and self._database.is_there:
            with suppress(DataError), self._database.checked():
                row = self._database.connection.execute(
                    "SELECT sum, content FROM constants WHERE digest = ?", (digest,)
                ).fetchone()
                if row is not None:
                    self._constants[digest] = self._parsed(f"constants {digest[:8]}", *row)
        return self._constants.get(digest)

    def save_constants(self, digest: str, tensors: State) -> None:
        """Keep constants, whose digest the caller has checked."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"digest: got {digest[:70]!r}; want 64 hex digits")
        content = _content(tensors)
        with self._database.writing() as connection:
            connection.execute("INSERT OR REPLACE INTO constants VALUES (?, ?, ?)", (digest, _sum(content), content))
        self._constants[digest] = {n: x.copy() for n, x in tensors.items()}

    def digests(self) -> tuple[str, ...]:
        """The digests of all constants held, in ascending order."""
        if not self._database.is_there:
            return ()
        with self._database.checked():
            return tuple(x for (x,) in self._database.connection.execute("SELECT digest FROM constants ORDER BY 1"))

    def _read(self, query: str, client: int, round: int) -> State | None:
        if not self._database.is_there:
            return None
        with self._database.checked():
            row = self._database.connection.execute(query, (client, round)).fetchone()
        return None if row is None else self._parsed(f"client {client}, round {row[0]}", row[1], row[2])

    def _parsed(self, what: str, checksum: bytes, content: bytes) -> State:
        if _sum(content) != checksum:
            raise DataError(
                f"{self._database.path}, {what}: can't be read, it was damaged; delete the file, and its clients "
                f"start anew"
            )
        return parse(content)


def _content(tensors: State) -> bytes:
    return serialise({n: x.copy(order="C") for n, x in tensors.items()})


def _sum(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()
