"""The [compression] section of an experiment file: how what travels is coded, and what that can't go with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fedpeft.channel import CODECS, Codec, PlainChannel, TopK
from fedpeft.config.schema import Settings, section
from fedpeft.errors import ConfigError
from fedpeft.rounds import Buffered
from fedpeft.rules import ListRule
from fedpeft.secagg import Protocol

if TYPE_CHECKING:
    from fedpeft.config.experiment import Experiment

NONE = {"up": "none", "down": "none"}


@dataclass(frozen=True, slots=True)
class Compression:
    """How what travels is coded, where the section is there at all; without it nothing is.

    up: what a client trained, from right in expectation and nearly for nothing ("int8", "int4") to a bit a number;
    down: the change of the adapter since the version that the client holds; share: of the numbers that "topk" sends,
    and values: their codec.
    """

    up: Literal["none", "bf16", "int8", "int4", "ternary", "sign", "topk"] = "int4"
    down: Literal["none", "bf16", "int8", "int4"] = "int8"
    share: float = 0.1
    values: Literal["bf16", "int8", "int4"] = "int8"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: got {self.share}; want more than 0 and at most 1")

    @property
    def codec_up(self) -> Codec | None:
        """The codec of answers; None for none."""
        return TopK(self.share, CODECS[self.values]) if self.up == "topk" else CODECS.get(self.up)

    @property
    def codec_down(self) -> Codec | None:
        """The codec of the adapter's changes; None for none."""
        return CODECS.get(self.down)


def without(settings: Mapping[str, Any]) -> Settings:
    """The same with nothing coded, where nothing is said of it."""
    return {"compression": NONE} | dict(settings)


def told(settings: Settings) -> Settings:
    """The same without the section where it says that nothing is coded, as where it is not there."""
    is_none = {k: section(settings, "compression")[k] for k in NONE} == NONE
    return {k: v for k, v in settings.items() if k != "compression" or not is_none}


def check_compression(found: "Experiment") -> None:
    """Raise ConfigError, naming the key, for what codecs can't go with."""
    terms, codec = found.compression, found.compression.codec_up
    if isinstance(found.secagg, Protocol) and codec is not None:
        raise ConfigError(
            f"compression.up: got {terms.up!r}, and under secure aggregation numbers are added on one grid for all; "
            f"want 'none', and for fewer bytes a smaller channel.modulus, such as 16"
        )
    for key, is_there, why in (
        ("secagg.name", isinstance(found.secagg, Protocol), "clients check the digest of what all are sent"),
        ("schedule.name = 'buffered'", isinstance(found.schedule, Buffered), "clients are at different versions"),
        ("simulation.devices", bool(found.simulation.devices), "who holds which version is no part of simulated time"),
    ):
        if is_there and terms.codec_down is not None:
            raise ConfigError(f"compression.down: got {terms.down!r}, and with {key} {why}; want 'none'")
    if codec is None:
        return
    if isinstance(found.channel, PlainChannel) and found.channel.exact:
        raise ConfigError(f"channel.exact: sends each number in full, and compression.up is {terms.up!r}; want false")
    rule, name = found.rule, found.settings["rule"]["name"]
    if codec.is_biased and (isinstance(rule, ListRule) or not rule.is_change or rule.passes > 1):
        raise ConfigError(
            f"compression.up: got {terms.up!r}, which sends later what it leaves out, and what {name} sends does not "
            f"stand for the same in each round; want 'int4' or 'ternary', or rule.name = 'fedit'"
        )
