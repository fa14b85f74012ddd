"""The frozen base model of a run: loaded by name, with a seeded head and a fingerprint."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from logging import ERROR
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fedpeft.data import Task
from fedpeft.errors import ConfigError
from fedpeft.training.configured import AUTO, KINDS, attention, configured, files, kind_of, line, named
from fedpeft.training.dequantise import need_kernel
from fedpeft.training.devices import Place, choose
from fedpeft.training.fingerprints import fingerprint
from fedpeft.training.formats import packed_fingerprint
from fedpeft.training.head import vocabulary
from fedpeft.training.hollow import hollow
from fedpeft.training.kept_bases import Shelf, Source, in_kit
from fedpeft.training.kernels import Shape
from fedpeft.training.lower import Lower
from fedpeft.training.packaged import Progress
from fedpeft.training.pixels import Pixels, pixels_of
from fedpeft.training.settings import Method, Model, Quantise, Training
from fedpeft.training.values import draw, own_tensors, silence, store


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A frozen model and what turns rows into its inputs.

    origin: the folder (or hub id) that plain transformers loads it from; fresh: its parameters that were not
    in the files, that is, a new head's; tokenizer is None for images, pixels for texts; quantise: what its
    matrices are to be held in, as in ``Model``, which they are once ``fidelity.pack_base`` has run; compiled: whether
    nf4 is to be expanded by bitsandbytes; seed: of what is fresh;
    parameters: how many numbers it has, packed or not; vocabulary: of a language model whose head may be run by itself
    (``head.vocabulary``), else 0; name: as in the settings; plain: the fingerprint in fp32; own: the names of what its
    files hold, by the tensors' identity; source: the packed base that it is filled from once its adapter is on it;
    shelf: where it is kept once it is packed; lower: what is kept of the layers below its adapter,
    if the settings say so.
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
    compiled: bool = False
    seed: int = 0
    parameters: int = 0
    vocabulary: int = 0
    name: str = ""
    plain: str = ""
    own: Mapping[int, str] = field(default_factory=dict[int, str])
    source: Source | None = None
    shelf: Shelf | None = None
    lower: Lower | None = None

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

    def fed(self, inputs: Mapping[str, torch.Tensor | bool]) -> AbstractContextManager[object]:
        """The context of a pass on these inputs, which begins above what is kept of its lower layers."""
        return nullcontext() if self.lower is None else self.lower.feeding(inputs)

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
    settings: Model,
    task: Task,
    classes: Sequence[str],
    seed: int,
    place: Place,
    progress: Progress | None = None,
    method: Method | None = None,
) -> Base:
    """The base model for a task, on its device, frozen, the same bit for bit in every process.

    classes: the labels, in order; none for "lm". seed: of a fresh head, the only part that depends on it.
    Loading is in fp32, where the fingerprint is taken, so that it does not depend on the device; a base that is to be
    packed stays in fp32, so that what is packed does not either. One that is in a kit, or has been packed before under
    this ``method``, is hollow (see ``hollow``) until ``pack_base`` fills it: its fp32 values are never in memory.
    ConfigError, naming model.name, if there is no such model, it can't do the task, or its files lack weights.
    """
    if task != "lm" and len(classes) < 2:
        raise ConfigError(f"data: {KINDS[task]} needs at least 2 classes; got {len(classes)}: {', '.join(classes)}")
    need_kernel(settings, place.device)
    with _quiet():
        name = named(settings, progress)
        config = configured(settings, name, task)
        if task != "lm":
            config.num_labels = len(classes)
            config.id2label = dict(enumerate(classes))
            config.label2id = {label: i for i, label in enumerate(classes)}
            config.problem_type = "single_label_classification"
        source = in_kit(name, settings, method, task)
        shelf = None
        if source is None and settings.quantise != "none" and method is not None:
            kind = kind_of(config, task).__name__
            shelf = Shelf.of(settings, method, task, len(classes), kind, files(name, settings.revision))
            source = shelf.find()
        if source is None:
            model, fresh = _weights(settings, name, task, config, place)
        else:
            fresh = source.fresh
            model = hollow(AUTO[task], config, attention(place, task, config), fresh, source.file, place.device)
        tokenizer = None if task == "image" else _tokenizer(settings, name, model)
    if source is None:
        words = vocabulary(model) if task == "lm" else 0
        plain = fingerprint(model, fresh, files(name, settings.revision))
    else:
        words, plain = source.vocabulary, source.plain
    draw(model, fresh, seed)
    digest = packed_fingerprint(plain, settings.quantise, settings.formats)
    model.requires_grad_(False)
    if not settings.dropout:
        silence(model)
    if settings.quantise == "none" and place.dtype != torch.float32:  # else what is not packed is, once the rest is
        store(model, [n for n, _ in model.named_parameters() if n not in fresh], place.dtype)
    if source is None:
        nn.Module.to(model, place.device)
    pixels = pixels_of(name, settings.revision, config) if task == "image" else None
    return Base(
        model,
        task,
        tuple(classes),
        name,
        digest,
        fresh,
        tokenizer,
        pixels,
        settings.quantise,
        settings.kernels == "bitsandbytes",
        seed,
        parameters=sum(x.numel() for x in model.parameters()),
        vocabulary=words,
        name=settings.name if source is None or source.kit is None else source.kit.facts.model,
        plain=plain,
        own=own_tensors(model, fresh),
        source=source,
        shelf=shelf,
    )


def place_for(settings: Model, training: Training, progress: Progress | None = None) -> Place:
    """Where and how these settings run on this machine, with as many threads as they say; ConfigError as ``choose``.

    For precision "fastest" it reads the model's configuration, and measures for its sizes.
    """
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    shape = None
    if training.precision == "fastest":
        with _quiet():
            shape = Shape.of(configured(settings, named(settings, progress), None))
    return choose(training.device, training.precision, training.attention, shape)


def _weights(
    settings: Model, name: str, task: Task, config: PreTrainedConfig, place: Place
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model in fp32 on the CPU, and the names of the parameters that its files do not hold."""
    try:
        with torch.random.fork_rng(devices=[]):
            model, report = AUTO[task].from_pretrained(
                name,
                revision=settings.revision,
                config=config,
                dtype=torch.float32,
                attn_implementation=attention(place, task, config),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"model.name: {settings.name!r} can't be loaded for {KINDS[task]}: {line(error)}") from error
    fresh = tuple(sorted({*report["missing_keys"], *(x[0] for x in report["mismatched_keys"])}))
    inside = model.base_model_prefix + "."
    lacking = [n for n in fresh if task == "lm" or (n.startswith(inside) and "pooler" not in n)]
    if lacking:
        raise ConfigError(
            f"model.name: the files of {settings.name!r} lack {len(lacking)} tensors of {type(model).__name__}, such "
            f"as {lacking[0]}: it was not made for {KINDS[task]}, or it is damaged; choose another model"
        )
    return model, fresh


def _tokenizer(settings: Model, name: str, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name: {settings.name!r} has no tokenizer that loads: {line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if model.config.pad_token_id is None:  # by which a classifier on a decoder finds the last word
        model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"
    return tokenizer


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
