"""The modules of a model that own trained tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from typing_extensions import override

ADAPTER = "default"
_A, _B = f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight"
_PROMPTS = "prompt_encoder"


class Once(nn.Module):
    """A module's own forward pass: without its hooks, and without what was put in its place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.inner).forward(self.inner, *args, **kwargs)


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A module that owns trained tensors. tensors: their names inside it, and in the adapter."""

    name: str
    module: nn.Module
    once: Once
    tensors: Mapping[str, str]

    @property
    def pair(self) -> tuple[str, str] | None:
        """The adapter's names of a and b where this is a linear layer with scale · b a and nothing else, else None."""
        module: Any = self.module
        if type(module) is not LoraLinear or set(self.tensors) != {_A, _B}:
            return None
        if module.lora_variant or module.lora_bias.get(ADAPTER) or len(module.lora_A) != 1:
            return None
        return self.tensors[_A], self.tensors[_B]

    @property
    def is_plain(self) -> bool:
        """Whether it is such a layer, or a module of the model's own: a head, a bias, a norm."""
        return self.pair is not None or not (isinstance(self.module, BaseTunerLayer) or self.is_prompt)

    @property
    def is_prompt(self) -> bool:
        """Whether it makes the tokens of a prompt method."""
        return _PROMPTS in self.name.split(".")


def units(model: nn.Module, live: Mapping[str, nn.Parameter]) -> Iterator[Unit]:
    """Each module that owns some of the ``live`` tensors, which several may share: a PEFT layer or a wrapper whole,
    else the very module."""
    wanted = {id(x): name for name, x in live.items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[str, dict[str, str]] = {}
    for path, x in model.named_parameters(remove_duplicate=False):
        if id(x) in wanted:
            owner = _owner(modules, path)
            owners.setdefault(owner, {})[path[len(owner) + 1 :]] = wanted[id(x)]
    for name, tensors in owners.items():
        yield Unit(name, modules[name], Once(modules[name]), tensors)


def _owner(modules: Mapping[str, nn.Module], path: str) -> str:
    """The module to run per client for a parameter: the outermost PEFT layer, wrapper or prompt encoder around it."""
    parts = path.split(".")[:-1]
    for n in range(1, len(parts) + 1):
        name = ".".join(parts[:n])
        if isinstance(modules[name], (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            return name
        if parts[n - 1] == _PROMPTS:
            return ".".join(parts[: n + 1])
    return ".".join(parts)
