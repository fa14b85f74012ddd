"""Room in the cache folder: of what is kept there, what was used last stays, and what is in use."""

import fcntl
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fedpeft.errors import ConfigError
from fedpeft.rounds import bytes_in

LIMIT = "FEDPEFT_CACHE_LIMIT"
"""The environment's variable that says how much room each kind of large things takes: packed bases, kits that were made
here, kits that were sent."""

USUAL = "8GB"
"""Where it is not set: two packed bases of 7e9 numbers, or fifty kits of SmolLM2."""

_GONE = ".{}.fedpeft-gone"  # which nobody else calls anything: the folder may be a user's

_held: dict[Path, int] = {}
"""What this process uses, by open file, until it ends."""


def hold(entry: Path) -> bool:
    """Whether this file or folder is there, and then the last used one: no process gives it up while this one runs."""
    try:
        handle = os.open(entry, os.O_RDONLY)
    except OSError:
        return False
    with suppress(OSError):  # a file system without locks, where the order of use has to do
        fcntl.flock(handle, fcntl.LOCK_SH)
    path = entry.resolve()
    if not _is_at(handle, entry):  # it was given up between the two
        os.close(handle)
        return hold(entry)
    if (before := _held.pop(path, None)) is not None:
        os.close(before)
    _held[path] = handle
    with suppress(OSError):  # another user's
        os.utime(entry)
    return True


def make_room(entries: Iterable[Path], coming: int = 0, but: Path | None = None) -> None:
    """Give up the files and folders among these that were used longest ago, until the others take the limit at most.

    coming: bytes that are about to be added; but: one that stays in any case. What a process holds stays, and takes
    its share. What can't be removed stays without an error. ConfigError for a limit that is no number of bytes.
    """
    limit, entries = _limit() - coming, list(entries)
    for folder in {x.parent for x in entries}:
        for left in folder.glob(_GONE.format("*")):  # by a process that was killed on the way
            _remove(left)
    for entry in sorted(entries, key=_used, reverse=True):
        size = bytes_of(entry)
        if size <= limit or entry == but or not _gives_up(entry):
            limit -= size


def bytes_of(entry: Path) -> int:
    """Of a file, or of all files in a folder; 0 for what is gone."""
    with suppress(OSError):
        if entry.is_dir():
            return sum(x.stat().st_size for x in entry.iterdir())
        return entry.stat().st_size
    return 0


def _limit() -> int:
    try:
        return round(bytes_in(os.environ.get(LIMIT) or USUAL, LIMIT))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _used(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except OSError:
        return 0.0


def _gives_up(entry: Path) -> bool:
    """Whether it is gone now: not if a process holds it."""
    try:
        handle = os.open(entry, os.O_RDONLY)
    except OSError:
        return not entry.exists()
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(handle, entry):  # another process was faster, and what is there now may be in use
            return not entry.exists()
        gone = entry.with_name(_GONE.format(entry.name))
        os.rename(entry, gone)  # all at once: nobody finds half of it
        _remove(gone)
    except OSError:
        return not entry.exists()
    finally:
        os.close(handle)
    return True


def _is_at(handle: int, entry: Path) -> bool:
    """Whether what was opened is still what is there."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(entry))
    except OSError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():  # of a link only itself goes
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
