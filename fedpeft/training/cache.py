"""Files in the cache folder: written whole or not at all, and never an error."""

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from typing_extensions import Buffer


def keep(file: Path, parts: Iterable[Buffer], first_wins: bool = False) -> bool:
    """Whether the parts, one after another, are now the content of a file.

    They are written beside it and moved to it, so that a process that is killed, or two that race, leave nothing half
    written. first_wins: a file that is there stays as it is. A folder that can't be written only means False.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=".")
    except OSError:
        return False
    try:
        with open(handle, "wb") as stream:
            for part in parts:
                stream.write(part)
        if first_wins:
            os.link(scratch, file)
        else:
            os.replace(scratch, file)
    except OSError:
        return False
    finally:
        with suppress(OSError):
            os.unlink(scratch)
    return True
