"""Checked access to a JSON object: what is missing or null reads as nothing, what has the wrong type is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpeft.errors import DataError


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one JSON object. where: file, line and key, for errors, which are DataError."""

    values: Mapping[str, Any]
    where: str

    @classmethod
    def of(cls, value: object, where: str) -> "Fields":
        """The fields of a parsed JSON value, which must be an object."""
        if not isinstance(value, Mapping):
            raise DataError(f"{where}: got {_short(value)}; want an object")
        return cls(value, where)

    def has(self, key: str) -> bool:
        """Whether there is a value that is not null."""
        return self.values.get(key) is not None

    def text(self, key: str) -> str:
        """The text at key; "" if there is none."""
        value = self.values.get(key)
        return "" if value is None else str(self._checked(key, value, str, "a text"))

    def claim(self, key: str) -> bool:
        """Whether there is a true at key."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise DataError(f"{self.where}, {key}: got {_short(value)}; want true or false")
        return value is True

    def number(self, key: str) -> float | None:
        """The number at key; None if there is none."""
        value = self.values.get(key)
        return None if value is None else float(self._checked(key, value, (int, float), "a number"))

    def whole(self, key: str) -> int | None:
        """The whole number at key; None if there is none."""
        value = self.number(key)
        if value is not None and not value.is_integer():
            raise DataError(f"{self.where}, {key}: got {value}; want a whole number")
        return None if value is None else int(value)

    def need_whole(self, key: str) -> int:
        """The whole number at key, which must be there."""
        value = self.whole(key)
        if value is None:
            raise DataError(f"{self.where}: no {key!r}; want a whole number there")
        return value

    def section(self, key: str) -> "Fields":
        """The object at key; an empty one if there is none."""
        value = self.values.get(key)
        return Fields.of({} if value is None else value, f"{self.where}, {key}")

    def sections(self) -> dict[str, "Fields"]:
        """All values, each an object, under keys that are whole numbers."""
        for key in self.values:
            if not key.isdecimal():
                raise DataError(f"{self.where}: got the key {key!r}; want a client's number")
        return {key: self.section(key) for key in self.values}

    def floats(self) -> dict[str, float]:
        """All values that are not null, each a number."""
        return {key: x for key in self.values if (x := self.number(key)) is not None}

    def texts(self) -> dict[str, str]:
        """All values, each a text."""
        return {key: self.text(key) for key in self.values}

    def wholes(self) -> dict[str, int | None]:
        """All values, each a whole number."""
        return {key: self.whole(key) for key in self.values}

    def numbers(self, key: str) -> list[float]:
        """The list of numbers at key; empty if there is none."""
        return [self._checked(key, x, (int, float), "numbers") for x in self._list(key)]

    def texts_in(self, key: str) -> list[str]:
        """The list of texts at key; empty if there is none."""
        return [self._checked(key, x, str, "texts") for x in self._list(key)]

    def rows(self, key: str, width: int) -> list[list[float]]:
        """The list at key of lists of so many numbers; empty if there is none."""
        rows = self._list(key)
        for row in rows:
            if not isinstance(row, list) or len(row) != width or not all(isinstance(x, int | float) for x in row):
                raise DataError(f"{self.where}, {key}: got {_short(row)}; want {width} numbers")
        return rows

    def objects(self, key: str) -> list["Fields"]:
        """The list of objects at key; empty if there is none."""
        return [Fields.of(x, f"{self.where}, {key}") for x in self._list(key)]

    def reasons(self, key: str) -> list[tuple[int, str]]:
        """The list at key of pairs of a client's number and a text; empty if there is none."""
        rows = self._list(key)
        for row in rows:
            if not isinstance(row, list) or [type(x) for x in row] != [int, str]:
                raise DataError(f"{self.where}, {key}: got {_short(row)}; want a client's number and a text")
        return [(client, reason) for client, reason in rows]

    def _list(self, key: str) -> list[Any]:
        value = self.values.get(key)
        return list(self._checked(key, [] if value is None else value, list, "a list"))

    def _checked(self, key: str, value: Any, kinds: type | tuple[type, ...], want: str) -> Any:
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise DataError(f"{self.where}, {key}: got {_short(value)}; want {want}")
        return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
