"""Rows as tokens or pixels, made once and shared by all clients, whatever made them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.table import Rows
from fedpeft.errors import ConfigError

Rendered: TypeAlias = Callable[[Sequence[Mapping[str, str]], bool], str]
"""Of turns, each with "role" and "content", and whether the next one is to be asked for, a chat template's text."""

ABSENT, WHOLE, CUT = range(3)
"""What a store has of a row: nothing; its tokens or pixels; or no more than that truncation would cut all its reply."""


@dataclass(frozen=True, slots=True, eq=False)
class Store:
    """The rows of a table as a model takes them, not yet padded. A row's number is its number in the table.

    tokens: int32, the ids of all rows, one after another; offsets: (rows + 1,), row i is
    ``tokens[offsets[i]:offsets[i + 1]]``; images: uint8 (rows, H, W) or (rows, H, W, 3), and then there are no tokens;
    targets: (rows,), the label of a row, or for "lm" the number of its leading tokens that are prompt;
    state: uint8 (rows,), ABSENT, WHOLE or CUT. The arrays may be read-only, and mapped from a file.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    images: NDArray[np.uint8] | None
    targets: Rows
    state: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.state)

    def lengths(self, rows: Rows) -> Rows:
        """Tokens of each of these rows; 1 for an image."""
        if self.images is not None:
            return np.ones(len(rows), np.int64)
        return self.offsets[rows + 1] - self.offsets[rows]

    def row(self, row: int) -> NDArray[np.int32]:
        """One row's ids, without a copy."""
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    def holds(self, rows: Rows) -> bool:
        """Whether all of these rows are here, whole or cut."""
        return bool((self.state[rows] != ABSENT).all())

    def view(self, rows: Rows) -> "Encoded":
        """These rows of the table, in this order, without those that were cut. ValueError for rows that aren't here."""
        if not self.holds(rows):
            raise ValueError(f"got {np.count_nonzero(self.state[rows] == ABSENT)} rows that were not tokenised")
        index = rows[self.state[rows] == WHOLE]
        return Encoded(self, index, len(rows) - len(index))


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One client's rows: numbers of rows in a store that all clients share.

    index: (N,) row numbers of the store, so that a batch over several clients is a concatenation of these; dropped:
    rows left out because truncation would cut all of their reply.
    """

    store: Store
    index: Rows
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> Rows:
        """Tokens of each row, shape (N,); 1 for an image."""
        return self.store.lengths(self.index)

    @property
    def targets(self) -> Rows:
        """Shape (N,): the label of each row, or for "lm" the number of its leading tokens that are prompt."""
        return self.store.targets[self.index]


def joined(ids: Sequence[Sequence[int]], rows: Rows, targets: Rows, cut: NDArray[np.bool_], total: int) -> Store:
    """A store of a table of ``total`` rows that holds these: ids of each, and whether truncation cut all its reply.

    targets: of all rows of the table.
    """
    lengths = np.zeros(total, np.int64)
    lengths[rows] = [len(x) for x in ids]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    tokens = np.fromiter((i for x in ids for i in x), np.int32, int(offsets[-1]))
    state = np.full(total, ABSENT, np.uint8)
    state[rows] = np.where(cut, CUT, WHOLE)
    return Store(tokens, offsets, None, targets, state)


def turns(prompt: str, reply: str, bos: str, eos: str, rendered: Rendered | None) -> tuple[str, str]:
    """What stands before the reply's first token, and the rest: through the chat template where there is one.

    Without one, and for plain text, which has no prompt: prompt and reply a line each, between the tokenizer's marks of
    begin and end. ConfigError for a template that has something between what asks for a reply and the reply.
    """
    if rendered is None or not prompt:
        line = f"{prompt}\n" if prompt else ""
        return f"{bos}{line}", f"{reply}{eos}"
    said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    before, whole = rendered(said[:1], True), rendered(said, False)
    if not whole.startswith(before):
        raise ConfigError(
            "model.name: the chat template does not put the reply right after its generation prompt, "
            "so that the reply can't be told from the prompt; choose another model"
        )
    return before, whole[len(before) :]


def dialogue(
    pairs: Sequence[tuple[str, str]],
    ids: Callable[[Sequence[str]], Sequence[Sequence[int]]],
    length: int,
    rows: Rows,
    total: int,
) -> Store:
    """A store of prompts and replies: what stands before a reply's first token, and the rest, as texts.

    ids: the tokens of texts, without any that stand for begin or end. A prompt is tokenised by itself, as it will be
    when the model is asked to reply. Rows are cut on the right, so that a reply keeps its start.
    """
    before, after = (ids([pair[i] for pair in pairs]) for i in (0, 1))
    cut = np.array([len(x) >= length or not y for x, y in zip(before, after, strict=True)], dtype=np.bool_)
    tokens = [[] if gone else [*x, *y][:length] for x, y, gone in zip(before, after, cut, strict=True)]
    targets = np.zeros(total, np.int64)
    targets[rows] = [len(x) for x in before]
    return joined(tokens, rows, targets, cut, total)
