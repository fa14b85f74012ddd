"""Tokenised tables in the cache folder, mapped into memory, so that several processes share one."""

import json
import os
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedpeft.data import Rows, Store, Table
from fedpeft.training.bases import Base
from fedpeft.training.cache import keep
from fedpeft.training.environment import cache_folder
from fedpeft.training.tokens import tokenise

_FORMAT = 1  # of the files, and of how rows become tokens: raise it when either changes
_MAGIC = b"fedpeft tokens\0\0"  # 16 bytes
_HEADER = 64  # magic, digest of the rest, number of rows, number of tokens
_MOST = 1 << 30  # bytes of files that are kept: those that were not in use for longest go
_DAY = 24 * 3600.0


def kept(table: Table, base: Base, length: int, rows: Rows) -> Store:
    """``tokenise`` of these rows, from the cache folder if they are there, else made and put there.

    A file is found by what decides its content: the rows, their texts and labels, the tokenizer with its chat template,
    the length. It is written beside its place and moved there whole, so that processes that race do no harm; one that
    is damaged is made anew. A folder that can't be written is not an error. Images have no tokens, and a
    tokenizer that runs in Python or whose template asks for the date is not cached.
    """
    key = None if table.task == "image" else _key(table, base.words, length, rows)
    if key is None:
        return tokenise(table, base, length, rows)
    file = cache_folder() / "tokens" / key
    found = read(file)
    if found is not None:
        return found
    made = tokenise(table, base, length, rows)
    write(file, made)
    return read(file) or made


def read(file: Path) -> Store | None:
    """The store in a file, mapped read-only; None if there is none, or it is damaged. Cost: one pass over the file."""
    try:
        content = np.asarray(np.memmap(file, np.uint8, mode="r"))
    except (OSError, ValueError):  # numpy's word for an empty file is ValueError
        return None
    with suppress(OSError):  # when it was last in use
        os.utime(file)
    head = content[:_HEADER].tobytes()
    if len(head) < _HEADER or head[:16] != _MAGIC or sha256(content[48:].data).digest() != head[16:48]:
        return None
    rows, tokens = np.frombuffer(head[48:], np.int64).tolist()
    start, parts = _HEADER, []
    for size, count in ((8, rows + 1), (8, rows), (4, tokens), (1, rows)):
        parts.append(content[start : start + size * count])
        start += size * count
    offsets, targets, ids, state = parts
    return Store(ids.view(np.int32), offsets.view(np.int64), None, targets.view(np.int64), state)


def write(file: Path, store: Store) -> None:
    """Put a store of texts into a file, whole or not at all; whether that works makes no difference to the caller."""
    counts = np.array([len(store), len(store.tokens)], np.int64)
    body = [np.ascontiguousarray(x).data for x in (counts, store.offsets, store.targets, store.tokens, store.state)]
    digest = sha256()
    for part in body:
        digest.update(part)
    if keep(file, [_MAGIC, digest.digest(), *body]):
        _tidy(file.parent)


def _key(table: Table, tokenizer: PreTrainedTokenizerBase, length: int, rows: Rows) -> str | None:
    """What decides a store's content, as a file's name; None for a tokenizer whose content can't be told."""
    words = wording_of(tokenizer)
    if not words or "strftime_now" in json.dumps(tokenizer.chat_template):
        return None
    lines = (
        f"format {_FORMAT}, transformers {transformers.__version__}, tokenizers {tokenizers.__version__}",
        f"{length} tokens, {len(table)} rows, of which {sha256(rows.tobytes()).hexdigest()}",
        table.take(rows).fingerprint,
        words,
    )
    return sha256("\n".join(lines).encode()).hexdigest()


def wording_of(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A digest of all that turns a text into ids: vocabulary, rules, marks, chat template; not where it came from.

    Empty where there is none, or where it runs in Python and its content can't be told.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return ""
    rules = tokenizer.backend_tokenizer
    rules.no_truncation()  # what the last call left there; each call sets its own
    rules.no_padding()
    marks = json.dumps({name: str(x) for name, x in tokenizer.special_tokens_map.items()}, sort_keys=True)
    kind = f"{type(tokenizer).__name__} {tokenizer.truncation_side} {tokenizer.split_special_tokens}"
    lines = (kind, marks, json.dumps(tokenizer.chat_template), rules.to_str())
    return sha256("\n".join(lines).encode()).hexdigest()


def _tidy(folder: Path) -> None:
    """Drop the files that were not in use for longest until the rest fits, and what killed processes left behind."""
    with suppress(OSError):  # such as a file that another process dropped first
        found = sorted(((x.stat().st_mtime, x.stat().st_size, x) for x in folder.iterdir()), reverse=True)
        room = _MOST
        for number, (when, size, file) in enumerate(found):
            room -= size
            if (room < 0 and number) or (file.name.startswith(".") and when < time.time() - _DAY):
                file.unlink(missing_ok=True)
