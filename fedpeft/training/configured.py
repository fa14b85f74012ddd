"""A base model before it is loaded: its place, configuration, class and files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.utils.hub import cached_file

from fedpeft.data import Task
from fedpeft.errors import ConfigError
from fedpeft.training.devices import Place
from fedpeft.training.kernels import Shape, fastest_attention
from fedpeft.training.packaged import SHORT_NAMES, Progress, folder
from fedpeft.training.settings import Model

AUTO: Mapping[Task, Any] = {
    "classify": AutoModelForSequenceClassification,
    "lm": AutoModelForCausalLM,
    "image": AutoModelForImageClassification,
}
KINDS: Mapping[Task, str] = {
    "classify": "sequence classification",
    "lm": "causal language modelling",
    "image": "image classification",
}


def named(settings: Model, progress: Progress | None) -> str:
    """The folder or hub id that the model is loaded from."""
    return str(folder(settings.name, progress)) if settings.name in SHORT_NAMES else settings.name


def configured(settings: Model, name: str, task: Task | None) -> PreTrainedConfig:
    """A model's configuration; ConfigError, naming model.name, if there is no such model or it can't do the task."""
    if (Path(name).exists() or name.startswith((".", "/", "~"))) and not Path(name, "config.json").is_file():
        raise ConfigError(
            f"model.name: {name!r} is not a model: there is no config.json in it; want a Hugging Face folder"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name: got {settings.name!r}; want {', '.join(SHORT_NAMES)}, a Hugging Face folder, or a hub id "
            f"that is downloaded or can be (`hf download {settings.name}` on a machine with a network): {line(error)}"
        ) from error
    if task is not None and type(config) not in AUTO[task]._model_mapping:
        raise ConfigError(
            f"model.name: {settings.name!r} ({config.model_type}) has no model for {KINDS[task]}, "
            f"which the data asks for; choose another model or other data"
        )
    return config


def attention(place: Place, task: Task, config: PreTrainedConfig) -> str:
    """What was asked for, or the faster kernel of those that the model has, for sizes that are known."""
    if place.attention != "auto":
        return place.attention
    if not getattr(kind_of(config, task), "_supports_sdpa", False):
        return "eager"
    shape = Shape.of(config)
    return fastest_attention(place.device, place.dtype, shape) if shape else "sdpa"


def kind_of(config: PreTrainedConfig, task: Task) -> type:
    """The model's class."""
    found: Any = AUTO[task]._model_mapping[type(config)]
    kind: type = found[0] if isinstance(found, tuple | list) else found
    return kind


def files(name: str, revision: str | None) -> list[Path]:
    """The files that decide what is loaded: configuration and weights."""
    config = cached_file(name, "config.json", revision=revision)
    if config is None:
        raise ConfigError(f"model.name: {name!r} has no config.json")
    here = Path(config).parent
    return sorted(x for x in here.iterdir() if x.suffix in (".json", ".safetensors", ".bin"))


def line(error: Exception) -> str:
    """The start of what an error says, as one line."""
    return " ".join(str(error).split())[:200]
