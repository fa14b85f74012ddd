"""Who cheated: found out by the server, or between two clients of whom one must be lying."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Blame:
    """What was found out in a session.

    A client that can't open what another dealt accuses it, and nobody else can tell which of the two is to blame. So an
    accusation is an edge between the two, and whoever of the two has more edges is named: a dealer of bad shares has
    one for each holder, a liar has one in all, since a refusal ends its session. Of one edge each, neither is named.
    Clients that conspire can so name an honest one with two lies; it's then left out, and nothing of it is learnt.
    """

    _found: dict[bytes, str] = field(default_factory=dict)
    _edges: set[frozenset[bytes]] = field(default_factory=set)

    def find(self, id_: bytes, text: str) -> None:
        """The server has seen this one cheat. What was found first stays."""
        self._found.setdefault(id_, text)

    def accuse(self, by: bytes, whom: bytes) -> None:
        """One client can't accept what another has sent it."""
        self._edges.add(frozenset((by, whom)))

    @property
    def culprits(self) -> Mapping[bytes, str]:
        """Who did what."""
        open_ = [edge for edge in self._edges if not edge & self._found.keys()]
        edges = Counter(one for edge in open_ for one in edge)
        named = dict(self._found)
        for edge in open_:
            one, other = sorted(edge, key=lambda x: (edges[x], x))
            if edges[other] > edges[one]:
                named[other] = f"is in {edges[other]} conflicts over what was dealt, the most of those concerned"
        return named
