"""What is recorded of each client of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from fedpeft.report.fields import Fields
from fedpeft.report.strict import Json


@dataclass(frozen=True, slots=True)
class ClientData:
    """What one client holds: training rows, and how many of each label (empty where there are no labels).

    device: the kind that it is on, in virtual time; rank: where the experiment gives it one for the whole run; hostile:
    whether it was made to attack; runtime: what it trains with, where clients differ in that.
    """

    examples: int = 0
    labels: Mapping[str, int] = field(default_factory=dict[str, int])
    device: str = ""
    rank: int | None = None
    hostile: bool = False
    runtime: str = ""

    @classmethod
    def read(cls, x: Fields) -> Self:
        labels = {k: v or 0 for k, v in x.section("labels").wholes().items()}
        rank, hostile = x.whole("rank"), x.claim("hostile")
        return cls(x.whole("examples") or 0, labels, x.text("device"), rank, hostile, x.text("runtime"))

    def json(self) -> dict[str, Json]:
        return {
            "examples": self.examples,
            "labels": self.labels,
            **({"device": self.device} if self.device else {}),
            **({"rank": self.rank} if self.rank is not None else {}),
            **({"hostile": True} if self.hostile else {}),
            **({"runtime": self.runtime} if self.runtime else {}),
        }
