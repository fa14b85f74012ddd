"""Models without their matrices: built from a configuration, and filled from a packed file that stays mapped.

A hollow model is as ``from_pretrained`` makes it, buffers and ties too, but each matrix that a packed file has is a
single zero seen at every place, of the right shape and type, until ``fill`` puts the packed one there. So an adapter is
attached as to any model, and a base's fp32 matrices are never in memory.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import override

from fedpeft.errors import ConfigError, DataError
from fedpeft.training.packed_file import PackedFile
from fedpeft.training.quantised import FrozenEmbedding, FrozenLinear, Kind, matrices, replace


class _Weightless(TorchFunctionMode):
    """A context in which ``torch.empty``, of which layers make their weights, gives tensors without memory."""

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def hollow(
    auto: Any,
    config: PreTrainedConfig,
    attention: str,
    fresh: tuple[str, ...],
    file: PackedFile,
    device: torch.device,
) -> PreTrainedModel:
    """The model that ``auto`` makes of a configuration, in fp32, with the file's unpacked tensors.

    fresh: names of parameters that no file holds, which are zeros. Matrices that the file has unpacked are mapped from
    it too; all else is copied, so that it may be trained. DataError if the file is not this model's.
    """
    with torch.random.fork_rng(devices=[]), _Weightless():
        model: PreTrainedModel = auto.from_config(config, attn_implementation=attention, dtype=torch.float32)
    nn.Module.eval(model)
    move: Any = model._apply
    move(lambda x: x if x.is_meta else x.to(device))
    large = {id(x.weight) for x in matrices(model)}
    packed = {x.name for x in file.held}
    whole = file.whole
    made: dict[int, nn.Parameter] = {}
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name in fresh:
                value = torch.zeros(x.shape, device=device)
            elif name in packed:
                value = torch.zeros((), device=device).expand(x.shape)
            elif name in whole and whole[name].shape == tuple(x.shape):
                value = mapped(whole[name], device, copy=id(x) not in large)
            else:
                raise _other(file, name)
            made[id(x)] = nn.Parameter(value, requires_grad=False)
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = made[id(parameter)]
        _buffers(model, whole, file, device)
    if missing := packed - dict(model.named_parameters()).keys():
        raise _other(file, min(missing))
    return model


def fill(model: nn.Module, names: Mapping[int, str], file: PackedFile, dtype: torch.dtype) -> None:
    """Put a file's packed matrices where a model, with an adapter on it, has hollow ones: mapped, not copied, on a CPU.

    names: of the base's own parameters, by their identity; dtype: of what embeddings give. ConfigError for an adapter
    that trains one of these matrices whole, which takes its values in fp32; DataError for a file of other shapes.
    """
    held = {x.name: x for x in file.held}
    if trained := trains_matrices(model, names):
        raise ConfigError(
            f"adapter.save: {trained} is trained whole, which takes its weights in fp32; {file.path} has them "
            f"packed: leave it out, or load the model itself"
        )
    made: dict[str, tuple[Kind, Tensor, Tensor]] = {}

    def packed(module: nn.Module, weight: Tensor) -> tuple[Kind, Tensor, Tensor] | None:
        x = held.get(names.get(id(weight), ""))
        if x is None or weight.requires_grad:
            return None
        if x.name not in made:
            found = file.matrix(x)
            shape = (len(found.codes), x.columns)
            if tuple(weight.shape) != (shape[::-1] if x.transposed else shape):
                raise _other(file, x.name)
            made[x.name] = (
                Kind(x.format, x.columns),
                mapped(found.codes, weight.device),
                mapped(found.scales, weight.device),
            )
        return made[x.name]

    replace(model, packed, names, dtype)


def trains_matrices(model: nn.Module, names: Mapping[int, str]) -> str:
    """The name of a module whose copy is trained whole and has matrices of the base's own; empty if there is none."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            inside: nn.Module = module.original_module
            own = {id(x) for x in inside.parameters()} & names.keys()
            if any(isinstance(x, FrozenLinear | FrozenEmbedding) or id(x.weight) in own for x in _all(inside)):
                return str(name)
    return ""


def share_file(model: nn.Module, file: PackedFile) -> None:
    """Have a packed model's codes and scales mapped from a file that holds the same, instead of in memory."""
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for x in file.held:
        found, cpu = file.matrix(x), torch.device("cpu")
        made[x.name] = mapped(found.codes, cpu), mapped(found.scales, cpu)
    for module in model.modules():
        if isinstance(module, FrozenLinear | FrozenEmbedding) and module.name in made:
            module.codes, module.scales = made[module.name]


def _all(model: nn.Module) -> list[nn.Module]:
    """The matrices in a module, packed or not."""
    packed = [x for x in model.modules() if isinstance(x, FrozenLinear | FrozenEmbedding)]
    return [*packed, *matrices(model)]


def mapped(x: NDArray[Any], device: torch.device, copy: bool = False) -> Tensor:
    """A file's array as a tensor: the mapped pages themselves on a CPU, which must not be written to, or a copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is read-only, as it should be
        found = torch.from_numpy(x)
    return found.to(device, copy=copy)


def _buffers(model: nn.Module, whole: Mapping[str, NDArray[Any]], file: PackedFile, device: torch.device) -> None:
    saved = model.state_dict(keep_vars=True)
    for name, x in model.named_buffers():
        if name in whole:
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner)._buffers[key] = mapped(whole[name], device, copy=True)
        elif x.is_meta or name in saved:
            raise _other(file, name)


def _other(file: PackedFile, name: str) -> DataError:
    return DataError(
        f"{file.path}: its {name} is missing, or of another shape than the model's: it is another model's file; "
        f"want the one that was made with this config.json"
    )
