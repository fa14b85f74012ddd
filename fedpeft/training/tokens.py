"""A table's rows as a base model's tokenizer cuts them."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedpeft.data import WHOLE, Encoded, Rows, Store, Table, dialogue, joined
from fedpeft.errors import ConfigError
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
        pairs = [_turns(base.words, prompt, reply) for prompt, reply in zip(chosen.texts, chosen.replies, strict=True)]
        return dialogue(pairs, lambda texts: _ids(base.words, texts), length, rows, len(table))
    ids = base.words(list(chosen.texts), truncation=True, max_length=length)["input_ids"] if len(chosen) else []
    return joined(ids, rows, table.labels, np.zeros(len(rows), np.bool_), len(table))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []


def _turns(tokenizer: PreTrainedTokenizerBase, prompt: str, reply: str) -> tuple[str, str]:
    """What stands before the reply's first token, and the rest: through the chat template where there is one.

    Without one, and for plain text, which has no prompt: prompt and reply a line each, between the
    tokenizer's marks of begin and end.
    """
    if tokenizer.chat_template is None or not prompt:
        line = f"{prompt}\n" if prompt else ""
        return f"{tokenizer.bos_token or ''}{line}", f"{reply}{tokenizer.eos_token or ''}"
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    before = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    if not whole.startswith(before):
        raise ConfigError(
            "model.name: the chat template does not put the reply right after its generation prompt, "
            "so that the reply can't be told from the prompt; choose another model"
        )
    return before, whole[len(before) :]
