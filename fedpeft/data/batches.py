"""Rows in batches of like length, padded."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.table import Rows
from fedpeft.data.tokens import Store

_POOL = 16  # batches that are sorted by length together: more means less padding and less chance


@dataclass(frozen=True, slots=True, eq=False)
class Padded:
    """Texts of one forward pass. ids, mask: int64 (rows, length), the mask 1 for a token and 0 for padding, which is at
    the end; targets: (units,) labels, or the tokens that are predicted; where: (rows, length), the positions whose next
    token is one of them, for prompts and replies, else None."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    targets: NDArray[np.int64]
    where: NDArray[np.bool_] | None


def order(lengths: Rows, batch: int, rng: np.random.Generator) -> list[Rows]:
    """One epoch: batches of row numbers, each row once, rows of like length together, in random order.

    Rows are shuffled, sorted by length within pools of 16 batches, cut, and the batches shuffled.
    """
    shuffled = rng.permutation(len(lengths))
    size = batch * _POOL
    batches: list[Rows] = []
    for start in range(0, len(shuffled), size):
        pool = shuffled[start : start + size]
        batches += _cut(pool[np.argsort(lengths[pool], kind="stable")], batch)
    return [batches[i] for i in rng.permutation(len(batches))]


def by_length(lengths: Rows, batch: int) -> list[Rows]:
    """Batches of row numbers, sorted by length: for evaluation, where order does not matter."""
    return _cut(np.argsort(lengths, kind="stable"), batch)


def _cut(rows: Rows, batch: int) -> list[Rows]:
    return [rows[i : i + batch] for i in range(0, len(rows), batch)]


def padded(store: Store, rows: Rows, pad: int, replies: bool) -> Padded:
    """These rows of a store of texts. pad: the token that fills up; replies: whether each is a prompt and a reply."""
    goals, lengths = store.targets[rows], store.lengths(rows)
    longest = int(lengths.max())
    place = np.arange(longest)
    mask = place < lengths[:, None]
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    ids[mask] = np.concatenate([store.row(i) for i in rows.tolist()])
    if not replies:
        return Padded(ids, mask.astype(np.int64), goals, None)
    where = np.zeros((len(rows), longest), dtype=np.bool_)
    where[:, :-1] = mask[:, 1:] & (place[1:] >= goals[:, None])
    return Padded(ids, mask.astype(np.int64), np.roll(ids, -1, axis=1)[where], where)
