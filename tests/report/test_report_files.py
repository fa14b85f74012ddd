"""Writes that are whole or not at all, on real and on failing disks."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft.errors import DataError
from fedpeft.report.files import append, write_all, write_whole


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write_whole(path, b"old")
    write_whole(path, b"new and longer")
    assert path.read_bytes() == b"new and longer"
    assert [x.name for x in tmp_path.iterdir()] == ["x.bin"]


def test_content_reaches_the_disk_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda f: (steps.append("folder" if os.path.isdir(f"/proc/self/fd/{f}") else "file"), fsync(f))[1],
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("name"), replace(a, b))[1])
    write_whole(tmp_path / "x", b"content")
    assert steps == ["file", "name", "folder"]


def test_a_full_disk_leaves_the_old_file_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "round-00003.safetensors"
    write_whole(path, b"old")
    written = []

    def fills_up(file: int, content: memoryview) -> int:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(real(file, content[:5]))
        return 5

    real = os.write
    monkeypatch.setattr(os, "write", fills_up)
    with pytest.raises(DataError, match=r"round-00003\.safetensors: not written, the disk is full; .*intact: free"):
        write_whole(path, b"new content")
    assert path.read_bytes() == b"old"
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, content: real(file, content[:3]))
    write_whole(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_the_device_that_is_always_full_refuses() -> None:
    file = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            write_all(file, b"x")
    finally:
        os.close(file)
    assert caught.value.errno == errno.ENOSPC


def test_an_appended_line_that_does_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    assert append(path, b"first\n", 0) == 6
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, content: real(file, content[:2]) if len(content) > 4 else _full())
    with pytest.raises(DataError, match="disk is full"):
        append(path, b"second\n", 6)
    assert path.read_bytes() == b"first\n"


def _full() -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_real_limit_on_file_sizes_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write_whole(path, b"old")
    script = (
        "import sys; from pathlib import Path; from fedpeft.report.files import write_whole\n"
        "try: write_whole(Path(sys.argv[1]), bytes(100_000))\n"
        "except ValueError as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert "DataError" in done.stdout
    assert "ulimit -f" in done.stdout
    assert path.read_bytes() == b"old"
    assert [x.name for x in tmp_path.iterdir()] == ["x.bin"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone/x: not written \(No such file"):
        write_whole(tmp_path / "gone" / "x", b"")
    with pytest.raises(DataError, match=r"gone/x: not written \(No such file"):
        append(tmp_path / "gone" / "x", b"", 0)


def test_a_file_system_that_cannot_settle_names_is_used_all_the_same_and_another_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = errno.EINVAL
    real = os.fsync

    def picky(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(code, os.strerror(code))
        real(file)

    monkeypatch.setattr(os, "fsync", picky)
    write_whole(tmp_path / "x", b"content")
    assert (tmp_path / "x").read_bytes() == b"content"
    code = errno.EIO
    with pytest.raises(DataError, match="Input/output error"):
        write_whole(tmp_path / "x", b"content")
