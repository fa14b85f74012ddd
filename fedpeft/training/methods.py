"""Which PEFT method fine-tunes the model: the [adapter] section of an experiment.

Importing this file imports neither torch nor peft.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import TYPE_CHECKING, Literal, TypeAlias

from fedpeft.errors import ConfigError
from fedpeft.training.refusals import METHODS, TASKS, refused_option

if TYPE_CHECKING:
    from peft import PeftConfig

TaskName: TypeAlias = Literal["classify", "lm", "image"]

VIRTUAL_TOKENS = 8
"""How many tokens a prompt method adds where ``options.num_virtual_tokens`` doesn't say."""

_ALIASES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
}
_TASK_TYPES: Mapping[TaskName, str | None] = {"classify": "SEQ_CLS", "lm": "CAUSAL_LM", "image": None}
_OWN = {
    "r": "adapter.rank",
    "init_r": "adapter.rank",
    "target_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "modules_to_save": "adapter.save",
    "base_model_name_or_path": "model.name",
}
_ALWAYS_OWN = ("target_modules", "modules_to_save", "base_model_name_or_path")
_LAYERS = "layers_to_transform"  # peft's name
_NOT_OPTIONS = ("peft_type", "task_type", "inference_mode", "auto_mapping", "peft_version", "revision")


@dataclass(frozen=True, slots=True)
class Method:
    """A peft method by its name, any case: lora, dora, adalora, ia3, vera, prefix_tuning, ln_tuning, ...

    rank, alpha, dropout: given to the method's own fields of that meaning, and of no use to a method
    that has none (a dropout that it can't use is refused); targets: last parts of the names of the
    modules to adapt, or ("all-linear",), or none for the architecture's usual ones; layers: adapt those in so many of
    the model's top layers only (unset: in all), below which nothing is kept for the backward pass; save: further
    modules to train whole (a new classification head always is); options: the method's own settings
    by peft's names, such as ``use_rslora`` or ``rank_pattern``.

    AdaLoRA keeps its first ranks: its budget isn't moved between layers, since that needs gradients
    of all clients. What can't be federated is in ``fedpeft.training.refusals``, each with its reason.
    Errors are ValueErrors that name the field, and ConfigErrors that name the key where only peft
    can tell.
    """

    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    layers: int | None = None
    dropout: float = 0.0
    save: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict[str, object])

    def __post_init__(self) -> None:
        for key, good, want in (
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", self.alpha > 0 and isfinite(self.alpha), "more than 0"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and less than 1"),
            ("layers", self.layers is None or self.layers >= 1, "at least 1, or leave it out"),
            ("layers", self.layers is None or _LAYERS not in self.options, f"it or options.{_LAYERS}, not both"),
        ):
            if not good:
                raise ValueError(f"{key}: got {getattr(self, key)}; want {want}")
        if self.name in METHODS:
            raise ValueError(f"method: got {self.method!r}, which can't be federated: {METHODS[self.name]}")
        for option, value in self.options.items():
            reason = refused_option(self.name, option, value)
            if reason is not None:
                raise ValueError(f"options.{option}: got {value!r}, which can't be federated: {reason}")

    @property
    def name(self) -> str:
        """peft's name of the method, in lower case."""
        plain = self.method.lower().replace("-", "_")
        return _ALIASES[plain][0] if plain in _ALIASES else plain

    @property
    def is_prompt(self) -> bool:
        """Whether the method adds tokens, or keys and values, and leaves all modules as they are."""
        return self.name in ("cartridge", "p_tuning", "prefix_tuning", "prompt_tuning")

    def config(self, task: TaskName) -> "PeftConfig":
        """peft's configuration, without default targets. Raises ConfigError naming the key that is wrong."""
        kind = _kinds().get(self.name)
        if kind is None:
            names = sorted((set(_kinds()) - set(METHODS)) | set(_ALIASES))
            raise ConfigError(f"adapter.method: got {self.method!r}; want one of {', '.join(names)}")
        tasks, reason = TASKS.get(self.name, (("classify", "lm", "image"), ""))
        if task not in tasks:
            raise ConfigError(
                f"adapter.method: {self.name} can't be used to {_VERBS[task]}: {reason}; use it to "
                f"{' or '.join(_VERBS[x] for x in tasks)}, or use another method"
            )
        known = {f.name for f in fields(kind)}
        shared = self._shared(known)
        settings = {"task_type": _TASK_TYPES[task]} | shared | self._checked_options(known, set(shared))
        make: Callable[..., PeftConfig] = kind
        try:
            return make(**settings)
        except (ValueError, TypeError, KeyError, ImportError) as error:
            raise ConfigError(f"adapter.options: peft refused the settings of {self.name}: {error}") from error

    def _shared(self, known: set[str]) -> dict[str, object]:
        """What this class's own fields set in a configuration that has the fields ``known``."""
        settings: dict[str, object] = {}
        if self.name == "adalora":
            settings |= {"init_r": self.rank, "target_r": self.rank, "total_step": 1}
        elif "r" in known and self.name != "supertuning" and "oft_block_size" not in self.options:
            settings["r"] = self.rank
            if self.name == "oft":
                settings["oft_block_size"] = 0
        for name in ("lora_alpha", "alpha", "psoft_alpha", "randlora_alpha"):
            if name in known and self.name != "supertuning":
                settings[name] = int(self.alpha) if float(self.alpha).is_integer() else self.alpha
        settings |= self._dropouts(known)
        if self.targets:
            if "target_modules" not in known or self.name == "adaption_prompt":
                raise ConfigError(f"adapter.targets: {self.name} adapts no modules by name; leave targets out")
            settings["target_modules"] = "all-linear" if self.targets == ("all-linear",) else list(self.targets)
        elif self.options.get("target_parameters"):
            settings["target_modules"] = []
        if self.save:
            if "modules_to_save" not in known:
                raise ConfigError(f"adapter.save: {self.name} can't train further modules; leave save out")
            settings["modules_to_save"] = list(self.save)
        if "num_virtual_tokens" in known:
            settings["num_virtual_tokens"] = VIRTUAL_TOKENS
        if "progressbar" in known:
            settings["progressbar"] = False
        return settings

    def _dropouts(self, known: set[str]) -> dict[str, object]:
        found = sorted(x for x in known if x.endswith("dropout"))
        preferred = (f"{self.name}_dropout", "lora_dropout", "encoder_dropout", "module_dropout")
        chosen = [x for x in preferred if x in found]
        if self.dropout and not chosen:
            raise ConfigError(f"adapter.dropout: got {self.dropout}; {self.name} has no dropout: leave it out")
        return {x: self.dropout if chosen and x == chosen[0] else 0.0 for x in found}

    def _checked_options(self, known: set[str], taken: set[str]) -> dict[str, object]:
        plain = self.method.lower().replace("-", "_")
        options: dict[str, object] = dict(_ALIASES[plain][1]) if plain in _ALIASES else {}
        for key, value in self.options.items():
            if key in _OWN and (key in taken or key in _ALWAYS_OWN):
                raise ConfigError(f"adapter.options.{key}: this is set by {_OWN[key]}")
            if key in _NOT_OPTIONS or key not in known:
                names = sorted(known - set(_NOT_OPTIONS) - set(_OWN))
                raise ConfigError(f"adapter.options.{key}: {self.name} has no such option; it has {', '.join(names)}")
            options[key] = dict(value) if isinstance(value, Mapping) else value
        return options


_VERBS: Mapping[str, str] = {"classify": "classify text", "lm": "model language", "image": "classify images"}


def _kinds() -> dict[str, "type[PeftConfig]"]:
    """peft's configuration classes, by the methods' names in lower case."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {str(k.value).lower(): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
