"""The frozen base model of a run: loaded by name, with a seeded head and a fingerprint."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from logging import ERROR
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from fedpeft.data import Task
from fedpeft.errors import ConfigError
from fedpeft.training.devices import Place
from fedpeft.training.fingerprints import fingerprint
from fedpeft.training.packaged import SHORT_NAMES, Progress, folder
from fedpeft.training.settings import Model

_AUTO: Mapping[Task, Any] = {
    "classify": AutoModelForSequenceClassification,
    "lm": AutoModelForCausalLM,
    "image": AutoModelForImageClassification,
}
_KINDS: Mapping[Task, str] = {
    "classify": "sequence classification",
    "lm": "causal language modelling",
    "image": "image classification",
}


@dataclass(frozen=True, slots=True)
class Pixels:
    """What an image model expects: side in pixels, channels, and each channel's mean and deviation in [0, 1].

    patch: the side of a patch, of which the image's side must be a multiple; fixed: the side that the
    model's position embeddings were trained at.
    """

    size: int
    patch: int
    fixed: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    deviation: tuple[float, ...] = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A frozen model and what turns rows into its inputs.

    origin: the folder (or hub id) that plain transformers loads it from; fresh: its parameters that were not
    in the files, that is, a new head's; tokenizer is None for images, pixels for texts.
    """

    model: PreTrainedModel
    task: Task
    classes: tuple[str, ...]
    origin: str
    fingerprint: str
    fresh: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase | None
    pixels: Pixels | None

    @property
    def words(self) -> PreTrainedTokenizerBase:
        """The tokenizer. ValueError for an image model, which has none."""
        if self.tokenizer is None:
            raise ValueError("an image model has no tokenizer")
        return self.tokenizer

    @property
    def head(self) -> nn.Module | None:
        """A language model's output layer, with what has been put on it; None for other tasks."""
        if self.task != "lm":
            return None
        found: nn.Module | None = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers' own
        return found

    @contextmanager
    def recomputing(self, on: bool) -> Iterator[None]:
        """A context in which, if ``on``, each layer's activations are computed again in the backward pass, not kept."""
        if not on:
            yield
            return
        model: Any = self.model
        caches = getattr(model.config, "use_cache", False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # these names last until transformers 6
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.config.use_cache = False
            try:
                yield
            finally:
                model.config.use_cache = caches
                model.gradient_checkpointing_disable()

    @property
    def interpolates(self) -> bool:
        """Whether the model must be told to interpolate its position embeddings to other image sizes."""
        return "interpolate_pos_encoding" in signature(type(self.model).forward).parameters


def load_base(
    settings: Model, task: Task, classes: Sequence[str], seed: int, place: Place, progress: Progress | None = None
) -> Base:
    """The base model for a task, on its device, frozen, the same bit for bit in every process.

    classes: the labels, in order; none for "lm". seed: of a fresh head, the only part that depends on it.
    Loading is in fp32, where the fingerprint is taken, so that it does not depend on the device.
    ConfigError, naming model.name, if there is no such model, it can't do the task, or its files lack weights.
    """
    if task != "lm" and len(classes) < 2:
        raise ConfigError(f"data: {_KINDS[task]} needs at least 2 classes; got {len(classes)}: {', '.join(classes)}")
    with _quiet():
        name = str(folder(settings.name, progress)) if settings.name in SHORT_NAMES else settings.name
        config = _config(settings, name, task)
        if task != "lm":
            config.num_labels = len(classes)
            config.id2label = dict(enumerate(classes))
            config.label2id = {label: i for i, label in enumerate(classes)}
            config.problem_type = "single_label_classification"
        model, fresh = _weights(settings, name, task, config, place)
        tokenizer = None if task == "image" else _tokenizer(settings, name, model)
    _draw(model, fresh, seed)
    files = _files(name, settings.revision)
    digest = fingerprint(model, fresh, files)
    model.requires_grad_(False)
    if not settings.dropout:
        silence(model)
    _store(model, fresh, place)
    pixels = _pixels(name, settings.revision, config) if task == "image" else None
    return Base(model, task, tuple(classes), name, digest, fresh, tokenizer, pixels)


def silence(model: nn.Module) -> None:
    """Set every dropout and stochastic-depth rate of a model to zero; its configuration stays as it is."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _config(settings: Model, name: str, task: Task) -> PreTrainedConfig:
    if (Path(name).exists() or name.startswith((".", "/", "~"))) and not Path(name, "config.json").is_file():
        raise ConfigError(
            f"model.name: {name!r} is not a model: there is no config.json in it; want a Hugging Face folder"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name: got {settings.name!r}; want {', '.join(SHORT_NAMES)}, a Hugging Face folder, or a hub id "
            f"that is downloaded or can be (`hf download {settings.name}` on a machine with a network): {_line(error)}"
        ) from error
    if type(config) not in _AUTO[task]._model_mapping:
        raise ConfigError(
            f"model.name: {settings.name!r} ({config.model_type}) has no model for {_KINDS[task]}, "
            f"which the data asks for; choose another model or other data"
        )
    return config


def _weights(
    settings: Model, name: str, task: Task, config: PreTrainedConfig, place: Place
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model in fp32 on the CPU, and the names of the parameters that its files do not hold."""
    try:
        with torch.random.fork_rng(devices=[]):
            model, report = _AUTO[task].from_pretrained(
                name,
                revision=settings.revision,
                config=config,
                dtype=torch.float32,
                attn_implementation=place.attention,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"model.name: {settings.name!r} can't be loaded for {_KINDS[task]}: {_line(error)}"
        ) from error
    fresh = tuple(sorted({*report["missing_keys"], *(x[0] for x in report["mismatched_keys"])}))
    inside = model.base_model_prefix + "."
    lacking = [n for n in fresh if task == "lm" or (n.startswith(inside) and "pooler" not in n)]
    if lacking:
        raise ConfigError(
            f"model.name: the files of {settings.name!r} lack {len(lacking)} tensors of {type(model).__name__}, such "
            f"as {lacking[0]}: it was not made for {_KINDS[task]}, or it is damaged; choose another model"
        )
    return model, fresh


def _tokenizer(settings: Model, name: str, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name: {settings.name!r} has no tokenizer that loads: {_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if model.config.pad_token_id is None:  # by which a classifier on a decoder finds the last word
        model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"
    return tokenizer


def _pixels(name: str, revision: str | None, config: PreTrainedConfig) -> Pixels:
    """From the model's preprocessor_config.json where it has one, else from its own image size."""
    own = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    patch = getattr(config, "patch_size", 1)
    plain = Pixels(own, patch if isinstance(patch, int) else patch[0], own, config.num_channels)
    file = cached_file(name, "preprocessor_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return plain
    said = json.loads(Path(file).read_text(encoding="utf-8"))
    size = said.get("crop_size") if said.get("do_center_crop") else said.get("size")
    side = next(iter(size.values())) if isinstance(size, dict) else size or own
    mean = said.get("image_mean", plain.mean)
    deviation = said.get("image_std", plain.deviation)
    return Pixels(side, plain.patch, own, config.num_channels, tuple(mean), tuple(deviation))


def _draw(model: nn.Module, fresh: Sequence[str], seed: int) -> None:
    """Fill what the files lack from the seed: matrices N(0, 0.02²), norms one, the rest zero."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name in fresh:
            x = model.get_parameter(name)
            if x.ndim > 1:
                x.copy_(torch.from_numpy(0.02 * rng.standard_normal(tuple(x.shape))))
            else:
                x.fill_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)


def _store(model: nn.Module, fresh: Sequence[str], place: Place) -> None:
    """Move the model to its device, all but a fresh head in the place's precision."""
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name not in fresh:
                x.data = x.data.to(place.dtype)
    model.to(place.device)


def _files(name: str, revision: str | None) -> list[Path]:
    """The files that decide what is loaded: configuration and weights."""
    config = cached_file(name, "config.json", revision=revision)
    if config is None:
        raise ConfigError(f"model.name: {name!r} has no config.json")
    here = Path(config).parent
    return sorted(x for x in here.iterdir() if x.suffix in (".json", ".safetensors", ".bin"))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers' progress bars and load reports off: what matters of them, a missing tensor, is an error here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own
