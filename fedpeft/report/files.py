"""Durable writing: files that are put in place whole, and lines that are appended for good."""

import contextlib
import errno
import os
from pathlib import Path

from fedpeft.errors import DataError

_FULL = {errno.ENOSPC, errno.EDQUOT}


def write_whole(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` so that a reader, or a machine that loses power, sees the old file or the new one.

    The content goes to a hidden file beside it, reaches the disk, and takes the name. On failure
    the old file is as it was, nothing is left behind, and DataError says which file and why.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(file, content)
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(draft, path)
        settle_names(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise refusal(path, error) from error


def append(path: Path, content: bytes, start: int) -> int:
    """Write ``content`` at offset ``start``, where the file is cut first; the file's new size.

    On failure the file is cut at ``start`` again (as far as the disk allows), and DataError says why.
    """
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.ftruncate(file, start)
            os.lseek(file, start, os.SEEK_SET)
            try:
                write_all(file, content)
                os.fsync(file)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file, start)
                raise
        finally:
            os.close(file)
        if start == 0:
            settle_names(path.parent)
    except OSError as error:
        raise refusal(path, error) from error
    return start + len(content)


def write_all(file: int, content: bytes) -> None:
    """All of ``content`` into an open file: a disk that fills up takes a part of it before it says so."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]


def settle_names(folder: Path) -> None:
    """Make the names in a folder (new, replaced, removed) outlive a loss of power."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems can't, and need not
            raise
    finally:
        os.close(file)


def refusal(path: Path, error: OSError) -> DataError:
    """What to tell the user of a write that failed."""
    kept = "what was saved before, the last checkpoint among it, is intact"
    if error.errno in _FULL:
        return DataError(f"{path}: not written, the disk is full; {kept}: free some space, then resume the run")
    if error.errno == errno.EFBIG:
        return DataError(
            f"{path}: not written, it is larger than this process may write; {kept}: "
            f"raise the limit on file sizes (ulimit -f), then resume the run"
        )
    return DataError(f"{path}: not written ({error.strerror}); {kept}: make the folder writable, then resume the run")
