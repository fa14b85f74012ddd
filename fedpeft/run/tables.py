"""Packaged data sets in a form that is read five times as fast, in the cache folder."""

import json
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np

from fedpeft.data import Source, Table, load
from fedpeft.data.packaged import locate
from fedpeft.errors import DataError
from fedpeft.training.cache import keep
from fedpeft.training.environment import cache_folder

KEPT = ("chitchat", "fortunes", "wiki11", "wordnet")
"""The sets that are kept: texts whose files alone decide them."""

_FORMAT = 1  # of the files, and of how the sets are read: raise it when either changes


def table(source: Source, ranks: str = "") -> Table:
    """``data.load``, but a packaged set of texts comes from the cache folder, where its first load puts it.

    A set whose files have other times or sizes is read anew, and so is a damaged file of the cache; a cache that can't
    be written is not an error. Errors, and ``ranks``, are those of ``load``.
    """
    if source.name not in KEPT or ranks:
        return load(source, ranks)
    source = replace(source, examples=None)
    try:
        where = locate(source.name)
    except DataError:
        return load(source)  # which says it in its own words
    files = sorted(x for x in ([where] if where.is_file() else where.rglob("*")) if x.is_file())
    return _table(source, tuple((str(x), x.stat().st_mtime_ns, x.stat().st_size) for x in files))


@lru_cache(maxsize=8)
def _table(source: Source, stamp: tuple[tuple[str, int, int], ...]) -> Table:
    name = sha256(repr((_FORMAT, source, stamp)).encode("utf8", "surrogatepass")).hexdigest()
    file = cache_folder() / "tables" / name
    found = _read(file)
    if found is None:
        found = load(source)
        targets = found.targets.tolist() if isinstance(found.targets, np.ndarray) else list(found.targets)
        parts = [found.task, list(found.texts), targets, found.classes, found.clients]
        content = json.dumps(parts, separators=(",", ":")).encode("ascii")
        keep(file, [sha256(content).digest(), content])
    return found


def _read(file: Path) -> Table | None:
    try:
        content = file.read_bytes()
    except OSError:
        return None
    if sha256(content[32:]).digest() != content[:32]:
        return None
    task, texts, targets, classes, clients = json.loads(content[32:])
    answers = tuple(targets) if task == "lm" else np.array(targets, np.int64)
    return Table(task, tuple(texts), answers, tuple(classes), None if clients is None else tuple(clients))
