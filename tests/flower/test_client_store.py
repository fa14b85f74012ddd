"""What a client keeps: the right round is found after a kill, and nothing half-written is read."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedpeft.errors import DataError
from fedpeft.flower import ClientStore
from fedpeft.flower.store import FILE


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path / "state" if request.param == "disk" else None)


def state(number: int) -> dict[str, np.ndarray]:
    return {"personal/b": np.full((2, 3), number, np.float32), "kept/n": np.array([number])}


def number_in(found: object) -> int | None:
    return None if found is None else int(found["kept/n"][0])  # type: ignore[index]


def test_the_newest_state_before_a_round_is_found(store: ClientStore) -> None:
    assert store.load(0, 9) is None
    store.save(0, 2, state(2))
    store.save(0, 5, state(5))
    assert [number_in(store.load(0, before)) for before in (2, 3, 5, 6, 99)] == [None, 2, 2, 5, 5]
    assert [number_in(store.at(0, round)) for round in (2, 3, 5)] == [2, None, 5]


def test_clients_do_not_see_each_others_state(store: ClientStore) -> None:
    store.save(1, 0, state(1))
    store.save(11, 0, state(11))
    assert number_in(store.load(1, 5)) == 1
    assert number_in(store.load(11, 5)) == 11
    assert store.load(2, 5) is None


def test_three_rounds_are_kept_so_that_a_run_resumed_two_rounds_earlier_finds_its_state(store: ClientStore) -> None:
    for round in (0, 1, 4, 7):
        store.save(3, round, state(round))
    assert [number_in(store.at(3, round)) for round in (0, 1, 4, 7)] == [None, 1, 4, 7]
    assert number_in(store.load(3, 7)) == 4  # killed in round 7, and resumed at it
    assert number_in(store.load(3, 4)) == 1  # the same with its newest checkpoint damaged


def test_what_a_killed_run_left_of_later_rounds_is_ignored_and_then_dropped(store: ClientStore) -> None:
    store.save(3, 4, state(4))
    store.save(3, 7, state(7))
    assert number_in(store.load(3, 5)) == 4
    store.save(3, 5, state(55))
    assert number_in(store.at(3, 7)) is None
    assert number_in(store.load(3, 8)) == 55
    store.save(3, 5, state(56))
    assert number_in(store.load(3, 8)) == 56


def test_a_saved_state_does_not_follow_its_arrays(store: ClientStore) -> None:
    mine = state(1)
    store.save(0, 0, mine)
    mine["kept/n"][0] = 99
    assert number_in(store.load(0, 1)) == 1


def test_every_dtype_and_a_transposed_view_come_back(store: ClientStore) -> None:
    sent = {"x": np.arange(6, dtype=np.float16).reshape(2, 3).T, "n": np.array(2.5), "e": np.zeros((0, 4), np.float32)}
    store.save(0, 0, sent)
    found = store.at(0, 0)
    assert found is not None
    for name, x in sent.items():
        np.testing.assert_array_equal(found[name], x)
        assert found[name].dtype == x.dtype
        assert found[name].shape == x.shape


def test_constants_are_held_by_digest(store: ClientStore) -> None:
    digest = "ab" * 32
    assert store.constants(digest) is None
    store.save_constants(digest, {"fixed/p": np.arange(3)})
    found = store.constants(digest)
    assert found is not None
    assert found["fixed/p"].tolist() == [0, 1, 2]
    assert store.digests() == (digest,)


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "AB" * 32, "a" * 63])
def test_what_is_no_digest_never_names_a_file(store: ClientStore, digest: str) -> None:
    assert store.constants(digest) is None
    with pytest.raises(ValueError, match="want 64 hex digits"):
        store.save_constants(digest, {})


def test_another_process_finds_what_was_saved_on_disk(tmp_path: Path) -> None:
    first, second = ClientStore(tmp_path), ClientStore(tmp_path)
    first.save(4, 3, state(3))
    first.save_constants("cd" * 32, {"x": np.ones(2)})
    assert number_in(second.load(4, 4)) == 3
    assert second.constants("cd" * 32) is not None
    assert second.digests() == ("cd" * 32,)


def test_a_damaged_state_is_an_error_that_names_the_file_and_damaged_constants_are_not_held(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(0, 3, state(3))
    store.save(1, 3, state(4))
    store.save_constants("cd" * 32, {"x": np.ones(2)})
    with sqlite3.connect(tmp_path / FILE) as other:  # one bit of what was written
        for table in ("state", "constants"):
            (content,) = other.execute(f"SELECT content FROM {table} ORDER BY 1 LIMIT 1").fetchone()
            turned = content[:-1] + bytes([content[-1] ^ 1])
            other.execute(f"UPDATE {table} SET content = ? WHERE content = ?", (turned, content))
    with pytest.raises(DataError, match=r"state\.sqlite, client [01], round 3: can't be read, it was damaged"):
        [store.load(client, 4) for client in (0, 1)]
    assert ClientStore(tmp_path).constants("cd" * 32) is None


def test_a_file_that_is_no_database_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no" * 1000)
    with pytest.raises(DataError, match=r"state\.sqlite: file is not a database; it is damaged"):
        ClientStore(tmp_path).load(0, 4)


def test_a_database_of_another_version_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("PRAGMA user_version = 7")
    with pytest.raises(DataError, match="has version 7; this version reads 1"):
        ClientStore(tmp_path).save(0, 4, state(1))


def test_a_full_disk_leaves_the_state_that_was_there_and_no_part_of_the_new_one(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(0, 3, state(3))
    connection = store._database.connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    for round in (3, 4):
        with pytest.raises(DataError, match=r"state\.sqlite: database or disk is full; make room"):
            store.save(0, round, {"x": np.zeros(100_000)})
    connection.execute("PRAGMA max_page_count = 100000")
    assert number_in(store.load(0, 9)) == 3
    store.save(0, 4, state(4))
    assert number_in(ClientStore(tmp_path).load(0, 9)) == 4


KILLED = """
import sys
from pathlib import Path
import numpy as np
from fedpeft.flower import ClientStore
from fedpeft.flower.store import FILE
store = ClientStore(Path(sys.argv[1]))
for round in range(1000):
    for client in range(3):
        store.save(client, round, {"x": np.full(20_000, round)})
        print(client, round, flush=True)
"""


def test_a_process_that_is_killed_while_it_writes_leaves_all_that_was_saved_and_nothing_half_written(
    tmp_path: Path,
) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(100)]
    process.kill()  # within a later save, or between two
    said += process.stdout.read().splitlines()
    process.wait()
    process.stdout.close()
    store = ClientStore(tmp_path)
    last = dict(tuple(map(int, x.split())) for x in said if len(x.split()) == 2)
    for client, round in last.items():
        for at in (round - 2, round - 1, round):
            found = store.at(client, at) or (at == round - 2 and store.at(client, round + 1))  # saved, and not yet said
            assert found
            assert (found["x"] == found["x"][0]).all()
    assert sum(1 for client in last for round in range(1000) if store.at(client, round)) == 9


def test_a_fork_does_not_share_its_parents_connection(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(0, 1, state(1))
    child = os.fork()
    if not child:
        try:
            store.save(0, 2, state(2))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert number_in(store.load(0, 9)) == 2


def test_the_file_does_not_grow_from_round_to_round(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    sizes = []
    for round in range(30):
        for client in range(4):
            store.save(client, round, {"x": np.zeros(20_000)})
        sizes.append(store._database.connection.execute("PRAGMA page_count").fetchone()[0])
    assert sizes[-1] == sizes[5]
