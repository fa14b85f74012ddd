"""Simulated devices: what kinds a fleet is made of, and when a device would answer.

Times are simulated seconds since the run began. Everything follows from the settings and the seed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, inf, isfinite
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from fedpeft.rounds.availability import ALWAYS, Availability, every
from fedpeft.rounds.places import whole_parts
from fedpeft.rounds.seeds import derive

Fate: TypeAlias = Literal["done", "late", "lost", "away"]
FATES: tuple[Fate, ...] = get_args(Fate)
HOUR = 3600.0
FLOP_PER_PARAMETER = 4.0
"""Of a training step, for each token and each parameter of a frozen base: forward 2, gradients of activations 2."""

_RATE = re.compile(r"([0-9.]+)\s*([kMG]?)bit/s")
_SIZE = re.compile(r"([0-9.]+)\s*([kMG]?)B")
_SCALE = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of device.

    share: of the fleet, relative to the other kinds' shares; gflops: sustained in training, from which follow the
    tokens a second of a given base model; or tokens_per_second itself: tokens are what training costs are
    proportional to, as rows differ in length (an image counts its patches); memory: bytes, or such as "4GB", below
    which a client can't train; up, down: bit/s, or such as "5Mbit/s"; latency: seconds, each way; jitter: the spread
    of the logarithm of how long a visit takes, drawn anew for each client and round;
    online_hours: the (from, to) in which it can be reached and works (always, if there are none), repeated every
    period_hours if that is set, and shifted for each client by a random part of spread_hours; trace: a CSV file
    of such windows in seconds instead.
    """

    share: float = 1.0
    gflops: float | None = None
    tokens_per_second: float | None = None
    memory: float | str | None = None
    up: float | str = "10Mbit/s"
    down: float | str = "50Mbit/s"
    latency: float = 0.05
    jitter: float = 0.0
    online_hours: tuple[tuple[float, ...], ...] = ()
    period_hours: float | None = None
    spread_hours: float = 0.0
    trace: str | None = None

    def __post_init__(self) -> None:
        positive = "more than 0"
        for key, good, want in (
            ("share", 0 < self.share < inf, positive),
            ("gflops", self.gflops is None or 0 < self.gflops < inf, positive),
            ("tokens_per_second", self.tokens_per_second is None or 0 < self.tokens_per_second < inf, positive),
            ("latency", 0 <= self.latency < inf, "0 seconds or more"),
            ("jitter", 0 <= self.jitter <= 2, "0 to 2"),
            ("period_hours", self.period_hours is None or 0 < self.period_hours < inf, positive),
            ("spread_hours", 0 <= self.spread_hours < inf, "0 or more"),
            ("trace", self.trace is None or not self.online_hours, "left out beside online_hours, or these left out"),
        ):
            if not good:
                raise ValueError(f"{key}: got {getattr(self, key)}; want {want}")
        if (self.gflops is None) == (self.tokens_per_second is None):
            raise ValueError("tokens_per_second: want it or gflops, and not both")
        for key in ("up", "down"):
            _amount(key, getattr(self, key), _RATE, "bit/s, such as 5e6 or '5Mbit/s'")
        if self.memory is not None:
            bytes_in(self.memory, "memory")
        try:
            self.availability(0.0)
        except ValueError as error:
            raise ValueError(f"online_hours: {error}") from None

    def speed(self, parameters: float) -> float:
        """Tokens a second on a frozen base with so many parameters in its matrix products."""
        if self.tokens_per_second is not None:
            return self.tokens_per_second
        assert self.gflops is not None
        return self.gflops * 1e9 / (FLOP_PER_PARAMETER * parameters)

    @property
    def bits_up(self) -> float:
        """Bit/s from the device."""
        return _amount("up", self.up, _RATE, "")

    @property
    def bits_down(self) -> float:
        """Bit/s to the device."""
        return _amount("down", self.down, _RATE, "")

    @property
    def bytes_memory(self) -> float:
        """Bytes that training may take; infinite if not set."""
        return inf if self.memory is None else bytes_in(self.memory, "memory")

    def availability(self, share: float) -> Availability:
        """When one client of this kind is there, shifted by this share of ``spread_hours``."""
        if not self.online_hours:
            return ALWAYS
        windows = [tuple(HOUR * x for x in window) for window in self.online_hours]
        return every(windows, HOUR * self.period_hours if self.period_hours else None, HOUR * self.spread_hours * share)


@dataclass(frozen=True, slots=True)
class Errand:
    """What one message asks of a device: bytes to fetch, tokens to train on, bytes to send; or why it can't be done."""

    down: float
    tokens: float
    up: float
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Visit:
    """What became of one message to one client.

    asked: when it was sent; began: when the device fetched it; ended: when the device was free again; fate: "done",
    its answer arrives at ``ended``; "late", it would arrive after the message expired, so nobody waits for it; "lost",
    the device went away at ``ended`` in the middle of it, and all that it did is gone; "away", the device was away or
    busy until the message expired, and never saw it.
    """

    client: int
    asked: float
    began: float
    ended: float
    fate: Fate


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """Which client is on which device, and how long that takes.

    names, devices: the kinds; kinds: (clients,), each client's; speeds: tokens a second of each kind; traces: of the
    kinds that have a file, of which each client draws one.
    """

    names: tuple[str, ...]
    devices: tuple[Device, ...]
    kinds: NDArray[np.int64]
    speeds: tuple[float, ...]
    seed: int
    traces: Mapping[str, Sequence[Availability]] = field(default_factory=dict)

    def device(self, client: int) -> Device:
        """The kind of device that this client is on."""
        return self.devices[int(self.kinds[client])]

    def name(self, client: int) -> str:
        """The name of its kind."""
        return self.names[int(self.kinds[client])]

    def availability(self, client: int) -> Availability:
        """When this client is there."""
        name, device = self.name(client), self.device(client)
        if name in self.traces:
            some = self.traces[name]
            return some[derive(self.seed, "device", 1, client) % len(some)]
        return device.availability(_uniform(self.seed, 1, client)) if device.online_hours else ALWAYS

    def visit(self, client: int, round: int, errand: Errand, asked: float, free: float, expires: float) -> Visit:
        """What becomes of a message.

        free: when the device is done with what it had to do before. A device does one thing at a time, and goes on
        with what it began even if the answer comes too late.
        """
        opens, closes = self.availability(client).window(max(asked, free))
        began = max(asked, free, opens)
        if began >= expires:
            return Visit(client, asked, expires, expires, "away")
        ended = began + self.duration(client, round, errand)
        if ended > closes:
            return Visit(client, asked, began, closes, "lost")
        return Visit(client, asked, began, ended, "late" if ended > expires else "done")

    def duration(self, client: int, round: int, errand: Errand) -> float:
        """Seconds from fetching a message to having answered it, if the device stays there."""
        device = self.device(client)
        fetch = device.latency + 8 * errand.down / device.bits_down
        train = 0.0 if errand.problem else errand.tokens / self.speeds[int(self.kinds[client])]
        answer = device.latency + (0.0 if errand.problem else 8 * errand.up / device.bits_up)
        if not device.jitter:
            return fetch + train + answer
        normal = np.random.default_rng(derive(self.seed, "device", 2, round, client)).standard_normal()
        return (fetch + train + answer) * exp(device.jitter * float(normal))


def populate(
    devices: Mapping[str, Device],
    clients: int,
    parameters: float,
    seed: int,
    traces: Mapping[str, Sequence[Availability]] | None = None,
) -> Population:
    """The kinds dealt out to the clients: as many of each as its share makes, to whom is drawn from the seed."""
    names = tuple(devices)
    if not names:
        raise ValueError("devices: got none; want at least one kind")
    counts = whole_parts([devices[name].share for name in names], clients)
    kinds = np.repeat(np.arange(len(names)), counts)
    kinds = np.random.default_rng(derive(seed, "device", 0)).permutation(kinds)
    speeds = tuple(devices[name].speed(parameters) for name in names)
    return Population(names, tuple(devices.values()), kinds, speeds, seed, traces or {})


def trained_rows(rows: int, batch: int, accumulate: int, epochs: int, steps: int | None) -> int:
    """How many rows a client's training goes through, to within a batch where it ends in the middle of an epoch."""
    if steps is None:
        return rows * epochs
    batches = -(-rows // batch)
    whole, rest = divmod(steps, -(-batches // accumulate))
    return rows * whole + min(rows, rest * batch * accumulate)


def bytes_in(value: float | str, key: str) -> float:
    """Bytes, from a number of them or such as "4GB". Raises ValueError naming the key."""
    return _amount(key, value, _SIZE, "bytes, such as 4e9 or '4GB'")


def _uniform(seed: int, *path: int) -> float:
    """A number from 0 to below 1."""
    return derive(seed, "device", *path) / 2.0**63


def _amount(key: str, value: float | str, form: re.Pattern[str], want: str) -> float:
    found = form.fullmatch(value.strip()) if isinstance(value, str) else None
    try:
        amount = float(found[1]) * _SCALE[found[2]] if found else float(value)
    except ValueError:
        amount = 0.0
    if not amount > 0 or not isfinite(amount):
        raise ValueError(f"{key}: got {value!r}; want {want}")
    return amount
