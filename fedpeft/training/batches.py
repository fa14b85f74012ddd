"""Rows in batches of like length, padded, on a device."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedpeft.data import Rows
from fedpeft.training.bases import Base
from fedpeft.training.pixels import Pixels
from fedpeft.training.tokens import Encoded, Store

_POOL = 16  # batches that are sorted by length together: more means less padding and less chance


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One forward pass: the model's inputs by name, what to predict, and where.

    targets: (units,) labels or target tokens; where: (rows, length), the positions whose next token is a
    target, for "lm", else None.
    """

    inputs: dict[str, Tensor | bool]
    targets: Tensor
    where: Tensor | None

    @property
    def units(self) -> int:
        return len(self.targets)


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


def collate(encoded: Encoded | Store, index: Rows, base: Base, size: int | None, device: torch.device) -> Batch:
    """The named rows as one padded batch on a device; ``size`` is the side of images.

    index: positions among a client's rows, or, of a store, row numbers, which may be of several clients.
    """
    store, rows = (encoded, index) if isinstance(encoded, Store) else (encoded.store, encoded.index[index])
    goals = store.targets[rows]
    if store.images is not None:
        return _pictures(store.images[rows], goals, base, size, device)
    lengths = store.lengths(rows)
    longest = int(lengths.max())
    place = np.arange(longest)
    mask = place < lengths[:, None]
    ids = np.full((len(rows), longest), base.words.pad_token_id, dtype=np.int64)
    ids[mask] = np.concatenate([store.row(i) for i in rows.tolist()])
    inputs: dict[str, Tensor | bool] = {
        "input_ids": torch.from_numpy(ids).to(device),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)).to(device),
    }
    if base.task == "classify":
        return Batch(inputs, torch.from_numpy(goals).to(device), None)
    where = np.zeros((len(rows), longest), dtype=np.bool_)
    where[:, :-1] = mask[:, 1:] & (place[1:] >= goals[:, None])
    targets = np.roll(ids, -1, axis=1)[where]
    return Batch(inputs, torch.from_numpy(targets).to(device), torch.from_numpy(where).to(device))


def _pictures(images: NDArray[np.uint8], labels: Rows, base: Base, size: int | None, device: torch.device) -> Batch:
    assert base.pixels is not None
    side = size or base.pixels.size
    x = torch.from_numpy(images).to(device)
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    inputs: dict[str, Tensor | bool] = {"pixel_values": normalised(x, side, base.pixels)}
    if side != base.pixels.fixed and base.interpolates:
        inputs["interpolate_pos_encoding"] = True
    return Batch(inputs, torch.from_numpy(labels).to(device), None)


def normalised(images: Tensor, side: int, pixels: Pixels) -> Tensor:
    """uint8 images (N, 1 or 3, H, W) as the model takes them: fp32, (N, channels, side, side), resized bilinearly."""
    x = images.float() / 255
    if x.shape[-2:] != (side, side):
        x = functional.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
    mean = torch.tensor(pixels.mean, device=x.device).view(-1, 1, 1)
    deviation = torch.tensor(pixels.deviation, device=x.device).view(-1, 1, 1)
    return (x.expand(-1, pixels.channels, -1, -1) - mean) / deviation
