"""What a client keeps: the right round is found after a kill, and nothing half-written is read."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from fedpeft.errors import DataError
from fedpeft.flower import ClientStore


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
    file = tmp_path / "client-000000" / "round-000003.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"round-000003\.safetensors: can't be read"):
        store.load(0, 4)
    store.save_constants("cd" * 32, {"x": np.ones(2)})
    (tmp_path / "constants" / f"{'cd' * 32}.safetensors").write_bytes(b"no")
    assert ClientStore(tmp_path).constants("cd" * 32) is None


def test_a_full_disk_leaves_the_state_that_was_there_and_no_part_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ClientStore(tmp_path)
    store.save(0, 3, state(3))

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for round in (3, 4):
        with pytest.raises(OSError, match="No space left"):
            store.save(0, round, state(40))
    monkeypatch.undo()
    assert number_in(store.load(0, 9)) == 3
    assert [p.name for p in (tmp_path / "client-000000").iterdir()] == ["round-000003.safetensors"]


def test_a_leftover_of_a_killed_write_is_no_state(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(0, 3, state(3))
    (tmp_path / "client-000000" / "round-000004.safetensors.77.tmp").write_bytes(b"half")
    assert number_in(store.load(0, 9)) == 3
