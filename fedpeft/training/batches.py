"""Batches of rows on a device."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedpeft.data import Encoded, Rows, Store, padded
from fedpeft.training.bases import Base
from fedpeft.training.pixels import Pixels


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


def collate(encoded: Encoded | Store, index: Rows, base: Base, size: int | None, device: torch.device) -> Batch:
    """The named rows as one padded batch on a device; ``size`` is the side of images.

    index: positions among a client's rows, or, of a store, row numbers, which may be of several clients.
    """
    store, rows = (encoded, index) if isinstance(encoded, Store) else (encoded.store, encoded.index[index])
    if store.images is not None:
        return _pictures(store.images[rows], store.targets[rows], base, size, device)
    found = padded(store, rows, base.pad, base.task == "lm")
    inputs: dict[str, Tensor | bool] = {
        "input_ids": torch.from_numpy(found.ids).to(device),
        "attention_mask": torch.from_numpy(found.mask).to(device),
    }
    where = None if found.where is None else torch.from_numpy(found.where).to(device)
    return Batch(inputs, torch.from_numpy(found.targets).to(device), where)


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
