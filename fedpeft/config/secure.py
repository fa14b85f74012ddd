"""Secure aggregation in an experiment file: the protocols by name, and what a run that asks for one can't do."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedpeft.channel import PlainChannel, RingChannel
from fedpeft.config.schema import Choice, Settings, section
from fedpeft.errors import ConfigError
from fedpeft.rounds import Buffered
from fedpeft.rules import HetLoRA, ListRule
from fedpeft.secagg import Full, KRegular, Policy, Protocol, TwoServer

if TYPE_CHECKING:
    from fedpeft.config.experiment import Experiment


@dataclass(frozen=True, slots=True)
class InTheClear:
    """No secure aggregation: the server sees what each client sends."""


SECAGGS: Mapping[str, Choice] = {
    "full": Choice(Full),
    "kregular": Choice(KRegular),
    "none": Choice(InTheClear),
    "twoserver": Choice(TwoServer),
}
CHANNELS: Mapping[str, Choice] = {"plain": Choice(PlainChannel), "ring": Choice(RingChannel)}
CAP = 1000
"""What a client's examples count at most where the experiment says nothing: vectors are scaled by weight / cap."""


def is_secure(settings: Mapping[str, Any]) -> bool:
    """Whether these plain values ask for secure aggregation."""
    return bool(section(settings, "secagg").get("name", "none") != "none")


def with_defaults(settings: Mapping[str, Any]) -> Settings:
    """The same with what is usual under secure aggregation, where it is asked for and nothing else is said."""
    out: Settings = copy.deepcopy(dict(settings))
    if is_secure(settings):
        for name, key, value in (("channel", "name", "ring"), ("evaluation", "clients", False)):
            section(out, name)
            out[name] = {key: value} | dict(out.get(name, {}))
        if section(out, "rule").get("name") == "hetlora" and "gamma" not in section(out, "rule"):
            out["rule"] = {**section(out, "rule"), "gamma": 1.0}
        weighting = section(out, "weighting")
        if weighting.get("name", "examples") in ("examples", "root") and "cap" not in weighting:
            out["weighting"] = {**weighting, "cap": CAP}
    return out


def check_secure(found: "Experiment") -> None:
    """Raise ConfigError, naming the key, for what can't be run in the way of ``secagg`` that was asked for."""
    name = found.settings["rule"]["name"]
    if not isinstance(found.secagg, Protocol):
        if isinstance(found.channel, RingChannel):
            raise ConfigError(
                "channel.name: got 'ring', which is for secure aggregation; want 'plain', or secagg.name = 'full'"
            )
        return
    if found.secagg.label(100).hides in ("", "nothing"):
        raise ConfigError(
            f"secagg.name: got {found.settings['secagg']['name']!r}, which hides nothing and is for tests; want "
            f"'full', 'kregular' or 'twoserver', or 'none' if nothing is to be hidden"
        )
    if not isinstance(found.channel, RingChannel):
        raise ConfigError("channel.name: got 'plain'; want 'ring' with secure aggregation, or secagg.name = 'none'")
    if isinstance(found.rule, ListRule):
        raise ConfigError(
            f"rule.name: {name} needs each update by itself, and secure aggregation shows the server only their sum; "
            f"use a rule of means such as fedit or subspace, or secagg.name = 'none'"
        )
    prunes = isinstance(found.rule, HetLoRA) and found.rule.gamma < 1
    for key, bad, why, want in (
        ("rule.gamma", prunes, "lets clients prune, so that nobody can count who adds to a direction", "1"),
        ("schedule.name", isinstance(found.schedule, Buffered), "has no rounds to add up in", "'synchronous'"),
        ("evaluation.clients", found.evaluation.clients, "tells the server each client's loss", "false"),
        ("personal.finetune", bool(found.personal.finetune), "tells the server each client's loss at the end", "0"),
        ("selection.over", found.selection.over > 0, "asks clients only to leave them out", "0"),
        ("simulation.devices", bool(found.simulation.devices), "is not there yet with secure aggregation", "none"),
    ):
        if bad:
            raise ConfigError(f"{key}: {why}; want {want} where secagg.name is set, or secagg.name = 'none'")


def check_cohort(found: "Experiment", clients: int, policy: Policy | None = None) -> None:
    """Raise ConfigError, naming the key, where so many clients are too few, or too many for the ring.

    policy: the least that clients are known to ask for, what is usual if not given.
    """
    if not isinstance(found.secagg, Protocol) or not isinstance(found.channel, RingChannel):
        return
    cohort = found.selection.wanted(clients)
    least = (policy or Policy()).min_cohort
    if cohort < least:
        raise ConfigError(
            f"selection.count: {cohort} clients in a round; want at least {least} under secure aggregation, since the "
            f"sum of fewer says too much of each"
        )
    try:
        found.secagg.threshold(cohort)
    except ValueError as error:
        raise ConfigError(f"secagg.{error}") from error
    try:
        found.channel.over(cohort, 1, 0, found.weighting.largest)
    except ValueError as error:
        raise ConfigError(f"channel.{error}") from error
