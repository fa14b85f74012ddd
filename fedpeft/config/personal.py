"""The [personal] section of an experiment file: what is each client's own."""

from dataclasses import dataclass

from fedpeft.errors import ConfigError
from fedpeft.training.methods import Method


@dataclass(frozen=True, slots=True)
class Personal:
    """What is each client's own.

    tensors: names, with * and ?, of what clients train, keep between rounds and never send: "classifier*",
    "*.layer.5.*", "*/b"; finetune: epochs for which each client that is evaluated at the end trains on by itself, to be
    evaluated once more; dual: in these it trains a second adapter, beside the shared one that stays as it is; mix: how
    much of the second counts, from 0 to 1.
    """

    tensors: tuple[str, ...] = ()
    finetune: int = 0
    dual: bool = False
    mix: float = 1.0

    def __post_init__(self) -> None:
        for key, good, want in (
            ("tensors", all(x.strip() for x in self.tensors), "names, none of them empty"),
            ("finetune", self.finetune >= 0, "0 or more epochs"),
            ("finetune", self.finetune > 0 or not self.dual, "at least 1 epoch where dual is set"),
            ("mix", 0 <= self.mix <= 1, "0 to 1"),
            ("mix", self.mix == 1 or self.dual, "1 unless dual is set: else there is nothing to mix"),
        ):
            if not good:
                raise ValueError(f"{key}: got {getattr(self, key)}; want {want}")


def check_personal(personal: Personal, method: Method, is_dora: bool, evaluates_clients: bool) -> None:
    """Raise ConfigError, naming the key, for what can't be done with the rest of the experiment."""
    if personal.finetune and not evaluates_clients:
        raise ConfigError(
            f"personal.finetune: got {personal.finetune}, and evaluation.clients is false, so that nobody would see "
            f"what it does; want 0, or evaluation.clients = true"
        )
    if personal.dual and (method.name != "lora" or is_dora):
        raise ConfigError(
            f"personal.dual: got true, and two adapters of {method.method!r} on one layer don't add up; want false, "
            f'with which clients train on the shared one, or adapter.method = "lora"'
        )
