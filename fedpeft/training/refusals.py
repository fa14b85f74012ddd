"""What peft offers and a federation can't run, each with the reason, found by running it.

Two things make a method impossible here. It changes tensors of the base at its start (the server
and the clients no longer share one base), or it needs more at its start or at each step than a
frozen base and a batch: data, gradients, other adapters, a task number.

Refused whole: AdaMSS, CPT, multitask prompt tuning, Poly, X-LoRA. Of LoRA and AdaLoRA: the starts PiSSA,
OLoRA, CorDA, EVA, LoRA-GA and LoftQ, and KaSA and Arrow. Of PVeRA: sampling in evaluation. All
else of peft federates, for the tasks that it can do. Not every update can be merged into the base:
prompts, prefixes, caches and updates that depend on the input can't.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

METHODS: Mapping[str, str] = {
    "adamss": "it clusters the base's weights, so the shapes of its tensors may differ between machines",
    "cpt": "its loss needs a type for every token of a batch, and it projects its prompt anew in every forward pass",
    "multitask_prompt_tuning": "every batch needs task_ids, and clients have one task",
    "poly": "every batch needs task_ids, and clients have one task",
    "xlora": "it mixes adapters that were trained before, and needs their files",
}
"""peft methods that are refused whole."""

_NEEDS_TOKENS = "it adds tokens to a text"

TASKS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "adaption_prompt": (("lm",), "it changes the attention of causal language models only"),
    "cartridge": (("classify", "lm"), _NEEDS_TOKENS),
    "p_tuning": (("classify", "lm"), _NEEDS_TOKENS),
    "prefix_tuning": (("classify", "lm"), _NEEDS_TOKENS),
    "prompt_tuning": (("classify", "lm"), _NEEDS_TOKENS),
    "shadow": (("lm",), "it needs the decoder blocks of a causal language model"),
    "trainable_tokens": (("lm",), "it can't train a new classification head beside the tokens"),
}
"""The tasks of those methods that don't do all of them, and why."""

MERGES: Mapping[str, str] = {
    "adaption_prompt": "it adds prompt tokens inside attention",
    "cartridge": "it is a cache of keys and values, not a change of weights",
    "lily": "its update depends on the input",
    "p_tuning": "it adds prompt tokens to the input",
    "prefix_tuning": "it is a prefix of keys and values, not a change of weights",
    "prompt_tuning": "it adds prompt tokens to the input",
    "shadow": "its update depends on the input",
}
"""peft methods that federate, but whose update is not a change of the base's weights."""


PACKED = (
    "adalora",
    "beft",
    "gralora",
    "ia3",
    "ln_tuning",
    "lora",
    "p_tuning",
    "prefix_tuning",
    "prompt_tuning",
    "vblora",
    "vera",
)
"""peft methods that take from a base layer nothing but its output, and so run on packed weights."""

_PACKED_STARTS = (True, False, "gaussian", "orthogonal")


def packed_refusal(method: str, settings: Mapping[str, object]) -> str:
    """Why a method with these settings can't run on a base whose weights are packed; empty if it can.

    An allow-list, since many of the others run and are silently wrong.
    """
    if method not in PACKED:
        return f"it may read the base's weights, and of peft's methods {', '.join(PACKED)} are known not to"
    if settings.get("use_dora"):
        return "DoRA reads the base's weights for their norms"
    if settings.get("init_lora_weights", True) not in _PACKED_STARTS:
        return f"its start init_lora_weights = {settings['init_lora_weights']!r} is computed from the base's weights"
    for option in ("target_parameters", "trainable_token_indices"):
        if settings.get(option):
            return f"{option} are parts of the base's weights"
    return ""


@dataclass(frozen=True, slots=True)
class RefusedOption:
    """An option of some methods that is refused for the values that ``when`` accepts."""

    methods: tuple[str, ...]
    option: str
    when: Callable[[object], bool]
    reason: str


def _starts(*names: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value.lower().startswith(names)


_LORA = ("lora", "adalora")
_CHANGES_BASE = "it subtracts its start from the base's weights, so the clients' base is no longer the server's"
_NEEDS_DATA = "its start is computed from data, which stays on the clients"

OPTIONS: tuple[RefusedOption, ...] = (
    RefusedOption(_LORA, "init_lora_weights", _starts("pissa", "olora"), _CHANGES_BASE),
    RefusedOption(_LORA, "init_lora_weights", _starts("corda", "eva", "lora_ga"), _NEEDS_DATA),
    RefusedOption(_LORA, "init_lora_weights", _starts("loftq"), "it replaces the base's weights by quantised ones"),
    RefusedOption(_LORA, "corda_config", bool, _NEEDS_DATA),
    RefusedOption(_LORA, "eva_config", bool, _NEEDS_DATA),
    RefusedOption(_LORA, "lora_ga_config", bool, _NEEDS_DATA),
    RefusedOption(_LORA, "loftq_config", bool, "it replaces the base's weights by quantised ones"),
    RefusedOption(_LORA, "kasa_config", bool, "it cuts the smallest singular values out of the base's weights"),
    RefusedOption(("pvera",), "sample_at_inference", bool, "two evaluations of one adapter would differ"),
    RefusedOption(_LORA, "arrow_config", bool, "it routes between adapters that were trained before"),
)
"""Options that are refused, whatever else is set."""


def refused_option(method: str, option: str, value: object) -> str | None:
    """Why this option of this method is refused; None where it is not."""
    for x in OPTIONS:
        if method in x.methods and option == x.option and x.when(value):
            return x.reason
    return None
