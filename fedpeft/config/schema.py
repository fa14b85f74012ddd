"""Plain values as dataclasses, with errors that name the key."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, Union, cast, get_args, get_origin, get_type_hints

from fedpeft.errors import ConfigError

Settings: TypeAlias = dict[str, Any]
"""An experiment as nested plain values: what TOML and JSON hold."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a name in the experiment file stands for: a dataclass, and the fields that the name settles.

    about: one line on it, where the class's own docstring is about more than this name.
    """

    cls: type[Any]
    settled: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""


def choose(section: str, choices: Mapping[str, Choice], given: Mapping[str, Any], default: str) -> tuple[Any, Settings]:
    """The object that a section with a ``name`` describes, and its plain values with every default."""
    name = given.get("name", default)
    if not isinstance(name, str) or name not in choices:
        raise ConfigError(f"{section}.name: got {name!r}; want one of {', '.join(sorted(choices))}")
    choice, rest = choices[name], {k: v for k, v in given.items() if k != "name"}
    for key in rest:
        others = [repr(n) for n, x in sorted(choices.items()) if key in _keys(x.cls, x.settled)]
        if others and key not in _keys(choice.cls, choice.settled):
            own = ", ".join(_keys(choice.cls, choice.settled)) or "no options"
            raise ConfigError(
                f"{section}.{key}: no such key; {name} has {own}; it goes with {section}.name = {' or '.join(others)}"
            )
    made = build(choice.cls, rest, section, choice.settled, f"{name} has ")
    return made, {"name": name} | {k: v for k, v in plain(made).items() if k not in choice.settled}


def build(
    cls: type[Any],
    given: Mapping[str, Any],
    section: str,
    settled: Mapping[str, Any] | None = None,
    owner: str = "it has ",
) -> Any:
    """An object of dataclass ``cls`` from plain values, each checked against its field's type."""
    settled = settled or {}
    hints = get_type_hints(cls)
    allowed = _keys(cls, settled)
    for key in given:
        if key not in allowed:
            raise ConfigError(
                f"{section}.{key}: no such key;{nearest(key, allowed)} {owner}{', '.join(allowed) or 'no options'}"
            )
    values = {key: check(f"{section}.{key}", value, hints[key]) for key, value in given.items()}
    for key, f in allowed.items():
        if key not in given and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{section}.{key}: is missing; want {_wanted(hints[key])}")
    try:
        return cls(**values, **settled)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{section}.{error}") from error


def _keys(cls: type[Any], settled: Mapping[str, Any]) -> dict[str, Field[Any]]:
    """The fields that a section of this class may set."""
    return {f.name: f for f in fields(cls) if f.init and f.name not in settled}


def plain(value: Any) -> Any:
    """Nested plain values of a settings object; what is not set is left out."""
    if is_dataclass(value):
        return {f.name: plain(x) for f in fields(value) if (x := getattr(value, f.name)) is not None}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


def section(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The section of this name, empty where the file has none."""
    value = settings.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: got {value!r}; want a section, such as [{key}]")
    return value


def check(key: str, value: Any, kind: Any) -> Any:
    """``value`` as ``kind``, or a ConfigError. int passes for float, a list for a tuple; nothing else is converted."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        kinds = [k for k in inner if k is not NoneType]
        for each in kinds[:-1]:
            try:
                return check(key, value, each)
            except ConfigError:
                continue
        return check(key, value, kinds[-1])
    if origin is Literal:
        if value in inner:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(check(key, x, inner[0]) for x in value)
    elif is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, Mapping | kind):
            return build(kind, value, key) if isinstance(value, Mapping) else value
    elif kind is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if isinstance(value, Mapping):
            return dict(value)
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif type(value) is kind:
        return value
    raise ConfigError(f"{key}: got {value!r}; want {_wanted(kind)}")


_MANY = {"a whole number": "whole numbers", "a number": "numbers"}


def _wanted(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_wanted(k) for k in inner if k is not NoneType)
    if origin is Literal:
        return "one of " + ", ".join(repr(x) for x in inner)
    if origin is tuple:
        each = _wanted(inner[0])
        return f"a list of {_MANY.get(each, each)}"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(cast(Any, kind), "a table")


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint at the known name that is most like ``key``, or nothing."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f" did you mean {close[0]}?" if close else ""
