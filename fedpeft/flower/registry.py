"""The clients that a run has met, on disk: what each has, at which node it is, and when it took part."""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from fedpeft.errors import ProtocolError
from fedpeft.flower.answers import Capabilities, Counts
from fedpeft.flower.database import Database

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LARGEST = (1 << 63) - 1  # that SQLite holds
_PENDING = 1000
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS client (client INTEGER PRIMARY KEY, train INTEGER NOT NULL, "
    "validation INTEGER NOT NULL, test INTEGER NOT NULL, central INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS held (client INTEGER NOT NULL, digest BLOB NOT NULL, "
    "PRIMARY KEY (client, digest)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS visit (round INTEGER NOT NULL, client INTEGER NOT NULL, asked INTEGER NOT NULL, "
    "answered INTEGER NOT NULL, refused INTEGER NOT NULL, bytes_down INTEGER NOT NULL, bytes_up INTEGER NOT NULL, "
    "PRIMARY KEY (round, client)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS visit_of ON visit (client, round)",
)
# Files from before there were ranks, or identities, get theirs when they are opened.
_SINCE = (
    "CREATE TABLE IF NOT EXISTS directions (client INTEGER PRIMARY KEY, rank INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS identity (client INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE)",
)
_UNSAID = -1
# Whose node is which is known to one process alone: the next one asks the nodes anew.
_HERE = (
    "CREATE TEMP TABLE IF NOT EXISTS node (node INTEGER PRIMARY KEY, client INTEGER UNIQUE, claims INTEGER)",
    "CREATE TEMP TABLE IF NOT EXISTS present (node INTEGER PRIMARY KEY)",
)


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a client has done in a run: in how many rounds it was asked, its answer counted, and it was refused or
    silent; the last round in which anything was (None if never); and the bytes to and from it in training."""

    asked: int = 0
    answered: int = 0
    refused: int = 0
    last_round: int | None = None
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(slots=True, eq=False)
class Registry:
    """In the file ``path``, or in a temporary one if there is none; memory does not grow with the clients in it.

    Counts of a round are written in one transaction. A node's number is any unsigned whole number of 64 bits.
    """

    path: Path | None = None
    _database: Database = field(init=False, repr=False)
    _is_ready: bool = field(default=False, init=False, repr=False)
    _held: set[tuple[int, bytes]] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        self._database = Database(self.path, _SCHEMA, 1)

    @property
    def base(self) -> str:
        """The fingerprint of the base that the run began with; "" before it began."""
        found = list(self._rows("SELECT value FROM fact WHERE name = 'base'"))
        return json.loads(found[0][0]) if found else ""

    def begin(self, base: str) -> None:
        """Keep the run's base; one that is kept stays."""
        self._write("INSERT OR IGNORE INTO fact VALUES ('base', ?)", [(json.dumps(base),)])

    def meet(self, members: Mapping[int, Capabilities]) -> None:
        """Put these clients at these nodes, with what they say of themselves, in place of what was known of them."""
        self._prepare()
        with self._database.writing() as connection:
            connection.executemany("DELETE FROM identity WHERE client = ?", [(x.client,) for x in members.values()])
            for node, x in members.items():
                said = x.counts
                counts = [_UNSAID] * 3 if said is None else [said.train, said.validation, said.test]
                counts = [min(n, _LARGEST) for n in counts]
                connection.execute(
                    "INSERT OR REPLACE INTO client VALUES (?, ?, ?, ?, ?)", (x.client, *counts, x.central)
                )
                connection.execute("DELETE FROM directions WHERE client = ?", (x.client,))
                if x.rank is not None:
                    connection.execute("INSERT INTO directions VALUES (?, ?)", (x.client, x.rank))
                if x.identity:
                    connection.execute("INSERT INTO identity VALUES (?, ?)", (x.client, bytes.fromhex(x.identity)))
                connection.execute("DELETE FROM held WHERE client = ?", (x.client,))
                held = {(x.client, bytes.fromhex(digest)) for digest in x.holds if _DIGEST.fullmatch(digest)}
                connection.executemany("INSERT INTO held VALUES (?, ?)", held)
                self._held = {pair for pair in self._held if pair[0] != x.client}
                connection.execute("INSERT OR REPLACE INTO node VALUES (?, ?, NULL)", (_signed(node), x.client))

    def leave_out(self, node: int, claims: int | None = None) -> None:
        """Do not ask this node again while it stays. claims: the client that it would be, were that one not here."""
        self._write("INSERT OR REPLACE INTO node VALUES (?, NULL, ?)", [(_signed(node), claims)])

    def arrivals(self, nodes: Iterable[int]) -> list[int]:
        """Those of the nodes present that are to be asked who they are, ascending; who isn't present is forgotten.

        A node left out for claiming a client is to be asked again once that client's own node has gone.
        """
        self._prepare()
        with self._database.writing() as connection:
            connection.execute("DELETE FROM present")
            connection.executemany("INSERT OR IGNORE INTO present VALUES (?)", ((_signed(x),) for x in nodes))
            gone = "node NOT IN (SELECT node FROM present)"
            connection.execute(
                f"DELETE FROM node WHERE claims IN (SELECT client FROM node WHERE {gone} AND client IS NOT NULL)"
            )
            connection.execute(f"DELETE FROM node WHERE {gone}")
            found = connection.execute("SELECT node FROM present EXCEPT SELECT node FROM node").fetchall()
            connection.execute("DELETE FROM present")
        return sorted(_unsigned(x) for (x,) in found)

    def node(self, client: int) -> int | None:
        """The node where this client is now; None if it isn't here."""
        found = list(self._rows("SELECT node FROM node WHERE client = ?", client))
        return _unsigned(found[0][0]) if found else None

    def clients(self) -> Iterator[int]:
        """The clients that are here now, ascending."""
        return (client for (client,) in self._rows("SELECT client FROM node WHERE client IS NOT NULL ORDER BY client"))

    def present(self) -> int:
        """How many clients are here now."""
        return self._number("SELECT count(client) FROM node")

    def known(self) -> int:
        """How many clients were met since the run began, here or not."""
        return self._number("SELECT count(*) FROM client")

    def knows(self, client: int) -> bool:
        """Whether a client was met since the run began."""
        return bool(self._number("SELECT count(*) FROM client WHERE client = ?", client))

    def counts(self, client: int) -> Counts | None:
        """How many examples a client said to have; None if it said nothing of it, or was never met."""
        found = list(self._rows("SELECT train, validation, test FROM client WHERE client = ?", client))
        return Counts(*found[0]) if found and found[0][0] != _UNSAID else None

    def identity(self, client: int) -> bytes | None:
        """The id with which a client takes part in secure aggregation; None if it said none."""
        found = list(self._rows("SELECT id FROM identity WHERE client = ?", client))
        return bytes(found[0][0]) if found else None

    def owner(self, identity: str) -> int | None:
        """The client that has this identity (in hex); None if nobody has."""
        found = list(self._rows("SELECT client FROM identity WHERE id = ?", bytes.fromhex(identity)))
        return int(found[0][0]) if found else None

    def identify(self, client: int, identity: bytes) -> None:
        """Keep a client's id. ProtocolError for one that is another's."""
        other = self.owner(identity.hex())
        if other is not None and other != client:
            raise ProtocolError(f"its identity is that of client {other}; want one of its own: `fedpeft keys init`")
        self._write("INSERT OR REPLACE INTO identity VALUES (?, ?)", [(client, identity)])

    def rank(self, client: int) -> int | None:
        """The rank that a client said to have; None if it said none."""
        found = list(self._rows("SELECT rank FROM directions WHERE client = ?", client))
        return int(found[0][0]) if found else None

    def central(self) -> int | None:
        """The lowest client here whose node holds the central test set."""
        where = "client IN (SELECT client FROM client WHERE central)"
        found = list(self._rows(f"SELECT min(client) FROM node WHERE {where}"))
        return None if found[0][0] is None else int(found[0][0])

    def has(self, client: int, digest: str) -> bool:
        """Whether a client holds the constants of this digest."""
        key = bytes.fromhex(digest)
        query = "SELECT count(*) FROM held WHERE client = ? AND digest = ?"
        return (client, key) in self._held or bool(self._number(query, client, key))

    def hold(self, client: int, digest: str) -> None:
        """A client was found to hold these constants. It is on disk with the round's record, or the next thousand."""
        self._held.add((client, bytes.fromhex(digest)))
        if len(self._held) >= _PENDING:
            with self._database.writing() as connection:
                self._settle(connection)

    def digests(self, client: int) -> tuple[str, ...]:
        """The digests of the constants that a client holds, ascending."""
        found = {bytes(x).hex() for (x,) in self._rows("SELECT digest FROM held WHERE client = ?", client)}
        return tuple(sorted(found | {digest.hex() for who, digest in self._held if who == client}))

    def record(
        self,
        round: int,
        asked: Collection[int],
        answered: Collection[int],
        refused: Collection[int],
        traffic: Mapping[int, tuple[int, int]],
    ) -> None:
        """Keep who took part in a round, in place of what is there of it. traffic: bytes down and up by client."""
        kinds = [frozenset(asked), frozenset(answered), frozenset(refused)]
        rows = [
            (round, client, *(client in kind for kind in kinds), *traffic.get(client, (0, 0)))
            for client in sorted(frozenset().union(*kinds))
        ]
        with self._database.writing() as connection:
            connection.execute("DELETE FROM visit WHERE round = ?", (round,))
            connection.executemany("INSERT INTO visit VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            self._settle(connection)

    def rewind(self, round: int) -> None:
        """Forget who took part in this round and later ones."""
        self._write("DELETE FROM visit WHERE round >= ?", [(round,)])

    def since(self, round: int) -> tuple[int, ...]:
        """The clients asked in this round or later, ascending."""
        query = "SELECT DISTINCT client FROM visit WHERE round >= ? AND asked ORDER BY client"
        return tuple(client for (client,) in self._rows(query, round))

    def silent(self) -> frozenset[int]:
        """The clients of which no answer counted in the last round that asked them, or later, as it may be in a
        buffered run."""
        asked, answered = (f"max(CASE WHEN {x} THEN round END)" for x in ("asked", "answered"))
        query = f"SELECT client FROM visit GROUP BY client HAVING {asked} > coalesce({answered}, -1)"
        return frozenset(client for (client,) in self._rows(query))

    def ledger(self, client: int) -> Ledger:
        """What a client has done so far."""
        (row,) = self._rows(
            "SELECT total(asked), total(answered), total(refused), max(round), total(bytes_down), total(bytes_up) "
            "FROM visit WHERE client = ?",
            client,
        )
        asked, answered, refused, last, down, up = row
        return Ledger(int(asked), int(answered), int(refused), last, int(down), int(up))

    def _settle(self, connection: Connection) -> None:
        connection.executemany("INSERT OR IGNORE INTO held VALUES (?, ?)", self._held)
        self._held.clear()

    def _prepare(self) -> None:
        if not self._is_ready:
            with self._database.checked():
                for statement in _SINCE + _HERE:
                    self._database.connection.execute(statement)
            self._is_ready = True

    def _write(self, statement: str, rows: Iterable[tuple[int | str | bytes | None, ...]]) -> None:
        self._prepare()
        with self._database.writing() as connection:
            connection.executemany(statement, rows)

    def _rows(self, query: str, *values: int | str | bytes) -> Iterator[tuple[Any, ...]]:
        self._prepare()
        with self._database.checked():
            yield from self._database.connection.execute(query, values)

    def _number(self, query: str, *values: int | str | bytes) -> int:
        ((value,),) = self._rows(query, *values)
        return int(value)


def _signed(node: int) -> int:
    return node - (1 << 64) if node >= 1 << 63 else node


def _unsigned(node: int) -> int:
    return node + (1 << 64) if node < 0 else node
