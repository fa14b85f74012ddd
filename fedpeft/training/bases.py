"""The frozen base model of a run: loaded by name, with a seeded head and a fingerprint."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from fedpeft.training.devices import Place, choose
from fedpeft.training.fingerprints import fingerprint
from fedpeft.training.formats import packed_fingerprint
from fedpeft.training.head import vocabulary
from fedpeft.training.kernels import Shape, fastest_attention
from fedpeft.training.packaged import SHORT_NAMES, Progress, folder
from fedpeft.training.pixels import Pixels, pixels_of
from fedpeft.training.settings import Model, Quantise, Training

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


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A frozen model and what turns rows into its inputs.

    origin: the folder (or hub id) that plain transformers loads it from; fresh: its parameters that were not
    in the files, that is, a new head's; tokenizer is None for images, pixels for texts; quantise: what its
    matrices are to be held in, as in ``Model``, which they are once ``fidelity.pack_base`` has run;
    parameters: how many numbers it has, packed or not; vocabulary: of a language model whose head may be run by itself
    (``head.vocabulary``), else 0.
    """

    model: PreTrainedModel
    task: Task
    classes: tuple[str, ...]
    origin: str
    fingerprint: str
    fresh: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase | None
    pixels: Pixels | None
    quantise: Quantise = "none"
    parameters: int = 0
    vocabulary: int = 0

    @property
    def words(self) -> PreTrainedTokenizerBase:
        """The tokenizer. ValueError for an image model, which has none."""
        if self.tokenizer is None:
            raise ValueError("an image model has no tokenizer")
        return self.tokenizer

    @property
    def pad(self) -> int:
        """The token that fills up shorter rows. ValueError for an image model."""
        return int(self.words.pad_token_id)

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
    Loading is in fp32, where the fingerprint is taken, so that it does not depend on the device; a base that is to be
    packed stays in fp32, so that what is packed does not either.
    ConfigError, naming model.name, if there is no such model, it can't do the task, or its files lack weights.
    """
    if task != "lm" and len(classes) < 2:
        raise ConfigError(f"data: {_KINDS[task]} needs at least 2 classes; got {len(classes)}: {', '.join(classes)}")
    with _quiet():
        name = _name(settings, progress)
        config = _config(settings, name, task)
        if task != "lm":
            config.num_labels = len(classes)
            config.id2label = dict(enumerate(classes))
            config.label2id = {label: i for i, label in enumerate(classes)}
            config.problem_type = "single_label_classification"
        model, fresh = _weights(settings, name, task, config, place)
        tokenizer = None if task == "image" else _tokenizer(settings, name, model)
    words = vocabulary(model) if task == "lm" else 0
    _draw(model, fresh, seed)
    files = _files(name, settings.revision)
    digest = packed_fingerprint(fingerprint(model, fresh, files), settings.quantise, settings.formats)
    model.requires_grad_(False)
    if not settings.dropout:
        silence(model)
    if (
        settings.quantise == "none" and place.dtype != torch.float32
    ):  # else what is not packed is stored so once the rest is
        store(model, [n for n, _ in model.named_parameters() if n not in fresh], place.dtype)
    nn.Module.to(model, place.device)
    pixels = pixels_of(name, settings.revision, config) if task == "image" else None
    size = sum(x.numel() for x in model.parameters())
    return Base(model, task, tuple(classes), name, digest, fresh, tokenizer, pixels, settings.quantise, size, words)


def place_for(settings: Model, training: Training, progress: Progress | None = None) -> Place:
    """Where and how these settings run on this machine, with as many threads as they say; ConfigError as ``choose``.

    For precision "fastest" it reads the model's configuration, and measures for its sizes.
    """
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    shape = None
    if training.precision == "fastest":
        with _quiet():
            shape = Shape.of(_config(settings, _name(settings, progress), None))
    return choose(training.device, training.precision, training.attention, shape)


def silence(model: nn.Module) -> None:
    """Set every dropout and stochastic-depth rate of a model to zero; its configuration stays as it is."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _name(settings: Model, progress: Progress | None) -> str:
    return str(folder(settings.name, progress)) if settings.name in SHORT_NAMES else settings.name


def _config(settings: Model, name: str, task: Task | None) -> PreTrainedConfig:
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
    if task is not None and type(config) not in _AUTO[task]._model_mapping:
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
                attn_implementation=_attention(place, task, config),
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


def _attention(place: Place, task: Task, config: PreTrainedConfig) -> str:
    """What was asked for, or the faster kernel of those that the model has, for sizes that are known."""
    if place.attention != "auto":
        return place.attention
    kind = _AUTO[task]._model_mapping[type(config)]
    if not getattr(kind[0] if isinstance(kind, tuple | list) else kind, "_supports_sdpa", False):
        return "eager"
    shape = Shape.of(config)
    return fastest_attention(place.device, place.dtype, shape) if shape else "sdpa"


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


def store(model: nn.Module, names: Collection[str], dtype: torch.dtype) -> None:
    """Have the named parameters in this precision, as copies that keep no file mapped."""
    with torch.no_grad():
        for name in names:
            x = model.get_parameter(name)
            x.data = x.data.to(dtype, copy=True)


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
