"""When things happen, in an experiment file: the kinds of simulated devices, and schedules that fit a rule."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from fedpeft.adapters import Spec
from fedpeft.config.schema import Choice, build, plain
from fedpeft.errors import ConfigError
from fedpeft.rounds import PACKAGED, Buffered, Device, Selection, Synchronous
from fedpeft.rules import ListRule, MeanRule, Task

SCHEDULES: Mapping[str, Choice] = {"buffered": Choice(Buffered), "synchronous": Choice(Synchronous)}
_TRIED = 4
"""Rounds after which rules do again what they have done."""
_INSTEAD = {
    "tokens_per_second": ("gflops",),
    "gflops": ("tokens_per_second",),
    "trace": ("online_hours", "period_hours", "spread_hours"),
}


def kinds(given: Mapping[str, Any], section: str) -> dict[str, Device]:
    """The devices of a section, by name; a packaged name starts from what is packaged. Raises ConfigError."""
    return {name: _kind(name, value, f"{section}.{name}") for name, value in given.items()}


def timing(
    rule: MeanRule | ListRule,
    name: str,
    schedule: Synchronous | Buffered,
    devices: Mapping[str, Device],
    selection: Selection,
) -> None:
    """Raise ConfigError for a rule, of this name, that can't be run on the schedule, and for waiting without end.

    A rule that is no mean is refused with all else that it does not go with.
    """
    if devices and not isfinite(selection.deadline):
        raise ConfigError("selection.deadline: got inf; want seconds where simulation.devices is set: devices get lost")
    if not isinstance(schedule, Buffered):
        return
    if rule.passes > 1:
        raise ConfigError(
            f"rule.name: {name} asks the same clients {rule.passes} times a round, and with schedule.name = 'buffered' "
            f"there is no round to wait for; use fedit or ffa, or schedule.name = 'synchronous'"
        )
    if len({rule.trains(Task(Spec(), round)) for round in range(_TRIED)}) > 1:
        raise ConfigError(
            f"rule.name: {name} averages other factors in other rounds, and schedule.name = 'buffered' adds up answers "
            f"of several rounds; use fedit or ffa, or schedule.name = 'synchronous'"
        )


def _kind(name: str, value: object, section: str) -> Device:
    if isinstance(value, Device):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{section}: got {value!r}; want a section, such as [{section}]")
    start = plain(PACKAGED[name]) if name in PACKAGED else {}
    for key, others in _INSTEAD.items():
        if key in value:
            start = {k: v for k, v in start.items() if k not in others}
    if not start and "gflops" not in value and "tokens_per_second" not in value:
        raise ConfigError(
            f"{section}.tokens_per_second: is missing, and {name} is none of the packaged {', '.join(PACKAGED)}; "
            f"want how fast it trains, as tokens_per_second or gflops"
        )
    made: Device = build(Device, {**start, **value}, section)
    return made
