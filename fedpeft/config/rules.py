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
    FedSVD,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    Krum,
    ListRule,
    LoRAFair,
    MeanRule,
    Median,
    ServerOptimiser,
    Subspace,
    TrimmedMean,
    ZeroPad,
)
from fedpeft.training.methods import Method

RULES: Mapping[str, Choice] = {
    "fedex": Choice(FedEx),
    "fedit": Choice(FactorMean, {"cycle": ("ab",), "personalised": False, "owners": False}),
    "fedsa": Choice(FactorMean, {"cycle": ("a",), "personalised": True, "owners": False, "rest": "dropped"}),
    "fedsvd": Choice(FedSVD),
    "ffa": Choice(FactorMean, {"cycle": ("b",), "personalised": False}),
    "flexlora": Choice(FlexLoRA),
    "flora": Choice(FLoRA),
    "hetlora": Choice(HetLoRA),
    "krum": Choice(Krum, {"many": False}),
    "lora_fair": Choice(LoRAFair),
    "median": Choice(Median),
    "multi_krum": Choice(Krum, {"many": True}),
    "rbla": Choice(FactorMean, {"cycle": ("ab",), "personalised": False, "owners": True, "rest": "dropped"}),
    "rolora": Choice(FactorMean, {"cycle": ("b", "a"), "personalised": False}),
    "subspace": Choice(Subspace),
    "trimmed_mean": Choice(TrimmedMean),
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
    is_dora = method.method.lower() == "dora" or bool(method.options.get("use_dora"))
    if rule.tells_factors and not isinstance(rule, FactorMean) and is_dora:
        raise ConfigError(
            f"rule.name: {name} adds up products of factors, and dora normalises them with the base's weights; "
            f'use fedit, ffa or rolora, or adapter.method = "lora"'
        )
