"""Sections of an experiment file that belong to no room: evaluation, baselines, fleet, simulation."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import floor, inf
from typing import Literal

from fedpeft.config.runtimes import FORMATS, check_shares
from fedpeft.config.timing import kinds
from fedpeft.rounds import Device


@dataclass(frozen=True, slots=True)
class Evaluation:
    """When the adapter is evaluated: every ``every`` rounds and after the last.

    clients: evaluate on each client's own validation rows too; central: on the central test set; sample: of more
    clients than this, so many are drawn for each evaluation, and for the end and the baselines the same ones;
    exactness: measure how far each round is from the mean of the clients' changes, by sketches, sent unclipped.
    """

    every: int = 1
    clients: bool = True
    central: bool = True
    sample: int = 300
    exactness: bool = True

    def __post_init__(self) -> None:
        for key in ("every", "sample"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: got {getattr(self, key)}; want at least 1")


@dataclass(frozen=True, slots=True)
class Baselines:
    """What the run is compared with, all trained for as many steps as the federation gives each row.

    base: the adapter before training; local: each client alone; central: all clients' rows in one place.
    """

    base: bool = True
    local: bool = False
    central: bool = False


@dataclass(frozen=True, slots=True)
class Fleet:
    """What the coordinator waits for before it starts.

    nodes: how many (in a simulation, all of them); wait: seconds; failures: rounds in a row that may
    fail before the run stops; own_data: each node brings a data set of its own (its node config's
    ``data``), so there is nothing to partition; patience: seconds for each short message of secure aggregation, in
    which nobody trains; kit: the format of the base in the kit that devices without torch are sent ("" sends none), or
    the digest of a kit that was made before.
    """

    nodes: int | None = None
    wait: float = 120.0
    patience: float = 120.0
    failures: int = 3
    own_data: bool = False
    kit: str = ""

    def __post_init__(self) -> None:
        for key, good, want in (
            ("nodes", self.nodes is None or self.nodes >= 1, "at least 1"),
            ("wait", self.wait > 0, "more than 0 seconds"),
            ("patience", self.patience > 0, "more than 0 seconds"),
            ("failures", self.failures >= 1, "at least 1"),
            ("kit", _is_kit(self.kit), f"{', '.join(FORMATS)}, or 64 hex digits"),
        ):
            if not good:
                raise ValueError(f"{key}: got {getattr(self, key)}; want {want}")


def _is_kit(said: str) -> bool:
    return said in ("", *FORMATS) or re.fullmatch(r"[0-9a-f]{64}", said) is not None


@dataclass(frozen=True, slots=True)
class Hostile:
    """Simulated clients that send what was never trained.

    share: of all clients, rounded down, drawn by the seed for the whole run; attack: "flip" sends received − strength ·
    (trained − received), "noise" a Gaussian change whose norm is ``strength`` times that of what was trained.
    """

    share: float
    attack: Literal["flip", "noise"] = "flip"
    strength: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share: got {self.share}; want more than 0 and less than 1")
        if not 0 < self.strength < inf:
            raise ValueError(f"strength: got {self.strength}; want more than 0")

    def count(self, clients: int) -> int:
        """How many of so many clients are hostile."""
        return floor(self.share * clients + 1e-9)


@dataclass(frozen=True, slots=True)
class Losses:
    """Simulated clients that vanish in each round, each at a step of its own. share: of all clients, rounded down."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share: got {self.share}; want more than 0 and less than 1")

    def count(self, clients: int) -> int:
        """How many of so many clients vanish in a round."""
        return floor(self.share * clients + 1e-9)


@dataclass(frozen=True, slots=True)
class Simulation:
    """How simulated clients run.

    engine: "cohort" trains many at once on one base, "loop" one after another; group: the most that are in one step
    (unset: as many as memory and the processor have use for); workers: processes that share the base (unset: one for
    every four cores); devices: the kinds of device that clients are on. Where there are any, time is simulated:
    answers come when these would give them, and ``selection.deadline`` is in simulated seconds. hostile: clients that
    attack the rule; they are not evaluated. losses: clients that vanish in the middle of a round. runtimes: what
    clients train with, "torch" or "onnx", alone or with a format of the base ("torch nf4", "onnx int8"; else
    ``model.quantise``), and the share of the clients that does, relative to one another; the seed says who. The base
    is in memory once for each.
    """

    engine: Literal["cohort", "loop"] = "cohort"
    group: int | None = None
    workers: int | None = None
    devices: Mapping[str, Device] = field(default_factory=dict)
    hostile: Hostile | None = None
    losses: Losses | None = None
    runtimes: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", kinds(self.devices, "simulation.devices"))
        object.__setattr__(self, "runtimes", check_shares(self.runtimes))
        for key in ("group", "workers"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key}: got {value}; want at least 1, or leave it out")
