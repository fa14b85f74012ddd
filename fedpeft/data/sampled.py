"""A partitioner for populations larger than the data: clients who draw their rows from the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from fedpeft.data.lazy import Lazy
from fedpeft.data.partition import Partitioner, at_least, labels_of, positive
from fedpeft.data.shares import dirichlet
from fedpeft.data.table import Rows, Table
from fedpeft.errors import ConfigError
from fedpeft.rounds import derive


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Rows that clients draw from. by_label: the same, label by label (all together where labels don't matter)."""

    rows: Rows
    by_label: tuple[Rows, ...]

    @classmethod
    def of(cls, table: Table, rows: Rows, by_label: bool) -> Self:
        """These rows of a table. Raises ConfigError where they should be by label and have none."""
        if not by_label:
            return cls(rows, (rows,))
        labels = labels_of(table, "sampled with alpha")[rows]
        return cls(rows, tuple(rows[labels == label] for label in range(len(table.classes))))


@dataclass(frozen=True, slots=True)
class Sampled(Partitioner):
    """Any number of clients, each with rows of its own draw: for more clients than the data would make.

    A client has ``size`` rows, or from ``size`` to ``largest``, all as likely. The rows of one client differ; two
    clients may have the same ones. With ``alpha`` the client's labels are a mixture from Dirichlet(alpha · K · p) over
    the K labels, p their shares of the rows, so that ``alpha`` means what it does where labels are equally common:
    small for one-sided clients; what a label has too few rows for is drawn from all of them. Without it rows are
    drawn uniformly. A client's rows follow from the seed and its number alone, and cost no more with more clients.
    Source: Hsu et al., arXiv:1909.06335, section 4.1 (mixtures of labels by client).
    """

    clients: int = 1000
    size: int = 32
    largest: int | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        at_least("clients", self.clients, 1)
        at_least("size", self.size, 1)
        if self.largest is not None:
            at_least("largest", self.largest, self.size)
        if self.alpha is not None:
            positive("alpha", self.alpha)

    @property
    @override
    def fewest(self) -> int:
        return self.size

    @property
    def most(self) -> int:
        """The most rows that any client gets."""
        return self.size if self.largest is None else self.largest

    @override
    def assign(self, table: Table, rng: np.random.Generator) -> Sequence[Rows]:
        pool = Pool.of(table, np.arange(len(table)), self.alpha is not None)
        self.check(self.most, pool, "different rows to draw from")
        seed = int(rng.integers(1 << 63))
        return Lazy(self.clients, lambda client: self.draw(pool, pool, self.count(client, seed), client, 0, seed))

    def count(self, client: int, seed: int) -> int:
        """How many rows a client has."""
        return self.size if self.most == self.size else int(_rng(seed, client, 0).integers(self.size, self.most + 1))

    def draw(self, pool: Pool, prior: Pool, count: int, client: int, part: int, seed: int) -> Rows:
        """So many different rows of the pool for one client, ascending.

        prior: whose shares of labels the mixture is drawn around, the same for all parts of a client, so that they
        have one mixture.
        """
        if not count:
            return pool.rows[:0]
        rng = _rng(seed, client, 2, part)
        sizes = np.array([len(rows) for rows in pool.by_label])
        wanted = np.minimum(sizes, rng.multinomial(count, self._mixture(prior, client, seed)))
        found = np.concatenate(
            [rows[rng.choice(len(rows), n, replace=False)] for rows, n in zip(pool.by_label, wanted, strict=True) if n]
            or [pool.rows[:0]]
        )
        if len(found) < count:
            others = np.setdiff1d(pool.rows, found)
            found = np.concatenate([found, rng.choice(others, count - len(found), replace=False)])
        return np.sort(found)

    def check(self, count: int, pool: Pool, what: str) -> None:
        """Raise ConfigError if a client would need more rows than there are."""
        if count > len(pool.rows):
            key = "size" if self.largest is None else "largest"
            raise ConfigError(
                f"partition.{key}: got {self.most}, for which a client needs {count} {what}; there are "
                f"{len(pool.rows)}: want fewer, or more data"
            )

    def _mixture(self, pool: Pool, client: int, seed: int) -> NDArray[np.float64]:
        sizes = np.array([len(rows) for rows in pool.by_label], np.float64)
        if self.alpha is None:
            return np.ones(1)
        here = sizes > 0
        shares: NDArray[np.float64] = np.zeros(len(sizes))
        alphas = self.alpha * np.count_nonzero(here) * sizes[here] / sizes.sum()
        shares[here] = dirichlet(alphas, len(alphas), _rng(seed, client, 1))
        shares /= shares.sum()
        return shares


def _rng(seed: int, *path: int) -> np.random.Generator:
    return np.random.default_rng(derive(seed, "partition", *path))
