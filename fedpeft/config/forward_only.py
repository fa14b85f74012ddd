"""What a run of clients that train by forward passes alone can't do."""

from typing import TYPE_CHECKING

from fedpeft.errors import ConfigError
from fedpeft.training.forward_only import refused

if TYPE_CHECKING:
    from fedpeft.config.experiment import Experiment


def check_forward_only(found: "Experiment", name: str) -> None:
    """Raise ConfigError, naming the key, for what would be ignored, or undone. name: the rule's."""
    if found.rule.pool is None:
        return
    if problem := refused(found.training):
        raise ConfigError(f"training.{problem} (with a training.lr of its own), or a rule such as fedit")
    noise = "measures the loss on both sides of a step, which dropout would drown"
    for key, value, why, want in (
        ("model.dropout", found.model.dropout, noise, "false"),
        ("adapter.dropout", found.adapter.dropout, noise, "0"),
        ("personal.finetune", found.personal.finetune, "has clients that train by no gradients, as this does", "0"),
    ):
        if value:
            raise ConfigError(f"{key}: got {value}, and {name} {why}; want {want}, or a rule such as fedit")
