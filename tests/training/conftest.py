"""Small tables of each task, and federations of them."""

import numpy as np
import pytest

from fedpeft.data import Federation, Table


@pytest.fixture
def sentences() -> Table:
    """30 texts of different lengths in 3 classes, which the first word tells."""
    first = ("red", "green", "blue")
    texts = tuple(f"{first[i % 3]} {'thing ' * (i % 5)}{i * i}" for i in range(30))
    return Table("classify", texts, np.arange(30) % 3, first)


@pytest.fixture
def dialogues() -> Table:
    """14 prompts, each with a reply of another length."""
    return Table("lm", tuple(f"say {i}" for i in range(14)), tuple("yes " * (1 + i % 6) + str(i) for i in range(14)))


@pytest.fixture
def pictures() -> Table:
    """15 grey images of 14 × 14 pixels in 3 classes, lighter from class to class."""
    noise = np.random.default_rng(5).integers(0, 60, (15, 14, 14))
    labels = np.arange(15) % 3
    return Table("image", (noise + 80 * labels[:, None, None]).astype(np.uint8), labels, ("dark", "grey", "light"))


@pytest.fixture
def share():
    """A function (table, sizes) -> Federation: clients with so many training rows each, the last rows being central.

    Of what is left, the first row is the first client's for validation; clients have no test rows.
    """

    def make(table: Table, *sizes: int) -> Federation:
        rows, none = np.arange(len(table)), np.arange(0)
        *train, rest = np.split(rows, np.cumsum(sizes))
        validation = (rest[:1], *[none] * (len(sizes) - 1))
        names = tuple(f"client {i}" for i in range(len(sizes)))
        return Federation(table, names, tuple(train), validation, (none,) * len(sizes), rest[1:])

    return make
