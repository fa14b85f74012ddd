"""Secure aggregation in a run's records: the security label, and what each phase cost."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from fedpeft.errors import DataError
from fedpeft.report.fields import Fields
from fedpeft.report.files import write_whole
from fedpeft.report.strict import Json
from fedpeft.secagg import SecurityLabel

PRIVACY = "privacy.json"


@dataclass(frozen=True, slots=True)
class PhaseRecord:
    """What a phase of one session cost: who was asked and who answered, bytes of all messages, seconds."""

    asked: int = 0
    answered: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0

    @classmethod
    def read(cls, x: Fields) -> Self:
        return cls(
            asked=x.whole("asked") or 0,
            answered=x.whole("answered") or 0,
            bytes_up=x.whole("bytes_up") or 0,
            bytes_down=x.whole("bytes_down") or 0,
            seconds=x.number("seconds") or 0.0,
        )


@dataclass(frozen=True, slots=True)
class SecureRecord:
    """The sessions of one round.

    attempts: how many there were; threshold: how many clients had to stay; cut: how many of the survivors' numbers
    were beyond the ring's range, of so many ``numbers``; culprits: clients found to cheat, and why; phases: by name.
    """

    attempts: int = 1
    threshold: int = 0
    cut: int = 0
    numbers: int = 0
    culprits: Mapping[int, str] = field(default_factory=dict[int, str])
    phases: Mapping[str, PhaseRecord] = field(default_factory=dict[str, PhaseRecord])

    @classmethod
    def read(cls, x: Fields) -> Self:
        return cls(
            x.whole("attempts") or 0,
            x.whole("threshold") or 0,
            x.whole("cut") or 0,
            x.whole("numbers") or 0,
            _by_client(x.section("culprits")),
            {name: PhaseRecord.read(x.section("phases").section(name)) for name in x.section("phases").values},
        )

    def json(self) -> dict[str, Json]:
        return {
            "attempts": self.attempts,
            "threshold": self.threshold,
            "cut": self.cut,
            "numbers": self.numbers,
            "culprits": {str(n): why for n, why in self.culprits.items()},
            "phases": {name: asdict(x) for name, x in self.phases.items()},
        }


def _by_client(x: Fields) -> dict[int, str]:
    for key in x.values:
        if not key.isdecimal():
            raise DataError(f"{x.where}: got the key {key!r}; want a client's number")
    return {int(key): why for key, why in x.texts().items()}


def label_json(label: SecurityLabel, simulated: bool) -> dict[str, Json]:
    """A label as plain values. simulated: all identities are this process's own, so that it protects nobody."""
    return {
        "protocol": label.name,
        "hides": label.hides,
        "trusts": list(label.trusts),
        "corrupt": label.corrupt,
        "dropouts": label.dropouts,
        "misses": list(label.misses),
        "simulated": simulated,
    }


def write_privacy(folder: Path, label: Mapping[str, Json]) -> None:
    """Write ``privacy.json``: the run's security label. DataError if it can't be written."""
    text = json.dumps({"schema": 1, "security": label, "differential_privacy": None}, indent=2, ensure_ascii=False)
    write_whole(folder / PRIVACY, (text + "\n").encode())
