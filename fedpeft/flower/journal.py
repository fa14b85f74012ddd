"""Which secure sessions and rounds a client has taken part in, on disk: what its policy looks at."""

from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

from fedpeft.flower.database import Database
from fedpeft.secagg import History

FILE = "secure.sqlite"
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS session (client INTEGER NOT NULL, session TEXT NOT NULL, "
    "PRIMARY KEY (client, session)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS round (client INTEGER NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL, "
    "is_done INTEGER NOT NULL, PRIMARY KEY (client, run, round)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS answer (client INTEGER NOT NULL, session TEXT NOT NULL, step TEXT NOT NULL, "
    "PRIMARY KEY (client, session, step)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS opened (client INTEGER NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL, "
    "session TEXT NOT NULL, PRIMARY KEY (client, run, round)) WITHOUT ROWID",
)


@dataclass(frozen=True, slots=True, eq=False)
class Seen(Container[str]):
    """The sessions that one client has begun."""

    journal: "Journal"
    client: int

    def __contains__(self, session: object) -> bool:
        return isinstance(session, str) and self.journal.has_begun(self.client, session)


@dataclass(frozen=True, slots=True)
class Journal:
    """Of any number of clients, in a file under ``folder``, or in a temporary one if there is none.

    What is written is on the disk before the call returns, so that a client which is killed does not give a second
    answer where there must be one only.
    """

    folder: Path | None = None
    _database: Database = field(init=False, repr=False)

    def __post_init__(self) -> None:
        path = None if self.folder is None else self.folder / FILE
        object.__setattr__(self, "_database", Database(path, _SCHEMA, 2))

    def history(self, client: int, run: str, round: int) -> History:
        """What this client has done before it is asked for this round; of rounds, what it did in this run."""
        query = (
            "SELECT max(CASE WHEN is_done THEN round END), count(CASE WHEN round <> ? THEN 1 END) FROM round "
            "WHERE client = ? AND run = ?"
        )
        with self._database.checked():
            last, count = self._database.connection.execute(query, (round, client, run)).fetchone()
        return History(Seen(self, client), -1 if last is None else int(last), int(count))

    def has_begun(self, client: int, session: str) -> bool:
        """Whether this client has ever been asked into this session."""
        query = "SELECT count(*) FROM session WHERE client = ? AND session = ?"
        with self._database.checked():
            (count,) = self._database.connection.execute(query, (client, session)).fetchone()
        return bool(count)

    def begin(self, client: int, session: str) -> None:
        """This session is used up for this client, whatever comes of it."""
        with self._database.writing() as connection:
            connection.execute("INSERT OR IGNORE INTO session VALUES (?, ?)", (client, session))

    def answers(self, client: int, session: str, step: str) -> bool:
        """This question of a session is answered; whether it's the first time, whatever process or memory was lost."""
        with self._database.writing() as connection:
            done = connection.execute("INSERT OR IGNORE INTO answer VALUES (?, ?, ?)", (client, session, step))
            return done.rowcount == 1

    def gave(self, client: int, run: str, round: int) -> None:
        """A vector of this round leaves the client, masked."""
        with self._database.writing() as connection:
            connection.execute("INSERT OR IGNORE INTO round VALUES (?, ?, ?, 0)", (client, run, round))

    def complete(self, client: int, run: str, round: int, session: str) -> bool:
        """The client lets a sum with its vector of this round be unmasked; False where it has, in another session."""
        key = (client, run, round)
        with self._database.writing() as connection:
            connection.execute("INSERT OR REPLACE INTO round VALUES (?, ?, ?, 1)", key)
            connection.execute("INSERT OR IGNORE INTO opened VALUES (?, ?, ?, ?)", (*key, session))
            query = "SELECT session FROM opened WHERE client = ? AND run = ? AND round = ?"
            (first,) = connection.execute(query, key).fetchone()
            return bool(first == session)
