"""The clients that a run has met: kept on disk, exact after a kill, and no node twice."""

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft.errors import DataError
from fedpeft.flower import Capabilities, Counts, Ledger, Registry

A, B = "ab" * 32, "cd" * 32
LARGE = (1 << 64) - 5  # Flower's node ids are unsigned numbers of 64 bits


def member(client: int, central: bool = False, holds: tuple[str, ...] = ()) -> Capabilities:
    return Capabilities(client, "base", Counts(8 + client, 2, 1), central, holds)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    found = Registry(tmp_path / "fleet.sqlite")
    found.meet({31: member(1), LARGE: member(0, central=True), 7: member(4, central=True)})
    return found


def test_clients_are_at_the_nodes_that_spoke_for_them(registry: Registry) -> None:
    assert [registry.node(client) for client in range(5)] == [LARGE, 31, None, None, 7]
    assert list(registry.clients()) == [0, 1, 4]
    assert (registry.present(), registry.known(), registry.central()) == (3, 3, 0)
    assert (registry.counts(4), registry.counts(3)) == (Counts(12, 2, 1), None)


def test_only_nodes_that_were_not_asked_yet_are_to_be_asked(registry: Registry) -> None:
    registry.leave_out(9)
    assert registry.arrivals([31, 7, 9, LARGE, LARGE - 1, 2]) == [2, LARGE - 1]
    assert registry.arrivals([31, 7, 9, LARGE]) == []


def test_a_node_that_has_gone_takes_its_client_with_it_and_is_asked_anew_if_it_comes_back(registry: Registry) -> None:
    assert registry.arrivals([31, 7]) == []
    assert (registry.node(0), list(registry.clients()), registry.present()) == (None, [1, 4], 2)
    assert (registry.known(), registry.central()) == (3, 4)
    assert registry.arrivals([31, 7, LARGE]) == [LARGE]
    registry.meet({55: member(0)})
    assert registry.node(0) == 55


def test_a_node_left_out_for_its_claim_is_asked_again_once_the_clients_own_node_has_gone(registry: Registry) -> None:
    registry.leave_out(8, claims=1)
    registry.leave_out(9, claims=4)
    assert registry.arrivals([31, 7, LARGE, 8, 9]) == []
    assert registry.arrivals([7, LARGE, 8, 9]) == [8]


def test_who_took_part_is_counted_exactly_however_often_a_round_is_done_over(registry: Registry) -> None:
    registry.record(0, [0, 1, 4], [0, 1], [4], {0: (100, 10), 1: (100, 11), 4: (100, 0)})
    registry.record(1, [1, 4], [], [1, 4], {1: (50, 0), 4: (50, 0)})
    registry.record(2, [0, 1], [0], [1], {0: (60, 6), 1: (60, 1)})
    assert registry.ledger(1) == Ledger(3, 1, 2, 2, 210, 12)
    registry.record(2, [0, 1], [0, 1], [], {0: (60, 6), 1: (60, 6)})
    assert registry.ledger(1) == Ledger(3, 2, 1, 2, 210, 17)
    assert registry.ledger(0) == Ledger(2, 2, 0, 2, 160, 16)
    assert registry.ledger(4) == Ledger(2, 0, 2, 1, 150, 0)
    assert registry.ledger(99) == Ledger()
    assert [registry.since(round) for round in (0, 1, 2, 3)] == [(0, 1, 4), (0, 1, 4), (0, 1), ()]
    registry.rewind(1)
    assert (registry.ledger(1), registry.since(0)) == (Ledger(1, 1, 0, 0, 100, 11), (0, 1, 4))


def test_an_answer_that_comes_rounds_after_it_was_asked_for_is_counted_once(registry: Registry) -> None:
    registry.record(3, [0, 1], [], [], {0: (9, 0), 1: (9, 0)})
    registry.record(5, [4], [0], [1], {0: (0, 5), 4: (9, 0)})
    assert (registry.ledger(0), registry.ledger(1)) == (Ledger(1, 1, 0, 5, 9, 5), Ledger(1, 0, 1, 5, 9, 0))
    assert registry.since(5) == (4,)  # who was asked then


def test_constants_that_were_sent_are_known_at_once_and_to_the_next_process(registry: Registry) -> None:
    registry.meet({12: member(6, holds=(B, "no digest", B))})
    registry.hold(1, A)
    assert [registry.has(1, A), registry.has(1, B), registry.has(6, B), registry.has(0, A)] == [
        True,
        False,
        True,
        False,
    ]
    assert (registry.digests(1), registry.digests(6)) == ((A,), (B,))
    later = Registry(registry.path)
    assert not later.has(1, A)
    registry.record(0, [1], [1], [], {})
    assert later.has(1, A)
    registry.meet({13: member(6)})  # it came back, and says that it holds nothing
    assert registry.digests(6) == ()


def test_the_rank_that_a_client_said_last_is_kept_until_it_says_another_or_none(registry: Registry) -> None:
    assert registry.rank(1) is None
    registry.meet({31: replace(member(1), rank=4), 7: replace(member(4), rank=8)})
    assert (registry.rank(1), registry.rank(4), Registry(registry.path).rank(4)) == (4, 8, 8)
    registry.meet({31: replace(member(1), rank=2), 7: member(4)})
    assert (registry.rank(1), registry.rank(4), registry.rank(0)) == (2, None, None)


def test_a_file_from_before_there_were_ranks_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "fleet.sqlite"
    Registry(path).meet({5: member(2)})
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE directions")
    connection.close()
    later = Registry(path)
    assert (later.rank(2), later.known()) == (None, 1)
    later.meet({5: replace(member(2), rank=4)})
    assert later.rank(2) == 4


def test_a_process_that_goes_on_knows_the_clients_and_the_base_but_asks_the_nodes_anew(registry: Registry) -> None:
    registry.begin("base")
    registry.begin("another")
    registry.record(0, [0, 1], [0], [1], {})
    later = Registry(registry.path)
    assert (later.base, later.known(), later.present(), later.node(0)) == ("base", 3, 0, None)
    assert later.arrivals([31, 7]) == [7, 31]
    assert later.ledger(0) == Ledger(1, 1, 0, 0, 0, 0)


def test_without_a_file_it_is_this_processs_own() -> None:
    one, two = Registry(), Registry()
    one.meet({3: member(2)})
    assert (one.known(), two.known(), one.node(2), two.base) == (1, 0, 3, "")


def test_counts_beyond_all_bounds_are_kept_as_the_largest_number(registry: Registry) -> None:
    registry.meet({3: Capabilities(2, "base", Counts(1 << 80))})
    assert registry.counts(2) == Counts((1 << 63) - 1, 0, 0)


def test_a_file_that_is_no_registry_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fleet.sqlite"
    path.write_bytes(b"no" * 1000)
    with pytest.raises(DataError, match=r"fleet\.sqlite: file is not a database"):
        Registry(path).known()


def test_a_full_disk_undoes_the_whole_round(registry: Registry) -> None:
    registry.record(0, [0], [0], [], {0: (5, 5)})
    connection = registry._database.connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DataError, match=r"fleet\.sqlite: database or disk is full"):
        registry.record(1, range(100_000), [], [], {})
    assert registry.since(0) == (0,)
    registry.record(1, [1], [], [], {})
    assert registry.since(0) == (0, 1)


KILLED = """
import sys
from pathlib import Path
from fedpeft.flower import Registry
registry = Registry(Path(sys.argv[1]))
for round in range(10_000):
    registry.record(round, range(50), range(25), range(25, 50), {client: (1, 1) for client in range(50)})
    print(round, flush=True)
"""


def test_a_process_that_is_killed_leaves_whole_rounds(tmp_path: Path) -> None:
    path = tmp_path / "fleet.sqlite"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(30)]
    process.kill()
    said += process.stdout.read().splitlines()
    process.wait()
    process.stdout.close()
    last = max(int(x) for x in said if x.strip())
    with sqlite3.connect(path) as other:
        rounds = dict(other.execute("SELECT round, count(*) FROM visit GROUP BY round").fetchall())
    assert set(rounds.values()) == {50}
    assert max(rounds) in (last, last + 1)  # it may have been killed before it said so
    assert sorted(rounds) == list(range(max(rounds) + 1))
