"""A packaged data set from the cache is the data set."""

import os

import numpy as np
import pytest

from fedpeft.data import Source, Table, load
from fedpeft.run import tables
from fedpeft.run.tables import table

LABELLED = Table("classify", ("one", "twö", "\udc80 three"), np.array([1, 0, 1]), ("a", "b"), ("x", "y", "x"))
REPLIES = Table("lm", ("hi", ""), ("yes", "n\no"), (), None)


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A data set of one file; its table, and the number of times that it was read."""

    class Packaged:
        file = tmp_path / "set" / "data.json"
        cache = tmp_path / "cache" / "tables"
        table = LABELLED
        reads = 0

        def load(self, source, ranks=""):
            assert source.examples is None
            self.reads += 1
            return self.table

    found = Packaged()
    found.file.parent.mkdir()
    found.file.write_text("data")
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "load", found.load)
    monkeypatch.setattr(tables, "locate", lambda name: found.file.parent)
    monkeypatch.setattr(tables, "_table", tables._table.__wrapped__)  # as in a new process each time
    return found


def same(x, y):
    assert (x.task, x.inputs, x.classes, x.clients) == (y.task, y.inputs, y.classes, y.clients)
    assert type(x.targets) is type(y.targets)
    assert list(x.targets) == list(y.targets)
    assert x.fingerprint == y.fingerprint


@pytest.mark.parametrize("one", [LABELLED, REPLIES], ids=["labels", "replies"])
def test_a_hit_equals_a_miss(packaged, one):
    packaged.table = one
    for _ in range(3):
        same(table(Source("wiki11", examples=2)), one)
    assert packaged.reads == 1


def test_other_settings_and_changed_files_are_read_anew(packaged):
    table(Source("wiki11"))
    table(Source("wiki11", examples=7))
    assert packaged.reads == 1
    table(Source("wiki11", only=("x",)))
    table(Source("chitchat"))
    assert packaged.reads == 3
    packaged.file.write_text("more data")
    table(Source("wiki11"))
    os.utime(packaged.file, (1, 1))
    table(Source("wiki11"))
    assert packaged.reads == 5


@pytest.mark.parametrize(
    "damage", [lambda x: x[:-1], lambda x: b"", lambda x: x[:50] + b"?" + x[51:], lambda x: x[:20]]
)
def test_a_damaged_file_is_read_anew_and_mended(packaged, damage):
    table(Source("wiki11"))
    (file,) = packaged.cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    same(table(Source("wiki11")), LABELLED)
    assert packaged.reads == 2
    assert file.read_bytes() == whole


def test_a_cache_that_can_not_be_written_is_no_error(packaged, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    for count in (1, 2):
        same(table(Source("wiki11")), LABELLED)
        assert packaged.reads == count


@pytest.mark.parametrize("name", ["fashion-mnist", "debian", "own.csv"])
def test_pictures_what_apt_says_and_the_users_own_are_not_kept(packaged, name):
    for _ in range(2):
        table(Source(name))
    assert packaged.reads == 2
    assert not packaged.cache.exists()


@pytest.mark.slow
def test_the_real_sets_come_back_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "_table", tables._table.__wrapped__)
    for name in ("wiki11", "chitchat"):
        first, second = table(Source(name)), table(Source(name))
        assert first is not second
        same(second, load(Source(name)))
