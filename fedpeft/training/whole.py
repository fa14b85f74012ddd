"""Files that appear in a folder all at once, when they are complete and checked, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A scratch folder; what is in it moves into ``folder`` when the context ends well, and is gone when it doesn't.

    Files of the same name are replaced, others in ``folder`` stay. Folders are made where they are missing.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        yield Path(scratch)
        folder.mkdir(exist_ok=True)
        for new in Path(scratch).iterdir():
            old = folder / new.name
            if old.is_dir():
                shutil.rmtree(old)
            os.replace(new, old)


def link(old: Path, new: Path) -> None:
    """The same file under another name, or, on another disk, a copy."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)
