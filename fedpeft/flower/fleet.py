"""Who takes part in a run, and how each is reached."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from flwr.serverapp import Grid

from fedpeft.adapters import Adapter, Layout
from fedpeft.channel import Codec, Coding
from fedpeft.flower.arrivals import Arrivals
from fedpeft.flower.post import Letter, Traffic
from fedpeft.flower.registry import Registry
from fedpeft.flower.shipping import Shipping
from fedpeft.flower.versions import Versions
from fedpeft.rounds import WHOLE
from fedpeft.rules import Rule

Clock: TypeAlias = Callable[[], float]
Sleep: TypeAlias = Callable[[float], None]
_NAP = 0.5


@dataclass(frozen=True, slots=True)
class InOrder(Mapping[int, int]):
    """Clients 0 to ``clients`` - 1 at nodes 1 to ``clients``, as an in-process grid numbers them."""

    clients: int

    def __getitem__(self, client: int) -> int:
        if not 0 <= client < self.clients:
            raise KeyError(client)
        return client + 1

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.clients))

    def __len__(self) -> int:
        return self.clients


@dataclass(frozen=True, slots=True, eq=False)
class AsRegistered(Mapping[int, int]):
    """The clients that are here now, ascending, at the nodes that the registry has for them."""

    registry: Registry

    def __getitem__(self, client: int) -> int:
        node = self.registry.node(client)
        if node is None:
            raise KeyError(client)
        return node

    def __iter__(self) -> Iterator[int]:
        return self.registry.clients()

    def __len__(self) -> int:
        return self.registry.present()


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """The digests of the constants that one client holds."""

    registry: Registry
    client: int

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, str) and self.registry.has(self.client, digest)

    def add(self, digest: str) -> None:
        """It was found to hold these; "" is for no constants."""
        if digest and digest not in self:
            self.registry.hold(self.client, digest)


@dataclass(frozen=True, slots=True)
class Holdings:
    """Which constants each client holds, which grows as they are sent."""

    registry: Registry

    def __getitem__(self, client: int) -> Held:
        return Held(self.registry, client)


def _whole(client: int, round: int) -> int:
    return WHOLE


@dataclass(frozen=True, slots=True, eq=False)
class Fleet:
    """A run's clients, and how to reach them.

    nodes: the Flower node of each client that is here; base: the fingerprint that they share; settings: what every
    request carries, so that a node can build itself from it; registry: what is known of each client; start: the
    adapter before any training, where it was asked for; refused: who can't take part, and why, when it began;
    central: a client whose node holds the central test set; arrivals: who comes and goes while the run goes on, None
    where nobody does; rank: of a client in a round; up: the codec of answers, and versions: what the adapter travels
    as, None where nothing is coded.
    """

    grid: Grid
    rule: Rule
    settings: str
    base: str
    nodes: Mapping[int, int]
    registry: Registry
    start: Adapter | None = None
    refused: tuple[str, ...] = ()
    traffic: Traffic = field(default_factory=Traffic)
    clock: Clock = time.monotonic
    sleep: Sleep = time.sleep
    holds_central: bool = False
    arrivals: Arrivals | None = None
    rank: Callable[[int, int], int] = _whole
    up: Codec | None = None
    versions: Versions | None = None

    @property
    def holds(self) -> Holdings:
        """Which constants each client holds."""
        return Holdings(self.registry)

    @property
    def central(self) -> int | None:
        """The client with the lowest number here whose node holds the central test set, if any does."""
        if self.arrivals is None:
            return min(self.nodes, default=None) if self.holds_central else None
        return self.registry.central()

    @property
    def known(self) -> int:
        """How many clients take part in this run, whether they are here now or not."""
        return len(self.nodes) if self.arrivals is None else self.registry.known()

    def clients(self) -> Sequence[int]:
        """The clients that are here now, ascending: a range where they have no gaps, which takes no memory."""
        count = len(self.nodes)
        if isinstance(self.nodes, InOrder):
            return range(count)
        here = tuple(self.nodes)
        return range(count) if here == tuple(range(count)) else here

    def coding(self, layout: Layout) -> Coding | None:
        """How answers of this layout are coded; None where they are not."""
        return None if self.up is None else Coding(self.up, layout)

    def beside(self) -> Traffic:
        """What was sent and came beside rounds since this was last asked: a kit, to devices that lack it."""
        return self.grid.take_traffic() if isinstance(self.grid, Shipping) else Traffic()

    def found(self, letter: Letter) -> None:
        """A client has answered this letter, and so it holds what that brought."""
        self.holds[letter.client].add(letter.digest)
        if self.versions is not None and letter.version is not None:
            self.versions.hold(letter.client, *letter.version)

    def meet(self, least: int = 0, seconds: float = 0.0) -> tuple[str, ...]:
        """Let in who has come since, and let go who has gone; what is to be said of it, a line each.

        Nothing waits for a newcomer: it takes part once it has said what it can do. But below ``least`` clients this
        waits for more, for so many seconds at most.
        """
        if self.arrivals is None:
            return ()
        until = self.clock() + seconds
        told = list(self.arrivals.look())
        while len(self.nodes) < least and self.clock() < until:
            self.sleep(min(_NAP, max(until - self.clock(), 0.0)))
            told += self.arrivals.look()
        return tuple(told)
