"""How much one client counts in the mean."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import sqrt

from typing_extensions import override


def _check_cap(cap: int) -> None:
    if cap < 1:
        raise ValueError(f"cap: got {cap}; want at least 1")


class Weighting(ABC):
    """A client's weight, from what it trained on; the server refuses a weight above ``largest``."""

    @property
    @abstractmethod
    def largest(self) -> float:
        """The most that one client may claim."""

    @abstractmethod
    def weight(self, examples: float) -> float:
        """The weight of a client that trained on this many distinct examples."""


@dataclass(frozen=True, slots=True)
class Examples(Weighting):
    """The number of examples, at most ``cap``.  Source: McMahan et al., arXiv:1602.05629, algorithm 1."""

    cap: int = 100_000

    def __post_init__(self) -> None:
        _check_cap(self.cap)

    @property
    @override
    def largest(self) -> float:
        return float(self.cap)

    @override
    def weight(self, examples: float) -> float:
        return float(min(examples, self.cap))


@dataclass(frozen=True, slots=True)
class SquareRoot(Weighting):
    """The square root of the number of examples, at most ``√cap``: between uniform and by examples."""

    cap: int = 100_000

    def __post_init__(self) -> None:
        _check_cap(self.cap)

    @property
    @override
    def largest(self) -> float:
        return sqrt(self.cap)

    @override
    def weight(self, examples: float) -> float:
        return sqrt(min(examples, self.cap))


@dataclass(frozen=True, slots=True)
class Uniform(Weighting):
    """One for every client: what differential privacy asks for."""

    @property
    @override
    def largest(self) -> float:
        return 1.0

    @override
    def weight(self, examples: float) -> float:
        return 1.0
