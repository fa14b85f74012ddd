"""Who has which rank: how many directions of each layer a client trains."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

from typing_extensions import override

from fedpeft.errors import ConfigError
from fedpeft.rounds.places import part_of, place
from fedpeft.rounds.seeds import derive

WHOLE = 1 << 30
"""A rank that no layer reaches: the client holds all directions that the server does."""


class Ranks(ABC):
    """A policy. A layer with fewer directions than a client's rank is trained whole."""

    @property
    def is_whole(self) -> bool:
        """Whether every client trains all directions."""
        return False

    @property
    def is_said(self) -> bool:
        """Whether each client says its own rank, from its data or its device."""
        return False

    @property
    def changes(self) -> bool:
        """Whether a client's rank may be another one in another round."""
        return False

    @property
    def named(self) -> Mapping[str, Sequence[int]]:
        """The ranks that the settings name, by their key."""
        return {}

    def check(self, clients: int) -> None:
        """Raise ConfigError, naming the key, where it can't be used with so many clients."""
        return

    @abstractmethod
    def of(self, client: int, clients: int, seed: int, round: int) -> int:
        """The rank of one of so many clients in a round. Raises ValueError where clients say their own."""


@dataclass(frozen=True, slots=True)
class Whole(Ranks):
    """Every client has the server's rank."""

    @property
    @override
    def is_whole(self) -> bool:
        return True

    @override
    def of(self, client: int, clients: int, seed: int, round: int) -> int:
        return WHOLE


@dataclass(frozen=True, slots=True)
class Levels(Ranks):
    """Each level for a share of the clients, exact but for rounding; the seed says who has which.

    shares: relative to one another, as many as there are levels (equal if left out); redraw: anew in every round, or
    else once.
    """

    levels: tuple[int, ...]
    shares: tuple[float, ...] = ()
    redraw: bool = False

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels: got none; want at least one rank")
        _positive("levels", self.levels)
        if self.shares and len(self.shares) != len(self.levels):
            raise ValueError(f"shares: got {len(self.shares)}; want {len(self.levels)}, one for each of levels")
        if not all(isfinite(x) and x >= 0 for x in self.shares) or (self.shares and not sum(self.shares) > 0):
            raise ValueError(f"shares: got {', '.join(f'{x:g}' for x in self.shares)}; want 0 or more, and not all 0")

    @property
    @override
    def changes(self) -> bool:
        return self.redraw

    @property
    @override
    def named(self) -> Mapping[str, Sequence[int]]:
        return {"levels": self.levels}

    @override
    def of(self, client: int, clients: int, seed: int, round: int) -> int:
        drawn = derive(seed, "rank", *((round,) if self.redraw else ()))
        where = place(client, clients, drawn)
        return self.levels[part_of(where, self.shares or (1.0,) * len(self.levels), clients)]


@dataclass(frozen=True, slots=True)
class Listed(Ranks):
    """Each client's rank as it is written down.

    by_client: a list, client 0 first, or a table of some clients' ranks by their numbers; rest: of clients that it
    does not name.
    """

    by_client: tuple[int, ...] | Mapping[str, object]
    rest: int | None = None

    def __post_init__(self) -> None:
        _positive("by_client", tuple(self._ranks.values()))
        if self.rest is not None:
            _positive("rest", (self.rest,))

    @property
    @override
    def named(self) -> Mapping[str, Sequence[int]]:
        return {"by_client": tuple(self._ranks.values()), "rest": () if self.rest is None else (self.rest,)}

    @property
    def _ranks(self) -> Mapping[int, int]:
        if not isinstance(self.by_client, Mapping):
            return dict(enumerate(self.by_client))
        found: dict[int, int] = {}
        for client, rank in self.by_client.items():
            if not str(client).isdecimal() or type(rank) is not int:
                raise ValueError(
                    f"by_client: got {client} = {rank!r}; want a client's number and its rank, such as 0 = 2"
                )
            found[int(client)] = rank
        return found

    @override
    def check(self, clients: int) -> None:
        ranks = self._ranks
        strange = max(ranks, default=-1)
        if strange >= clients:
            raise ConfigError(
                f"ranks.by_client: names client {strange}; there are {clients}, numbered from 0: leave it out"
            )
        if self.rest is None and len(ranks) < clients:
            missing = next(c for c in range(clients) if c not in ranks)
            raise ConfigError(
                f"ranks.by_client: has no rank for client {missing}, and names {len(ranks)} of {clients}; "
                f"want all of them, or ranks.rest for the others"
            )

    @override
    def of(self, client: int, clients: int, seed: int, round: int) -> int:
        found = self._ranks.get(client, self.rest)
        if found is None:
            raise ValueError(f"client {client} is not listed, and there is no rest; want either")
        return found


@dataclass(frozen=True, slots=True)
class Column(Ranks):
    """Each client's rank is in its own data: a column of the user's file, the same number in all of a client's rows.

    A deployed node may say ``rank`` in its node config instead.
    """

    column: str = "rank"

    def __post_init__(self) -> None:
        if not self.column.strip():
            raise ValueError(f"column: got {self.column!r}; want the name of a column of the data")

    @property
    @override
    def is_said(self) -> bool:
        return True

    @override
    def of(self, client: int, clients: int, seed: int, round: int) -> int:
        raise ValueError("each client says its own rank; want it asked")


@dataclass(frozen=True, slots=True)
class Memory(Ranks):
    """The largest level with which training fits the client's device; the smallest where none does.

    A simulated device has the ``memory`` of its kind; a deployed node says ``memory`` in its node config, or has all
    that its machine has; or it says its ``rank`` itself.
    """

    levels: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels: got none; want the ranks to choose from, such as [2, 4, 8]")
        _positive("levels", self.levels)

    @property
    @override
    def is_said(self) -> bool:
        return True

    @property
    @override
    def named(self) -> Mapping[str, Sequence[int]]:
        return {"levels": self.levels}

    @override
    def of(self, client: int, clients: int, seed: int, round: int) -> int:
        raise ValueError("each client says its own rank; want it asked")


def _positive(key: str, ranks: Sequence[int]) -> None:
    for rank in ranks:
        if rank < 1:
            raise ValueError(f"{key}: got {rank}; want ranks of at least 1")
