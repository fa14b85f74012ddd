"""What a client brings to secure aggregation, from its own file: who it is, whom it believes, what it agrees to."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.config.schema import build, nearest, section
from fedpeft.errors import ConfigError, DataError, ProtocolError
from fedpeft.run.keys import pinned, read_identity, read_roster
from fedpeft.secagg.identity import Identity
from fedpeft.secagg.roster import Roster
from fedpeft.secagg.terms import Policy

_SECTIONS = ("trust", "policy")


@dataclass(frozen=True, slots=True)
class Trust:
    """The section [trust] of a client's file; files are beside it unless their names say otherwise.

    identity: its key file; roster: the roster's; admins: ids of whom it believes a roster; least_admins: how many of
    them must have signed; least_version: of the roster.
    """

    identity: str
    roster: str
    admins: tuple[str, ...]
    least_admins: int = 1
    least_version: int = 1

    def __post_init__(self) -> None:
        if not self.admins:
            raise ValueError(
                "admins: got none; want the id of at least one admin: without, anybody could sign a roster"
            )
        if len(set(self.admins)) != len(self.admins):
            raise ValueError("admins: one is listed twice; want each once")
        if not 1 <= self.least_admins <= len(self.admins):
            raise ValueError(
                f"least_admins: got {self.least_admins}; want 1 to {len(self.admins)}, as many as are named"
            )
        if self.least_version < 1:
            raise ValueError(f"least_version: got {self.least_version}; want 1 or more")


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client brings. Whether the roster is in force is checked again in every session, since time passes."""

    identity: Identity
    roster: Roster
    policy: Policy
    admins: frozenset[bytes]
    least_admins: int = 1
    least_version: int = 1

    def check(self, now: float) -> None:
        """Raise ProtocolError unless the roster is in force and has this client in it. now: unix seconds."""
        self.roster.check(self.admins, now, self.least_version, self.least_admins)
        if self.identity.id not in self.roster.ids:
            raise ProtocolError(
                f"roster: version {self.roster.version} has no member {self.identity.id.hex()}, which this client is; "
                f"want it in there: ask an admin, or name another key file"
            )


def read_credentials(path: Path, now: float, identity: Path | None = None) -> Credentials:
    """What a client's file says, checked as far as it can be before a session. now: unix seconds.

    identity: a key file in place of the one that is named, so that clients on one machine can share a file. Raises
    ConfigError, naming file and key; DataError for a key or roster file.
    """
    settings = _load(path)
    try:
        for key in settings:
            if key not in _SECTIONS:
                raise ConfigError(f"{key}: no such section;{nearest(key, _SECTIONS)} want [trust] and [policy]")
        trust: Trust = build(Trust, section(settings, "trust"), "trust")
        policy = policy_of(section(settings, "policy"))
        admins = frozenset(pinned(x, f"trust.admins[{i}]") for i, x in enumerate(trust.admins))
    except (ConfigError, DataError) as error:
        raise ConfigError(f"{path}: {error}") from None
    found = Credentials(
        read_identity(identity or path.parent / trust.identity),
        read_roster(path.parent / trust.roster),
        policy,
        admins,
        trust.least_admins,
        trust.least_version,
    )
    try:
        found.check(now)
    except ProtocolError as error:
        raise DataError(f"{path.parent / trust.roster}: {error}") from None
    return found


def policy_of(settings: Mapping[str, Any]) -> Policy:
    """The policy that plain values describe. Raises ConfigError naming the key, such as ``policy.min_cohort``."""
    made: Policy = build(Policy, settings, "policy")
    if "mock" in made.suites:
        raise ConfigError("policy.suites: got 'mock', which hides nothing and is for tests; want protocols that do")
    return made


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; want a client's [trust] and [policy] in TOML") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: can't be read as TOML: {error}") from error
