"""The [model], [adapter] and [training] sections of an experiment file, as values that need no torch."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, TypeAlias, get_args

from fedpeft.rounds import bytes_in
from fedpeft.training.methods import Method

__all__ = ["Kernels", "Method", "Model", "Quantise", "Training"]

Quantise: TypeAlias = Literal["none", "int8", "nf4", "int4"]
"""What the frozen matrices of a base are held in."""

Kernels: TypeAlias = Literal["own", "bitsandbytes"]
"""What expands matrices in nf4 when they are used."""


@dataclass(frozen=True, slots=True)
class Model:
    """Which frozen base model is fine-tuned.

    name: a packaged model (minilm, smollm2, dinov2-small), a tiny random one (tiny-bert, tiny-llama,
    tiny-vit), a Hugging Face folder or a hub id; revision: of a hub id; dropout: whether the base's
    own dropout is on in training. It is off by default: on a frozen base it adds noise to short local
    training and slows it, and adapter methods have a dropout of their own; quantise: what the frozen matrices are held
    in, "int8" (a scale for each row), "nf4" or "int4" (a scale for 64 numbers; embeddings in int8), or "none" for the
    precision that they run in. It saves memory: they are expanded whenever they are used; formats: all that clients of
    one run may hold it in (unset: ``quantise`` alone), where a node's config names its own; kernels: what expands nf4,
    "own" or, faster, "bitsandbytes" where it is installed (fedpeft[bnb]): the base is the same one to the bit, and
    clients of both share a run.
    """

    name: str = "minilm"
    revision: str | None = None
    dropout: bool = False
    quantise: Quantise = "none"
    formats: tuple[str, ...] = ()
    kernels: Kernels = "own"

    def __post_init__(self) -> None:
        if self.quantise not in get_args(Quantise):
            raise ValueError(f"quantise: got {self.quantise}; want none, int8, nf4 or int4")
        if odd := sorted(set(self.formats) - set(get_args(Quantise))):
            raise ValueError(f"formats: got {odd[0]}; want some of none, int8, nf4 and int4")
        if self.formats and self.quantise not in self.formats:
            raise ValueError(f"quantise: got {self.quantise}; want one of formats, {', '.join(self.formats)}")
        if self.kernels not in get_args(Kernels):
            raise ValueError(f"kernels: got {self.kernels}; want own or bitsandbytes")
        if self.kernels != "own" and "nf4" not in (self.quantise, *self.formats):
            raise ValueError(
                f'kernels: got {self.kernels}, which is for nf4; want quantise = "nf4", or kernels = "own"'
            )
        if not self.name.strip():
            raise ValueError("name: got ''; want a model's short name, a folder or a hub id")


@dataclass(frozen=True, slots=True)
class Training:
    """How one client trains in one round; the optimiser starts afresh each time.

    lr: learning rate, constant; batch: rows a forward pass; micro: at most so many of them at a time (unset: all),
    which saves memory, in evaluation too, and changes no result but by rounding; accumulate: batches an optimiser step;
    epochs: passes over the client's rows, or, where it is set, steps: optimiser steps, over as many
    epochs as they take; clip: largest l2 norm of a step's gradient over all trained tensors (unset: no
    clipping); momentum: of sgd; prox: FedProx's μ; length: most tokens of a row; image_size: side in
    pixels that images are resized to (unset: the model's own); checkpointing: recompute activations in
    the backward pass, which saves memory and takes about a third longer; lower: keep what the frozen layers below those
    of ``adapter.layers`` make of each text, in "fp32" or "bf16", so that it is computed once and not each epoch and
    round; lower_room: bytes that this may take in a process, such as "1GB", where what has no room is computed each
    time; device: "auto" (cuda, else mps,
    else cpu) or a torch device; precision: of the base's arithmetic, while adapters and optimiser stay in fp32:
    "auto" is bf16 on a cuda device that has it and fp32 elsewhere, "fastest" bf16 wherever it is measured to be
    clearly faster; attention: the kernel, "auto" the one that is measured to be faster for the model; threads: of
    this process (unset: torch's choice).
    """

    optimiser: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    batch: int = 16
    epochs: int = 1
    steps: int | None = None
    accumulate: int = 1
    micro: int | None = None
    clip: float | None = 1.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    prox: float = 0.0
    length: int = 128
    image_size: int | None = None
    checkpointing: bool = False
    lower: Literal["none", "fp32", "bf16"] = "none"
    lower_room: float | str = "1GB"
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fastest"] = "auto"
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for key, good, want in (
            ("optimiser", self.optimiser in ("adamw", "sgd"), "adamw or sgd"),
            ("lr", isfinite(self.lr) and self.lr > 0, "more than 0"),
            ("batch", self.batch >= 1, "at least 1 row"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("steps", self.steps is None or self.steps >= 1, "at least 1, or leave it out to train by epochs"),
            ("accumulate", self.accumulate >= 1, "at least 1 batch"),
            ("micro", self.micro is None or self.micro >= 1, "at least 1 row, or leave it out"),
            ("clip", self.clip is None or self.clip > 0, "more than 0, or leave it out"),
            ("weight_decay", isfinite(self.weight_decay) and self.weight_decay >= 0, "0 or more"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and less than 1"),
            ("momentum", self.momentum == 0 or self.optimiser == "sgd", "0 with adamw, which has its own"),
            ("prox", isfinite(self.prox) and self.prox >= 0, "0 or more"),
            ("length", self.length >= 2, "at least 2 tokens"),
            ("image_size", self.image_size is None or self.image_size >= 1, "at least 1 pixel, or leave it out"),
            ("lower", self.lower in ("none", "fp32", "bf16"), "none, fp32 or bf16"),
            ("precision", self.precision in ("auto", "fp32", "bf16", "fastest"), "auto, fp32, bf16 or fastest"),
            ("attention", self.attention in ("auto", "eager", "sdpa"), "auto, eager or sdpa"),
            ("threads", self.threads is None or self.threads >= 1, "at least 1, or leave it out"),
        ):
            if not good:
                raise ValueError(f"{key}: got {getattr(self, key)}; want {want}")
        bytes_in(self.lower_room, "lower_room")

    @property
    def rows(self) -> int:
        """The most rows of a forward pass."""
        return self.batch if self.micro is None else min(self.batch, self.micro)

    @property
    def bytes_lower(self) -> int:
        """Bytes that what is kept of the lower layers may take; 0 if nothing is kept."""
        return 0 if self.lower == "none" else round(bytes_in(self.lower_room, "lower_room"))
