"""What simulated clients train with, in an experiment file: an engine each, and a format of the base."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Literal, Self, TypeAlias, get_args

from fedpeft.adapters import CORES, Spec
from fedpeft.config.rules import is_dora
from fedpeft.errors import ConfigError
from fedpeft.rounds import derive, place
from fedpeft.rounds.places import part_of
from fedpeft.rules import Task
from fedpeft.training.settings import Model, Quantise

if TYPE_CHECKING:
    from fedpeft.config.experiment import Experiment

Engine: TypeAlias = Literal["torch", "onnx"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
"""What can train a client: torch, or onnxruntime on an exported training step."""

FORMATS: tuple[Quantise, ...] = get_args(Quantise)

_TRIED = 4
"""Rounds after which rules do again what they have done."""


def quantise_of(name: object) -> Quantise | None:
    """The format of this name; None if there is none."""
    return next((x for x in FORMATS if x == name), None)


@dataclass(frozen=True, slots=True)
class Runtime:
    """An engine, and what it holds the frozen base in."""

    engine: Engine
    quantise: Quantise

    @classmethod
    def of(cls, name: str, default: Quantise) -> Self:
        """What a name such as "torch", "torch nf4" or "onnx int8" stands for; without a format it is the default.

        ValueError for what is none.
        """
        first, _, second = name.partition(" ")
        engine = next((x for x in ENGINES if x == first), None)
        quantise = quantise_of(second) if second else default
        if engine is None or quantise is None:
            raise ValueError(
                f"got {name!r}; want {' or '.join(ENGINES)}, or one of them and {', '.join(FORMATS)}, such as "
                f"'onnx int8'"
            )
        return cls(engine, quantise)

    def __str__(self) -> str:
        return self.engine if self.quantise == "none" else f"{self.engine} {self.quantise}"


def check_shares(runtimes: Mapping[str, object]) -> dict[str, float]:
    """The shares of clients by the names of their runtimes, as numbers. ValueError naming what is none."""
    shares: dict[str, float] = {}
    for name, share in runtimes.items():
        try:
            Runtime.of(name, "none")
        except ValueError as error:
            raise ValueError(f"runtimes: {error}") from None
        if isinstance(share, bool) or not isinstance(share, int | float) or not isfinite(share) or share < 0:
            raise ValueError(f"runtimes.{name}: got {share!r}; want a share of the clients, such as 0.5")
        shares[name] = float(share)
    if shares and not sum(shares.values()) > 0:
        raise ValueError("runtimes: got shares that are all 0; want one above it")
    return shares


def dealt(shares: Mapping[str, float], default: Quantise, client: int, clients: int, seed: int) -> Runtime:
    """The runtime of one of so many clients: each has its share of them, exact but for rounding; the seed says who.

    The order of the shares makes no difference.
    """
    where, names = place(client, clients, derive(seed, "runtime")), sorted(shares)
    return Runtime.of(names[part_of(where, [shares[name] for name in names], clients)], default)


def check_runtimes(found: "Experiment", rule: str) -> None:
    """Raise ConfigError, naming the key, for runtimes that can't go with the rest of the experiment. rule: its name."""
    model, shares = found.model, found.simulation.runtimes
    if not shares:
        return
    if found.simulation.devices:
        raise ConfigError(
            "simulation.runtimes: got some, and simulation.devices too, whose memory and speed are foretold for "
            "clients that are all on torch; want one of the two left out"
        )
    seen: dict[Runtime, str] = {}
    for name in shares:
        runtime = Runtime.of(name, model.quantise)
        if runtime in seen:
            raise ConfigError(
                f"simulation.runtimes: {seen[runtime]!r} and {name!r} are the same, since model.quantise is "
                f"{model.quantise!r}; want one of them"
            )
        seen[runtime] = name
        check_format(model, runtime.quantise, f"simulation.runtimes: got {name!r}")
        if runtime.engine == "onnx":
            check_onnx(found, rule, f"simulation.runtimes: got {name!r}")


def check_format(model: Model, quantise: str, what: str) -> None:
    """Raise ConfigError for a format that the run's clients may not hold the base in. what: who asks for it."""
    if quantise == model.quantise or quantise in model.formats:
        return
    formats = ", ".join(f'"{x}"' for x in dict.fromkeys((*(model.formats or (model.quantise,)), quantise)))
    raise ConfigError(
        f"{what}, and {quantise!r} is none of the formats that this run's clients may hold the base in "
        f"(model.formats); want model.formats = [{formats}] in the experiment, or a format that is there"
    )


def check_onnx(found: "Experiment", rule: str, what: str) -> None:
    """Raise ConfigError for what an exported training step can't do. rule: its name; what: who asks for it.

    What ``training.lower`` keeps in fp32 makes no difference to a result, so that a step which keeps nothing may do.
    """
    method = found.adapter
    if method.name != "lora" or is_dora(method):
        raise ConfigError(f'{what}, and an exported step trains plain LoRA; want adapter.method = "lora", or torch')
    if any(found.rule.trains(Task(Spec(), round)) in CORES for round in range(_TRIED)):
        raise ConfigError(
            f"{what}, and {rule} trains matrices between the two factors, which an exported step has not; want "
            f"another rule.name, such as subspace, or torch"
        )
    if found.data.task == "image":
        raise ConfigError(f"{what}, and an exported step is of texts, while data.task is 'image'; want torch")
    for key, is_set, want in (
        ("model.dropout", found.model.dropout, "false"),
        ("adapter.dropout", method.dropout > 0, "0"),
        ("training.precision", found.training.precision == "bf16", "auto, fp32 or fastest"),
        ("training.lower", found.training.lower == "bf16", "none or fp32"),
    ):
        if is_set:
            raise ConfigError(
                f"{what}, and an exported step has neither dropout nor bf16; want {key} = {want}, or torch"
            )
