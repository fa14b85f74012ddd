"""The rules that an experiment file can name, and what they can be combined with."""

from collections.abc import Mapping

from fedpeft.config.schema import Choice
from fedpeft.errors import ConfigError
from fedpeft.rounds import Buffered, Synchronous
from fedpeft.rules import Averaging, FactorMean, ListRule, MeanRule, Median, ServerOptimiser
from fedpeft.training.methods import Method

RULES: Mapping[str, Choice] = {
    "fedit": Choice(FactorMean, {"cycle": ("ab",), "personalised": False}),
    "fedsa": Choice(FactorMean, {"cycle": ("a",), "personalised": True}),
    "ffa": Choice(FactorMean, {"cycle": ("b",), "personalised": False}),
    "median": Choice(Median),
    "rolora": Choice(FactorMean, {"cycle": ("b", "a"), "personalised": False}),
}


def check_rule(
    rule: MeanRule | ListRule, name: str, method: Method, server: ServerOptimiser, schedule: Synchronous | Buffered
) -> None:
    """Raise ConfigError, naming the key, for a rule of this name that can't go with the rest of the experiment."""
    if isinstance(rule, ListRule):
        if not isinstance(server, Averaging):
            raise ConfigError(f"server.name: {name} is not a mean; want averaging with it")
        if server.lr != 1:
            raise ConfigError(f"server.lr: got {server.lr}; {name} is not a mean, and takes its own step: want 1")
        if isinstance(schedule, Buffered):
            raise ConfigError(
                f"rule.name: {name} needs all answers of a round at once, and with schedule.name = 'buffered' they "
                f"come when they come; use a rule of one mean, such as fedit, or schedule.name = 'synchronous'"
            )
    if isinstance(rule, FactorMean) and rule.cycle != ("ab",) and method.name != "lora":
        raise ConfigError(
            f"rule.name: {name} tells factors a and b apart, and adapter.method "
            f'{method.method!r} has none; use fedit, or adapter.method = "lora"'
        )
