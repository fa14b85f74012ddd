"""A store from the cache is the one that would be made, and nothing about the cache stops a run."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from fedpeft.data import Table
from fedpeft.training import token_files
from fedpeft.training.bases import load_base
from fedpeft.training.devices import choose
from fedpeft.training.settings import Model
from fedpeft.training.token_files import kept, read, write
from fedpeft.training.tokens import tokenise

CLASSES = ("red", "green", "blue")


@pytest.fixture(scope="module")
def bert():
    return load_base(Model("tiny-bert"), "classify", CLASSES, 0, choose("cpu"))


@pytest.fixture(scope="module")
def llama():
    return load_base(Model("tiny-llama"), "lm", (), 0, choose("cpu"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder; gives the place of the token files."""
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def made(monkeypatch):
    """A list that grows by one with each store that is made and not read."""
    calls = []
    monkeypatch.setattr(token_files, "tokenise", lambda *a: calls.append(a) or tokenise(*a))
    return calls


def same(x, y):
    assert x.images is y.images is None
    for name in ("tokens", "offsets", "targets", "state"):
        one, other = getattr(x, name), getattr(y, name)
        assert (one.dtype, one.tolist()) == (other.dtype, other.tolist()), name


ROWS = np.array([1, 2, 5, 8, 13])


@pytest.mark.parametrize("kind", ["classify", "lm"])
def test_a_hit_equals_a_miss_and_is_mapped_read_only(cache, made, bert, llama, sentences, dialogues, kind):
    table, base = (sentences, bert) if kind == "classify" else (dialogues, llama)
    first = kept(table, base, 16, ROWS)
    second = kept(table, base, 16, ROWS)
    assert len(made) == 1
    assert len(list(cache.iterdir())) == 1
    for found in (first, second):
        same(found, tokenise(table, base, 16, ROWS))
    assert not second.tokens.flags.writeable
    assert isinstance(second.tokens.base, np.memmap | np.ndarray)
    with pytest.raises(ValueError, match="read-only"):
        second.tokens[0] = 1


def test_no_rows_are_kept_and_read(cache, made, bert, sentences):
    none = np.zeros(0, np.int64)
    for _ in range(2):
        found = kept(sentences, bert, 16, none)
        assert (len(found), len(found.tokens), len(found.view(none))) == (30, 0, 0)
    assert len(made) == 1


def other_text(table):
    return replace(table, inputs=("blue moon", *table.texts[1:]))


def other_label(table):
    return replace(table, targets=np.roll(table.labels, 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda table, rows, length: (other_text(table), rows, length),
        lambda table, rows, length: (other_label(table), rows, length),
        lambda table, rows, length: (table, rows, length - 1),
        lambda table, rows, length: (table, rows[:-1], length),
        lambda table, rows, length: (table.take(np.arange(29)), rows, length),
        lambda table, rows, length: (table.take(np.array([2, 1, 0])), rows[::-1].copy(), length),
    ],
    ids=["text", "label", "length", "fewer rows", "smaller table", "other places"],
)
def test_what_changes_a_store_changes_its_key(cache, made, bert, sentences, change):
    rows = np.array([0, 2])
    kept(sentences, bert, 16, rows)
    table, rows, length = change(sentences, rows, 16)
    same(kept(table, bert, length, rows), tokenise(table, bert, length, rows))
    assert len(made) == 2
    assert len(list(cache.iterdir())) == 2


def test_a_text_that_is_not_used_does_not_change_the_key(cache, made, bert, sentences):
    kept(sentences, bert, 16, ROWS)
    kept(other_text(sentences), bert, 16, ROWS)
    assert len(made) == 1


def retokenised(base, **changes):
    """The base with a tokenizer made anew from the same rules, but for these attributes."""
    old = base.words
    names = {"bos_token": old.bos_token, "eos_token": old.eos_token, "pad_token": old.pad_token}
    names |= {k: v for k, v in changes.items() if k.endswith("_token")}
    backend = type(old.backend_tokenizer).from_str(changes.get("rules", old.backend_tokenizer.to_str()))
    new = type(old)(tokenizer_object=backend, **{k: v for k, v in names.items() if v is not None})
    new.chat_template = changes.get("chat_template", old.chat_template)
    return replace(base, tokenizer=new, origin="elsewhere")


def test_the_key_is_of_the_tokenizers_content_and_not_its_path(cache, made, llama, dialogues):
    kept(dialogues, retokenised(llama), 16, ROWS)
    kept(dialogues, retokenised(llama), 16, ROWS)
    assert len(made) == 1
    rules = llama.words.backend_tokenizer
    rules.no_truncation()
    for change in (
        {"chat_template": "so: " + llama.words.chat_template},
        {"eos_token": "<unk>"},
        {"rules": rules.to_str().replace('"y"', '"\\u00ff"')},
    ):
        other = retokenised(llama, **change)
        count = len(made)
        same(kept(dialogues, other, 16, ROWS), tokenise(dialogues, other, 16, ROWS))
        assert len(made) == count + 1, change


def test_the_key_does_not_depend_on_what_the_tokenizer_did_before(cache, made, llama, dialogues):
    kept(dialogues, llama, 16, ROWS)
    llama.words(["abc", "a"], truncation=True, max_length=2, padding=True)
    kept(dialogues, llama, 16, ROWS)
    assert len(made) == 1


def test_a_template_that_asks_for_the_date_is_not_cached(cache, made, llama, dialogues):
    base = retokenised(llama, chat_template="{{ strftime_now('%Y') }}" + llama.words.chat_template)
    for _ in range(2):
        kept(dialogues, base, 40, ROWS)
    assert len(made) == 2
    assert not cache.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:40],
        lambda content: b"",
        lambda content: content + b"\0",
        lambda content: content[:70] + bytes([content[70] ^ 1]) + content[71:],
        lambda content: content[:-9] + bytes([content[-9] ^ 128]) + content[-8:],
        lambda content: content[:56] + bytes([content[56] ^ 1]) + content[57:],
        lambda content: b"other tokens\0\0\0\0" + content[16:],
    ],
    ids=["truncated", "no header", "empty", "longer", "offsets", "tokens", "counts", "another format"],
)
def test_a_damaged_file_is_made_anew(cache, made, bert, sentences, damage):
    kept(sentences, bert, 16, ROWS)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(damage(whole))
    assert read(file) is None
    same(kept(sentences, bert, 16, ROWS), tokenise(sentences, bert, 16, ROWS))
    assert len(made) == 2
    assert file.read_bytes() == whole


@pytest.mark.parametrize("place", ["a file", "a folder that can't be made"])
def test_a_cache_that_can_not_be_written_is_no_error(tmp_path, monkeypatch, made, bert, sentences, place):
    blocked = tmp_path / "cache"
    if place == "a file":
        blocked.mkdir()
        (blocked / "tokens").write_text("in the way")
    else:
        blocked.write_text("in the way")
    monkeypatch.setenv("FEDPEFT_CACHE", str(blocked))
    for count in (1, 2):
        same(kept(sentences, bert, 16, ROWS), tokenise(sentences, bert, 16, ROWS))
        assert len(made) == count


def test_a_disk_that_is_full_is_no_error_and_leaves_nothing_behind(cache, made, bert, sentences, monkeypatch):
    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    same(kept(sentences, bert, 16, ROWS), tokenise(sentences, bert, 16, ROWS))
    assert list(cache.iterdir()) == []


def test_a_cache_that_may_only_be_read_is_read(cache, made, bert, sentences, monkeypatch):
    kept(sentences, bert, 16, ROWS)

    def refused(*names):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(token_files, "keep", refused)
    same(kept(sentences, bert, 16, ROWS), tokenise(sentences, bert, 16, ROWS))
    assert len(made) == 1


RACE = """
import sys, time
from pathlib import Path
import numpy as np
from fedpeft.training.token_files import read, write
from fedpeft.data import Store
file = Path(sys.argv[1])
rng = np.random.default_rng(7)
lengths = rng.integers(0, 9, 50_000)
offsets = np.concatenate([[0], np.cumsum(lengths)])
tokens = rng.integers(0, 30_000, offsets[-1]).astype(np.int32)
store = Store(tokens, offsets, None, lengths, np.ones(len(lengths), np.uint8))
(file.parent / f"ready-{sys.argv[2]}").touch()
while len(list(file.parent.glob("ready-*"))) < 2:
    time.sleep(0.001)
for _ in range(40):
    write(file, store)
    found = read(file)
    assert found is not None and np.array_equal(found.tokens, tokens) and np.array_equal(found.offsets, offsets)
"""


def test_two_processes_that_write_the_same_file_at_once_never_see_half_of_it(tmp_path):
    both = [
        subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path / "x"), str(i)], stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    for process in both:
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0, said
    assert sorted(x.name for x in tmp_path.iterdir()) == ["ready-0", "ready-1", "x"]


def test_a_store_stays_whole_while_its_file_is_replaced_and_removed(cache, bert, sentences):
    found = kept(sentences, bert, 16, ROWS)
    (file,) = cache.iterdir()
    write(file, tokenise(sentences, bert, 4, ROWS))
    file.unlink()
    same(found, tokenise(sentences, bert, 16, ROWS))


def test_files_that_were_not_in_use_for_longest_go_when_there_are_too_many(cache, made, bert, sentences, monkeypatch):
    kept(sentences, bert, 16, ROWS)
    (first,) = cache.iterdir()
    monkeypatch.setattr(token_files, "_MOST", int(2.5 * first.stat().st_size))
    kept(sentences, bert, 15, ROWS)
    second = next(x for x in cache.iterdir() if x != first)
    now = time.time()
    os.utime(first, (now - 50, now - 50))
    os.utime(second, (now - 60, now - 60))
    (cache / ".left").write_bytes(b"x")
    os.utime(cache / ".left", (now - 100_000, now - 100_000))
    kept(sentences, bert, 16, ROWS)  # in use again, so that now it is the newest
    kept(sentences, bert, 14, ROWS)
    left = set(cache.iterdir())
    assert first in left
    assert second not in left
    assert len(left) == 2


def test_the_newest_file_stays_however_large_it_is(cache, made, bert, sentences, monkeypatch):
    monkeypatch.setattr(token_files, "_MOST", 1)
    kept(sentences, bert, 16, ROWS)
    kept(sentences, bert, 16, ROWS)
    assert len(made) == 1


def test_pictures_are_not_cached(cache, pictures):
    base = load_base(Model("tiny-vit"), "image", pictures.classes, 0, choose("cpu"))
    assert np.shares_memory(kept(pictures, base, 8, np.arange(4)).images, pictures.pixels)
    assert not cache.exists()


def test_a_table_of_another_task_is_refused(cache, bert):
    with pytest.raises(ValueError, match="the table is for lm; want one for classify"):
        kept(Table("lm", ("a",), ("b",)), bert, 8, np.arange(1))
