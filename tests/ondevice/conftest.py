"""Kits made by hand, and federations of their words."""

import numpy as np
import pytest

from fedpeft.data import Federation, Table
from fedpeft.training.kit import Kit
from tests.ondevice.small_kit import CLASSES, write


@pytest.fixture(scope="session")
def kits(tmp_path_factory) -> dict[str, Kit]:
    """A kit of each task."""
    return {task: write(tmp_path_factory.mktemp(task), task) for task in ("classify", "lm")}


@pytest.fixture(scope="session")
def federations() -> dict[str, Federation]:
    """For each task two clients with 9 and 7 rows of unequal lengths, and 4 rows for the central test; client 1 also
    has two for validation."""
    rng = np.random.default_rng(3)

    def text() -> str:
        return " ".join(rng.choice(list("abcdefghijkl"), rng.integers(1, 9)))

    texts, replies = tuple(text() for _ in range(22)), tuple(text() for _ in range(22))
    rows, none = np.arange(22), np.arange(0)
    return {
        table.task: Federation(
            table, ("zero", "one"), (rows[:9], rows[9:16]), (none, rows[16:18]), (none, none), rows[18:]
        )
        for table in (Table("classify", texts, rng.integers(0, 3, 22), CLASSES), Table("lm", texts, replies))
    }
