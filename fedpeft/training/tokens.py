"""A table's rows as a base model's tokenizer cuts them."""

from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedpeft.data import WHOLE, Encoded, Rendered, Rows, Store, Table, dialogue, joined, turns
from fedpeft.training.bases import Base


def encode(table: Table, base: Base, length: int) -> Encoded:
    """All rows of a table for a base model of the same task, texts cut to ``length`` tokens."""
    return tokenise(table, base, length).view(np.arange(len(table)))


def tokenise(table: Table, base: Base, length: int, rows: Rows | None = None) -> Store:
    """A store of a table for a base model of the same task: of these rows (ascending; all if not given), or of images
    all, without a copy. Texts are cut to ``length`` tokens.

    A row's tokens depend on nothing but its text, so that a store of more rows has the same ones.
    """
    if table.task != base.task:
        raise ValueError(f"the table is for {table.task}; want one for {base.task}, the base model's task")
    if table.task == "image":
        none = np.zeros(0, np.int32)
        whole = np.full(len(table), WHOLE, np.uint8)
        return Store(none, np.zeros(len(table) + 1, np.int64), table.pixels, table.labels, whole)
    rows = np.arange(len(table)) if rows is None else rows
    chosen = table.take(rows)
    if table.task == "lm":
        bos, eos, rendered = base.words.bos_token or "", base.words.eos_token or "", _rendered(base.words)
        both = zip(chosen.texts, chosen.replies, strict=True)
        pairs = [turns(prompt, reply, bos, eos, rendered) for prompt, reply in both]
        return dialogue(pairs, lambda texts: _ids(base.words, texts), length, rows, len(table))
    ids = base.words(list(chosen.texts), truncation=True, max_length=length)["input_ids"] if len(chosen) else []
    return joined(ids, rows, table.labels, np.zeros(len(rows), np.bool_), len(table))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []


def _rendered(tokenizer: PreTrainedTokenizerBase) -> Rendered | None:
    """What the tokenizer's chat template makes of turns; None where it has none."""
    if tokenizer.chat_template is None:
        return None

    def rendered(said: Sequence[Mapping[str, str]], asks: bool) -> str:
        each = [dict(x) for x in said]
        return str(tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=asks))

    return rendered
