"""Visits to devices as rows of numbers, and back."""

from collections.abc import Sequence

from fedpeft.rounds import FATES, Visit


def as_rows(visits: Sequence[Visit]) -> list[list[float]]:
    """A row [client, asked, began, ended, fate] a visit; the fate by its place in ``FATES``."""
    return [[x.client, x.asked, x.began, x.ended, FATES.index(x.fate)] for x in visits]


def of_rows(rows: Sequence[Sequence[float]]) -> tuple[Visit, ...]:
    """The inverse of ``as_rows``."""
    return tuple(Visit(int(c), asked, began, ended, FATES[int(fate)]) for c, asked, began, ended, fate in rows)
