"""A client's rows as tokens or pixels, in batches whose rows are of like length."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from fedpeft.data import Rows, Table
from fedpeft.errors import ConfigError
from fedpeft.training.bases import Base, Pixels

_POOL = 16  # batches that are sorted by length together: more means less padding and less chance


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Encoded as a model takes them, not yet padded.

    tokens: int32 ids, one array a row (none for images); images: uint8 (N, H, W) or (N, H, W, 3); targets:
    (N,), the label of a row, or for "lm" the number of its leading tokens that are prompt; dropped: rows
    left out because truncation would cut all of their reply.
    """

    tokens: tuple[NDArray[np.int32], ...]
    images: NDArray[np.uint8] | None
    targets: Rows
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> Rows:
        """Tokens of each row, shape (N,); 1 for an image."""
        return np.array([len(x) for x in self.tokens] if self.images is None else [1] * len(self), dtype=np.int64)


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


def encode(table: Table, base: Base, length: int) -> Encoded:
    """The rows of a table for a base model of the same task, texts cut to ``length`` tokens."""
    if table.task != base.task:
        raise ValueError(f"the table is for {table.task}; want one for {base.task}, the base model's task")
    if table.task == "image":
        return Encoded((), table.pixels, table.labels)
    if table.task == "lm":
        return _dialogue(table, base.words, length)
    ids = base.words(list(table.texts), truncation=True, max_length=length)["input_ids"] if len(table) else []
    return Encoded(tuple(np.array(x, dtype=np.int32) for x in ids), None, table.labels)


def _dialogue(table: Table, tokenizer: PreTrainedTokenizerBase, length: int) -> Encoded:
    """Prompts and replies as tokens.

    The prompt is tokenised by itself, as it will be when the model is asked to reply. Rows are cut on
    the right, so that a reply keeps its start.
    """
    pairs = [_turns(tokenizer, prompt, reply) for prompt, reply in zip(table.texts, table.replies, strict=True)]
    before, after = (_ids(tokenizer, [pair[i] for pair in pairs]) for i in (0, 1))
    fits = [i for i, x in enumerate(before) if len(x) < length and after[i]]
    tokens = tuple(np.array((before[i] + after[i])[:length], dtype=np.int32) for i in fits)
    starts = np.array([len(before[i]) for i in fits], dtype=np.int64)
    return Encoded(tokens, None, starts, dropped=len(table) - len(fits))


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


def order(lengths: Rows, batch: int, rng: np.random.Generator) -> list[Rows]:
    """One epoch: batches of row numbers, each row once, rows of like length together, in random order.

    Encoded are shuffled, sorted by length within pools of 16 batches, cut, and the batches shuffled.
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


def collate(encoded: Encoded, index: Rows, base: Base, size: int | None, device: torch.device) -> Batch:
    """The named rows as one padded batch on a device; ``size`` is the side of images."""
    if encoded.images is not None:
        return _pictures(encoded, index, base, size, device)
    chosen = [encoded.tokens[i] for i in index]
    longest = max(len(x) for x in chosen)
    ids = np.full((len(chosen), longest), base.words.pad_token_id, dtype=np.int64)
    mask = np.zeros((len(chosen), longest), dtype=np.int64)
    for i, x in enumerate(chosen):
        ids[i, : len(x)] = x
        mask[i, : len(x)] = 1
    inputs: dict[str, Tensor | bool] = {
        "input_ids": torch.from_numpy(ids).to(device),
        "attention_mask": torch.from_numpy(mask).to(device),
    }
    if base.task == "classify":
        return Batch(inputs, torch.from_numpy(encoded.targets[index]).to(device), None)
    place = np.arange(1, longest)
    where = np.zeros((len(chosen), longest), dtype=np.bool_)
    where[:, :-1] = (mask[:, 1:] == 1) & (place >= encoded.targets[index][:, None])
    targets = np.roll(ids, -1, axis=1)[where]
    return Batch(inputs, torch.from_numpy(targets).to(device), torch.from_numpy(where).to(device))


def _pictures(encoded: Encoded, index: Rows, base: Base, size: int | None, device: torch.device) -> Batch:
    assert encoded.images is not None
    assert base.pixels is not None
    side = size or base.pixels.size
    x = torch.from_numpy(encoded.images[index]).to(device)
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    inputs: dict[str, Tensor | bool] = {"pixel_values": normalised(x, side, base.pixels)}
    if side != base.pixels.fixed and base.interpolates:
        inputs["interpolate_pos_encoding"] = True
    return Batch(inputs, torch.from_numpy(encoded.targets[index]).to(device), None)


def normalised(images: Tensor, side: int, pixels: Pixels) -> Tensor:
    """uint8 images (N, 1 or 3, H, W) as the model takes them: fp32, (N, channels, side, side), resized bilinearly."""
    x = images.float() / 255
    if x.shape[-2:] != (side, side):
        x = functional.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
    mean = torch.tensor(pixels.mean, device=x.device).view(-1, 1, 1)
    deviation = torch.tensor(pixels.deviation, device=x.device).view(-1, 1, 1)
    return (x.expand(-1, pixels.channels, -1, -1) - mean) / deviation
