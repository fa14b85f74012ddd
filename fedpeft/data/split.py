"""What of the rows is for training, validation and test."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from fedpeft.data.table import Rows

Part: TypeAlias = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Split:
    """central: the share of all rows that makes the central test set; of the rest, each client keeps the
    share ``validation`` and the share ``test`` out of its training."""

    central: float = 0.2
    validation: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        for key in ("central", "validation", "test"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}: got {getattr(self, key)}; want at least 0 and less than 1")
        if self.validation + self.test >= 1:
            raise ValueError(
                f"test: got {self.test} beside validation {self.validation}; want less than 1 together, "
                "so that rows are left to train on"
            )


class Size(NamedTuple):
    """How many rows one client has for what."""

    train: int
    validation: int
    test: int


def share_of(share: float, rows: int) -> int:
    """The share of the rows to the nearest whole number, halves up."""
    return int(np.floor(share * rows + 0.5))


def part_from(rows: Rows, size: int, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """``size`` of the rows, and the others, each ascending."""
    shuffled = rng.permutation(rows)
    return np.sort(shuffled[:size]), np.sort(shuffled[size:])


def counts(rows: int, split: Split) -> Size:
    """How many of a client's rows are for training (one at least), validation and test."""
    validation = min(share_of(split.validation, rows), rows - 1)
    test = min(share_of(split.test, rows), rows - 1 - validation)
    return Size(rows - validation - test, validation, test)


def divide(rows: Rows, split: Split, rng: np.random.Generator) -> tuple[Rows, Rows, Rows]:
    """A client's rows for training (one at least), validation and test."""
    _, validation, test = counts(len(rows), split)
    shuffled = rng.permutation(rows)
    ends = [validation, validation + test]
    held, tested, train = (np.sort(part) for part in np.split(shuffled, ends))
    return train, held, tested
