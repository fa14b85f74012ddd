"""JSON from somebody who may be hostile: one reading only, and an error for everything else.

Errors name the field, what was got and what is wanted, as ProtocolError.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from fedpeft.errors import ProtocolError

T = TypeVar("T")
MOST_VALUES = 400_000
"""Values in a text: the largest roster, of 100,000 members, has three each."""
_SHOWN = 60  # characters of a wrong value that an error repeats


def parse(data: bytes | str, most: int, what: str) -> Any:
    """The value that the text holds. ProtocolError for more than ``most`` bytes or ``MOST_VALUES``, what is no JSON, a
    key that stands twice in an object, a fraction, NaN or infinity, and nesting without end. what: names the text in
    errors.
    """
    if len(data) > most:
        raise ProtocolError(f"{what}: got {len(data):,} bytes; want at most {most:,}")
    commas = data.count(",") if isinstance(data, str) else data.count(b",")
    if commas > MOST_VALUES:  # before memory is taken: an empty object has 2 bytes here and 72 in memory
        raise ProtocolError(f"{what}: got {commas:,} values; want at most {MOST_VALUES:,}")
    try:
        return json.loads(data, object_pairs_hook=_object, parse_float=_fraction, parse_constant=_fraction)
    except (ValueError, RecursionError) as error:  # what is no UTF-8, and whole numbers of thousands of digits, too
        raise ProtocolError(f"{what}: not the JSON that is wanted: {str(error)[:200]}") from None


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one object, each asked for by what it must be. what: names the object in errors."""

    what: str
    found: Mapping[str, Any]

    @classmethod
    def of(cls, value: object, what: str, keys: Sequence[str]) -> "Fields":
        """An object that has exactly these keys."""
        if not isinstance(value, dict):
            raise ProtocolError(f"{what}: got {shown(value)}; want an object")
        for key in value:
            if key not in keys:
                raise ProtocolError(f"{what}.{shown(key)}: no such key; want {', '.join(keys)}")
        for key in keys:
            if key not in value:
                raise ProtocolError(f"{what}.{key}: is missing; want {', '.join(keys)}")
        return cls(what, value)

    def whole(self, key: str, least: int, most: int) -> int:
        """A whole number from ``least`` to ``most``."""
        return whole(self.found[key], least, most, f"{self.what}.{key}")

    def text(self, key: str, most: int) -> str:
        """Text of at most so many characters."""
        return text(self.found[key], most, f"{self.what}.{key}")

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.found[key]
        if not isinstance(value, bool):
            raise ProtocolError(f"{self.what}.{key}: got {shown(value)}; want true or false")
        return value

    def hexed(self, key: str, size: int) -> str:
        """So many bytes as lowercase hex."""
        return hexed(self.found[key], size, f"{self.what}.{key}")

    def optional(self, key: str, kind: Callable[[str], T]) -> T | None:
        """What ``kind`` makes of the key, or None where the value is null."""
        return None if self.found[key] is None else kind(key)

    def array(self, key: str, most: int, each: Callable[[object, str], T]) -> tuple[T, ...]:
        """A list of at most so many, each read by ``each``, which is given the value and its name."""
        return array(self.found[key], most, each, f"{self.what}.{key}")

    def table(self, key: str, most: int, each: Callable[[str, object, str], T]) -> dict[str, T]:
        """An object of at most so many keys, each read by ``each``, which is given key, value and name."""
        value, name = self.found[key], f"{self.what}.{key}"
        if not isinstance(value, dict):
            raise ProtocolError(f"{name}: got {shown(value)}; want an object")
        if len(value) > most:
            raise ProtocolError(f"{name}: got {len(value):,} entries; want at most {most:,}")
        return {k: each(k, x, f"{name}.{shown(k)}") for k, x in value.items()}


def array(value: object, most: int, each: Callable[[object, str], T], name: str) -> tuple[T, ...]:
    """A list of at most so many, each read by ``each``, which is given the value and its name."""
    if not isinstance(value, list):
        raise ProtocolError(f"{name}: got {shown(value)}; want a list")
    if len(value) > most:
        raise ProtocolError(f"{name}: got {len(value):,} entries; want at most {most:,}")
    return tuple(each(x, f"{name}[{i}]") for i, x in enumerate(value))


def whole(value: object, least: int, most: int, name: str) -> int:
    """A whole number from ``least`` to ``most``; true and false are none."""
    if type(value) is not int or not least <= value <= most:
        raise ProtocolError(f"{name}: got {shown(value)}; want a whole number from {least} to {most}")
    return value


def text(value: object, most: int, name: str) -> str:
    """Text of at most so many characters, all of them printable: none that moves a terminal's cursor."""
    if not isinstance(value, str) or len(value) > most or not value.isprintable():
        raise ProtocolError(f"{name}: got {shown(value)}; want printable text of at most {most} characters")
    return value


def hexed(value: object, size: int, name: str) -> str:
    """So many bytes as lowercase hex, which is the one way to write them."""
    if not isinstance(value, str) or len(value) != 2 * size or not set(value) <= set("0123456789abcdef"):
        raise ProtocolError(f"{name}: got {shown(value)}; want {2 * size} characters of lowercase hex")
    return value


def shown(value: object) -> str:
    """A value as an error repeats it: short and on one line."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    said = ascii(value)
    return said if len(said) <= _SHOWN else said[:_SHOWN] + "…"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return made


def _fraction(said: str) -> NoReturn:
    raise ValueError(f"a number that is not whole, {shown(said)}; want a decimal string")
