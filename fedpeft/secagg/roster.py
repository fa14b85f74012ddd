"""Who may take part: a list of ids that admins have signed.

The server only passes it on. A client believes it because it bears signatures of admins whose keys are in the client's
own configuration; so a server can't make up clients and fill a cohort with them.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from fedpeft.errors import ProtocolError
from fedpeft.secagg.encoding import V, canonical, digest
from fedpeft.secagg.identity import ID_SIZE, SIGNATURE_SIZE, Identity, is_id, verify
from fedpeft.secagg.strict import Fields, hexed, parse

FORMAT = "fedpeft-sa/1/roster"
MOST_MEMBERS = 100_000
_MOST_BYTES = 64 << 20
_MOST_NAME = 200
_MOST_ADMINS = 100
_MOST_COUNT = (1 << 31) - 1
_MOST_TIME = 1 << 40  # seconds: far beyond any calendar
_KEYS = ("format", "version", "expires", "helper", "members", "signatures")


@dataclass(frozen=True, slots=True)
class Member:
    """One that may take part.

    id: 32 bytes; name: for people, no two alike; rank_cap: the largest rank that it may claim, None for any.
    """

    id: bytes
    name: str = ""
    rank_cap: int | None = None

    def __post_init__(self) -> None:
        if not is_id(self.id):
            raise ValueError(f"id: {self.id.hex()} is no Ed25519 public key; want what `fedpeft keys init` printed")
        if len(self.name) > _MOST_NAME or not self.name.isprintable():
            raise ValueError(f"name: got {self.name!r}; want printable text of at most {_MOST_NAME} characters")
        if self.rank_cap is not None and not 1 <= self.rank_cap <= _MOST_COUNT:
            raise ValueError(f"rank_cap: got {self.rank_cap}; want 1 or more, or none")


@dataclass(frozen=True, slots=True)
class Roster:
    """Members in order of their ids, and who has signed the list.

    helper: the X25519 public key of a second server's operator; expires: unix seconds from which the roster is stale;
    version: a number that grows with every list that is handed out; signatures: by the admin's id.
    """

    members: tuple[Member, ...]
    helper: bytes | None = None
    expires: float | None = None
    version: int = 1
    signatures: Mapping[bytes, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(sorted(self.members, key=lambda x: x.id)))
        if not 1 <= len(self.members) <= MOST_MEMBERS:
            raise ValueError(f"members: got {len(self.members)}; want 1 to {MOST_MEMBERS:,}")
        for one, next_ in zip(self.members, self.members[1:], strict=False):
            if one.id == next_.id:
                raise ValueError(f"members: {one.id.hex()} is listed twice; want each once")
        names: set[str] = set()
        for member in self.members:
            if member.name and member.name in names:
                raise ValueError(f"members: two are named {member.name!r}; want a name of its own for each, or none")
            names.add(member.name)
        if self.helper is not None and (len(self.helper) != ID_SIZE or not any(self.helper)):
            raise ValueError(f"helper: got {self.helper.hex()}; want an X25519 public key of {ID_SIZE} bytes")
        if self.expires is not None and not 0 <= self.expires <= _MOST_TIME:
            raise ValueError(f"expires: got {self.expires}; want unix seconds")
        if self.expires is not None:
            object.__setattr__(self, "expires", int(self.expires))  # whole seconds are what is signed
        if not 1 <= self.version <= _MOST_COUNT:
            raise ValueError(f"version: got {self.version}; want 1 or more")

    @property
    def ids(self) -> frozenset[bytes]:
        """Everyone who is in it."""
        return frozenset(x.id for x in self.members)

    @property
    def by_id(self) -> Mapping[bytes, Member]:
        """Each member by its id."""
        return {x.id: x for x in self.members}

    @property
    def fingerprint(self) -> str:
        """What admins compare before they sign: a digest in hex of all that is signed."""
        return digest("roster", self._signed_part()).hex()

    def signed(self, admin: Identity) -> Self:
        """The roster with this admin's signature beside those it has."""
        own = admin.sign(V + b"roster" + self._signed_part())
        return replace(self, signatures={**self.signatures, admin.id: own})

    def check(self, pinned: Collection[bytes], now: float, least_version: int = 1, least_admins: int = 1) -> None:
        """Raise ProtocolError unless it is signed by admins that are trusted, unaltered since, and in force.

        pinned: the ids of admins that the client's own configuration names; now: unix seconds; least_admins: how many
        of them must have signed. Signatures of others count for nothing, and do no harm.
        """
        if self.expires is not None and now >= self.expires:
            raise ProtocolError(
                f"roster: version {self.version} has expired, {(now - self.expires) / 3600:.1f} hours ago; want one in "
                f"force: ask an admin for a new one, or set this machine's clock"
            )
        if self.version < least_version:
            raise ProtocolError(
                f"roster: got version {self.version}; want {least_version} or later: ask an admin for the latest"
            )
        if not self.signatures:
            raise ProtocolError("roster: nobody has signed it; want an admin's signature: `fedpeft keys sign`")
        trusted = sorted(set(self.signatures) & set(pinned))
        if not trusted:
            raise ProtocolError(
                f"roster: signed by {_list(self.signatures)}; want a pinned admin's, of {_list(pinned)}: have one of "
                f"them sign it, or pin another"
            )
        for admin in trusted:
            if not verify(admin, self.signatures[admin], V + b"roster" + self._signed_part()):
                raise ProtocolError(
                    f"roster: was altered since admin {admin.hex()} signed it; want it as signed: get it from the "
                    f"admin again, or have it signed again"
                )
        if len(trusted) < least_admins:
            raise ProtocolError(
                f"roster: signed by {len(trusted)} pinned admins, {_list(trusted)}; want {least_admins} of them, of "
                f"{_list(pinned)}"
            )

    def to_json(self) -> str:
        """The roster as a text file: one line a member, so that two can be compared."""
        body = self._body()
        members = ",\n  ".join(json.dumps(x) for x in body["members"])
        rest = {k: v for k, v in body.items() if k != "members"}
        rest["signatures"] = {k.hex(): v.hex() for k, v in sorted(self.signatures.items())}
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in rest.items()]
        return "{\n" + ",\n".join([*lines, f'"members": [\n  {members}\n]']) + "\n}\n"

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        """The roster that ``to_json`` wrote. ProtocolError, naming the key, for anything else; ``check`` is apart."""
        found = Fields.of(parse(data, _MOST_BYTES, "roster"), "roster", _KEYS)
        if found.text("format", _MOST_NAME) != FORMAT:
            raise ProtocolError(f"roster.format: got {found.found['format']!r}; want {FORMAT!r}")
        helper = found.optional("helper", lambda key: found.hexed(key, ID_SIZE))
        signatures = found.table("signatures", _MOST_ADMINS, _signature)
        try:
            return cls(
                members=found.array("members", MOST_MEMBERS, _member),
                helper=None if helper is None else bytes.fromhex(helper),
                expires=found.optional("expires", lambda key: found.whole(key, 0, _MOST_TIME)),
                version=found.whole("version", 1, _MOST_COUNT),
                signatures={bytes.fromhex(k): v for k, v in signatures.items()},
            )
        except ValueError as error:
            raise ProtocolError(f"roster.{error}") from None

    def _signed_part(self) -> bytes:
        return canonical(self._body())

    def _body(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": self.version,
            "expires": self.expires,
            "helper": None if self.helper is None else self.helper.hex(),
            "members": [{"id": x.id.hex(), "name": x.name, "rank_cap": x.rank_cap} for x in self.members],
        }


def _member(value: object, name: str) -> Member:
    found = Fields.of(value, name, ("id", "name", "rank_cap"))
    try:
        return Member(
            bytes.fromhex(found.hexed("id", ID_SIZE)),
            found.text("name", _MOST_NAME),
            found.optional("rank_cap", lambda key: found.whole(key, 1, _MOST_COUNT)),
        )
    except ValueError as error:
        raise ProtocolError(f"{name}.{error}") from None


def _signature(admin: str, value: object, name: str) -> bytes:
    hexed(admin, ID_SIZE, f"{name}, the admin")
    return bytes.fromhex(hexed(value, SIGNATURE_SIZE, name))


def _list(ids: Collection[bytes]) -> str:
    return ", ".join(x.hex() for x in sorted(ids)) or "nobody"
