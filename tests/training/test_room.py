"""Of what is kept in a folder, what was used last stays, and what is in use."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeft.errors import ConfigError
from fedpeft.training import room
from fedpeft.training.room import LIMIT, bytes_of, hold, make_room


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    """What a test holds is held until it ends."""
    yield
    for handle in room._held.values():
        os.close(handle)
    room._held.clear()


@pytest.fixture
def entries(tmp_path: Path) -> list[Path]:
    """Three things of 300 bytes, the first of which was used last: a file, a folder and a file."""
    made = [tmp_path / x for x in ("new", "middle", "old")]
    made[1].mkdir()
    for x in (made[0], made[1] / "some", made[2]):
        x.write_bytes(bytes(300 if x.parent == tmp_path else 200))
    (made[1] / "more").write_bytes(bytes(100))
    for age, x in enumerate(made):
        os.utime(x, (1000 - age, 1000 - age))
    return made


def there(entries: list[Path]) -> list[str]:
    return [x.name for x in entries if x.exists()]


@pytest.mark.parametrize(
    ("limit", "coming", "stay"),
    [
        ("900", 0, ["new", "middle", "old"]),
        ("899", 0, ["new", "middle"]),
        ("900", 1, ["new", "middle"]),
        ("0.6kB", 0, ["new", "middle"]),
        ("599", 0, ["new"]),
        ("299", 0, []),
        ("900", 5000, []),
    ],
)
def test_what_was_used_longest_ago_goes_first(
    entries: list[Path], monkeypatch: pytest.MonkeyPatch, limit: str, coming: int, stay: list[str]
) -> None:
    monkeypatch.setenv(LIMIT, limit)
    make_room([entries[2], entries[0], entries[1]], coming)
    assert there(entries) == stay
    assert sorted(x.name for x in entries[0].parent.iterdir()) == sorted(stay), "nothing is left of what went"


def test_a_smaller_one_that_still_has_room_stays(entries: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "650")
    entries[0].write_bytes(bytes(400))
    entries[2].write_bytes(bytes(250))
    for age, x in enumerate(entries):
        os.utime(x, (1000 - age, 1000 - age))
    make_room(entries)
    assert there(entries) == ["new", "old"]


def test_what_is_in_use_here_or_in_another_process_stays_and_takes_its_share(
    entries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, "1")
    handle = os.open(entries[2], os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)  # as another process has it
    assert hold(entries[1])
    make_room(entries)
    assert there(entries) == ["middle", "old"]
    os.close(handle)
    monkeypatch.setenv(LIMIT, "500")
    make_room(entries)
    assert there(entries) == ["middle"]


def test_what_is_about_to_be_used_stays(entries: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "1")
    make_room(entries, but=entries[2])
    assert there(entries) == ["old"]


def test_what_is_held_is_what_was_used_last_and_may_be_held_again(
    entries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, "300")
    assert hold(entries[2])
    assert hold(entries[2])
    assert entries[2].stat().st_mtime > 1e9
    assert len(room._held) == 1
    make_room(entries)
    assert there(entries) == ["old"]


def test_what_is_not_there_is_not_held(tmp_path: Path) -> None:
    assert not hold(tmp_path / "none")
    assert bytes_of(tmp_path / "none") == 0
    make_room([tmp_path / "none"])
    assert room._held == {}


def test_what_was_given_up_while_it_was_to_be_held_is_not_held(
    entries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock

    def late(*_: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        entries[1].rename(entries[1].with_name("elsewhere"))
        entries[0].replace(entries[1].with_name("before"))
        entries[0].write_bytes(b"made anew")

    monkeypatch.setattr(fcntl, "flock", late)
    assert not hold(entries[1])
    monkeypatch.setattr(fcntl, "flock", late)
    entries[1].mkdir()
    assert hold(entries[0])
    assert os.fstat(room._held[entries[0]]).st_ino == entries[0].stat().st_ino


def test_what_a_killed_process_left_is_removed(entries: list[Path]) -> None:
    (left := entries[0].with_name(".gone.fedpeft-gone")).mkdir()
    (left / "half").write_bytes(b"x")
    make_room(entries)
    assert there(entries) == ["new", "middle", "old"]
    assert not left.exists()


def test_what_only_looks_like_it_is_left_alone_and_of_a_link_only_the_link_goes(
    entries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (users := entries[0].with_name(".users.gone")).write_bytes(b"x")
    (link := entries[0].with_name("link")).symlink_to(entries[1])
    monkeypatch.setenv(LIMIT, "1")
    make_room([link])
    assert there(entries) == ["new", "middle", "old"]
    assert bytes_of(entries[1]) == 300
    assert users.exists()
    assert sorted(x.name for x in users.parent.iterdir()) == [".users.gone", "middle", "new", "old"]


def test_what_was_made_anew_while_another_process_gave_up_the_old_one_stays(
    entries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock

    def late(handle: int, how: int) -> None:
        entries[2].unlink()
        entries[2].write_bytes(b"made anew")
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    monkeypatch.setenv(LIMIT, "1")
    make_room([entries[2]])
    assert entries[2].read_bytes() == b"made anew"


def test_unless_something_is_said_there_is_room_for_8_gb(entries: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "")
    os.truncate(entries[0], 7_999_999_400)  # which takes no room on the disk
    os.utime(entries[0], (1001, 1001))
    make_room(entries)
    assert there(entries) == ["new", "middle", "old"]
    os.truncate(entries[0], 7_999_999_401)
    os.utime(entries[0], (1001, 1001))
    make_room(entries)
    assert there(entries) == ["new", "middle"]


def test_a_limit_that_is_none_is_refused_by_its_name(entries: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "plenty")
    with pytest.raises(ConfigError, match="FEDPEFT_CACHE_LIMIT: got 'plenty'; want bytes, such as 4e9 or '4GB'"):
        make_room(entries)
    assert there(entries) == ["new", "middle", "old"]
