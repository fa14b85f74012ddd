"""Which modules of a model a method adapts, and whether it can."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedpeft.errors import ConfigError
from fedpeft.training.methods import Method, TaskName

HEADS = ("classifier", "score", "head")
"""Names under which transformers keeps a classification head."""

_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, Conv1D)
_ATTENTION = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("query_key_value",),
    ("qkv",),
    ("Wqkv",),
    ("c_attn",),
    ("q", "v"),
)
_MATRIX_RANK = frozenset({"lora", "adalora", "hira", "delora"})
_CHOOSES_ITSELF = frozenset({"adaption_prompt", "shadow", "trainable_tokens"})


def settle(model: PreTrainedModel, method: Method, task: TaskName, fresh: Sequence[str] = ()) -> Method:
    """The method with all that depends on the model filled in: its default targets, and what to train whole.

    fresh: parameters that the model's files don't hold. They are no part of the base, so the modules
    that hold them are trained, and travel, with the head.
    Raises ConfigError for targets that match nothing, a rank above a matrix's, a model without a head.
    """
    if task != "lm":
        whole = _heads(model, fresh) + _inside(model, fresh)
        # For text peft adds these two itself, by the task's type.
        there = ("classifier", "score") if task == "classify" else ()
        method = replace(method, save=(*method.save, *(x for x in whole if x not in there)))
    if method.name in _CHOOSES_ITSELF or method.is_prompt or method.options.get("target_parameters"):
        return method
    if not method.targets:
        method = replace(method, targets=_usual(model, method))
    if method.layers is not None:
        method = _at_the_top(model, method, method.layers)
    if method.name == "ia3":
        # peft fills in the architecture's own, and then can't load a folder whose targets don't hold them
        feedforward = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(_kind(model), [])
        own = {"feedforward_modules": [x for x in feedforward if x in method.targets]}
        method = replace(method, options=own | dict(method.options))
    if method.targets != ("all-linear",):
        _need_matches(model, method.targets)
        if method.name in _MATRIX_RANK:
            _check_ranks(model, method)
    return method


def _at_the_top(model: PreTrainedModel, method: Method, layers: int) -> Method:
    """The method on so many of the model's last layers."""
    total = getattr(model.config, "num_hidden_layers", None)
    if not isinstance(total, int):
        raise ConfigError(f"adapter.layers: got {layers}; {type(model).__name__} does not say how many layers it has")
    if layers > total:
        raise ConfigError(f"adapter.layers: got {layers}; {type(model).__name__} has {total}: want at most that")
    top = list(range(total - layers, total))
    return replace(method, layers=None, options={"layers_to_transform": top} | dict(method.options))


def candidates(model: PreTrainedModel) -> list[str]:
    """The last parts of the names of modules that hold a matrix and aren't a head, in the model's order."""
    names = [n for n, x in model.named_modules() if isinstance(x, _MATRICES) and n not in HEADS]
    return list(dict.fromkeys(n.rsplit(".", 1)[-1] for n in names))


def _heads(model: PreTrainedModel, fresh: Sequence[str]) -> tuple[str, ...]:
    """The model's children that make the classes' scores of what its inner model gives."""
    new = {x.split(".")[0] for x in fresh} - {model.base_model_prefix}
    heads = tuple(n for n, _ in model.named_children() if n in HEADS or n in new)
    if not heads:
        raise ConfigError(
            f"model.name: {type(model).__name__} has no classification head named {' or '.join(HEADS)}; "
            f"want a model that transformers loads for classification"
        )
    return heads


def _inside(model: PreTrainedModel, fresh: Sequence[str]) -> tuple[str, ...]:
    """Modules of the inner model with parameters that the files don't hold: a pooler, say."""
    names = (x.rpartition(".")[0] for x in fresh if x.startswith(f"{model.base_model_prefix}."))
    return tuple(dict.fromkeys(names))


def _usual(model: PreTrainedModel, method: Method) -> tuple[str, ...]:
    """peft's own choice for this architecture where it fits the loaded model, else what is found in it."""
    tuners = {str(k.value).lower(): v for k, v in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    known = getattr(tuners.get(method.name), "target_module_mapping", None) or {}
    if method.name == "ia3":
        known = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    usual = known.get(_kind(model), ())
    if usual and not isinstance(usual, str) and all(_matching(model, x) for x in usual):
        return tuple(usual)
    if method.name == "ln_tuning":
        norms = [n.rsplit(".", 1)[-1] for n, x in model.named_modules() if type(x).__name__.endswith("Norm")]
        if norms:
            return tuple(dict.fromkeys(norms))
    for names in _ATTENTION:
        if all(_matching(model, x) for x in names):
            return names[-1:] if method.name == "beft" else names
    raise ConfigError(
        f"adapter.targets: got none, and the usual ones of {_kind(model)!r} are not known; "
        f"want some of {', '.join(candidates(model))}"
    )


def _kind(model: PreTrainedModel) -> str:
    return str(model.config.model_type)


def _need_matches(model: PreTrainedModel, targets: Sequence[str]) -> None:
    for target in targets:
        if not _matching(model, target):
            raise ConfigError(
                f"adapter.targets: got {target!r}, which no module of {type(model).__name__} is named; "
                f"want some of {', '.join(candidates(model))}"
            )


def _check_ranks(model: PreTrainedModel, method: Method) -> None:
    pattern = method.options.get("rank_pattern")
    own = dict(pattern) if isinstance(pattern, Mapping) else {}
    for name, module in model.named_modules():
        if not isinstance(module, _MATRICES) or not any(_ends(name, x) for x in method.targets):
            continue
        rank = next((x for key, x in own.items() if re.match(rf"(.*\.)?({key})$", name)), method.rank)
        rows, columns = module.weight.shape[0], module.weight[0].numel()
        if rank > min(rows, columns):
            raise ConfigError(
                f"adapter.rank: got {rank} for {name}, a matrix of {rows} x {columns}; "
                f"want at most {min(rows, columns)}"
            )


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _matching(model: PreTrainedModel, target: str) -> bool:
    return any(_ends(name, target) for name, _ in model.named_modules())
