"""The rules that an experiment file can name, and what they can be combined with."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fedpeft.config.schema import Choice, Settings
from fedpeft.errors import ConfigError
from fedpeft.rounds import Buffered, Synchronous
from fedpeft.rules import (
    Averaging,
    FactorMean,
    FedEx,
    FedKSeed,
    FedRot,
    FedSB,
    FedSVD,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    Krum,
    ListRule,
    LoRAA2,
    LoRAFair,
    MeanRule,
    Median,
    Ravan,
    Scaffold,
    ServerOptimiser,
    Subspace,
    TrimmedMean,
    ZeroPad,
)
from fedpeft.training.methods import Method

RULES: Mapping[str, Choice] = {
    "fedex": Choice(FedEx),
    "fedit": Choice(
        FactorMean,
        {"cycle": ("ab",), "personalised": False, "owners": False},
        "Average the change of both factors (arXiv:2305.05644).",
    ),
    "fedkseed": Choice(FedKSeed),
    "fedrot": Choice(FedRot),
    "fedsa": Choice(
        FactorMean,
        {"cycle": ("a",), "personalised": True, "owners": False, "rest": "dropped"},
        "Average the change of a; b and the head stay on the client (arXiv:2410.01463).",
    ),
    "fedsb": Choice(FedSB),
    "fedsvd": Choice(FedSVD),
    "ffa": Choice(
        FactorMean,
        {"cycle": ("b",), "personalised": False},
        "Average the change of b; a stays as it was drawn (arXiv:2403.12313).",
    ),
    "flexlora": Choice(FlexLoRA),
    "flora": Choice(FLoRA),
    "hetlora": Choice(HetLoRA),
    "krum": Choice(Krum, {"many": False}, "The change that is nearest to those around it (arXiv:1703.02757)."),
    "lora_a2": Choice(LoRAA2),
    "lora_fair": Choice(LoRAFair),
    "median": Choice(Median),
    "multi_krum": Choice(
        Krum, {"many": True}, "The mean of the changes that are nearest to those around them (arXiv:1703.02757)."
    ),
    "ravan": Choice(Ravan),
    "rbla": Choice(
        FactorMean,
        {"cycle": ("ab",), "personalised": False, "owners": True, "rest": "dropped"},
        "Average both factors, each direction over those who hold it (arXiv:2408.08699).",
    ),
    "rolora": Choice(
        FactorMean,
        {"cycle": ("b", "a"), "personalised": False},
        "Average the change of b in one round, that of a in the next (arXiv:2409.02346).",
    ),
    "scaffold": Choice(Scaffold),
    "subspace": Choice(Subspace),
    "trimmed_mean": Choice(
        TrimmedMean, about="Each number's mean without the smallest and the largest (arXiv:1803.01498)."
    ),
    "zeropad": Choice(ZeroPad),
}


def seeded(given: Mapping[str, Any], choices: Mapping[str, Choice], default: str, seed: int) -> Settings:
    """The section with the experiment's seed in it, where the named rule has one and the section doesn't set it."""
    choice = choices.get(str(given.get("name", default)))
    has_seed = choice is not None and any(f.name == "seed" for f in fields(choice.cls))
    return ({"seed": seed} if has_seed else {}) | dict(given)


def check_rule(
    rule: MeanRule | ListRule, name: str, method: Method, server: ServerOptimiser, schedule: Synchronous | Buffered
) -> None:
    """Raise ConfigError, naming the key, for a rule of this name that can't go with the rest of the experiment."""
    if isinstance(rule, ListRule) or not rule.is_change:
        why = "is not a mean" if isinstance(rule, ListRule) else "averages more than a change of the adapter"
        if not isinstance(server, Averaging):
            raise ConfigError(f"server.name: {name} {why}; want averaging with it")
        if server.lr != 1:
            raise ConfigError(f"server.lr: got {server.lr}; {name} {why}, and takes its own step: want 1")
        if isinstance(schedule, Buffered):
            raise ConfigError(
                f"rule.name: {name} needs all answers of a round at once, and with schedule.name = 'buffered' they "
                f"come when they come; use a rule of one mean, such as fedit, or schedule.name = 'synchronous'"
            )
    if rule.tells_factors and method.name != "lora":
        raise ConfigError(
            f"rule.name: {name} tells factors a and b apart, and adapter.method "
            f'{method.method!r} has none; use fedit, or adapter.method = "lora"'
        )
    if rule.tells_factors and not isinstance(rule, FactorMean | Scaffold) and is_dora(method):
        raise ConfigError(
            f"rule.name: {name} adds up products of factors, and dora normalises them with the base's weights; "
            f'use fedit, ffa or rolora, or adapter.method = "lora"'
        )


def is_dora(method: Method) -> bool:
    """Whether a layer's product is divided by a norm, so that it adds to nothing."""
    return method.method.lower() == "dora" or bool(method.options.get("use_dora"))
