"""Key and roster files: made, read and signed, each error naming the file.

A key file is PEM (PKCS #8) of an Ed25519 private key, readable by its owner alone; a roster file is JSON.
"""

import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from fedpeft.errors import DataError, ProtocolError
from fedpeft.secagg.helper import HelperKey
from fedpeft.secagg.identity import ID_SIZE, SEED_SIZE, Identity, is_id
from fedpeft.secagg.roster import Member, Roster

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_MOST_BYTES = 64 << 20
_PRIVATE = b"PRIVATE KEY"


def make_identity(path: Path, entropy: Callable[[int], bytes] = os.urandom) -> Identity:
    """A fresh identity, whose private key is written to a new file that only its owner can read.

    Raises DataError where there is a file already: a key that was overwritten is gone, and its id with it.
    """
    made = Identity.of(entropy(SEED_SIZE))
    key = Ed25519PrivateKey.from_private_bytes(made.to_bytes())
    _write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    return made


def read_identity(path: Path) -> Identity:
    """The identity in a key file. Raises DataError for a file that others can read or change, or that has no key."""
    data = _read(path, secret=True)
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # whose texts are not repeated: the file is a secret
        raise DataError(f"{path}: no key that can be read; want the file that `fedpeft keys init` wrote") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise DataError(f"{path}: got a key of another kind; want Ed25519: `fedpeft keys init`")
    return Identity.of(key.private_bytes_raw())


def helper_key(identity: Identity) -> str:
    """The public key in hex that a roster names where the owner of this key file runs a helper."""
    return HelperKey.of(identity.to_bytes()).public.hex()


def collect(
    entries: Sequence[str], helper: str | None = None, expires: float | None = None, version: int = 1
) -> Roster:
    """An unsigned roster. Raises DataError, naming the entry or the file and line.

    entries: ids in hex, each with a name before it where there is one ("kim=3f…"), or names of files that have one
    member a line: "ID", "ID NAME" or "ID NAME RANK_CAP"; # begins a remark. A file of one bare id gives its own name.
    helper: a helper's public key in hex; expires: unix seconds.
    """
    members = tuple(member for entry in entries for member in _members(entry))
    sealed_to = None if helper is None else _bytes(helper, "helper")
    try:
        return Roster(members, sealed_to, expires, version)
    except ValueError as error:
        raise DataError(f"roster.{error}") from None


def write_roster(roster: Roster, path: Path) -> None:
    """Write a roster to a new file. Raises DataError where there is one already: signatures on it would be lost."""
    _write_new(path, roster.to_json().encode(), 0o644)


def read_roster(path: Path) -> Roster:
    """The roster in a file, believed by nobody yet: see ``Roster.check``. Raises DataError."""
    data = _read(path)
    try:
        return Roster.from_json(data)
    except ProtocolError as error:
        raise DataError(f"{path}: {error}") from None


def sign_roster(path: Path, key: Path, now: float) -> Roster:
    """The roster of a file with the signature of a key file's owner beside those it has; the file is replaced.

    Raises DataError for one that is stale, was altered since another admin signed it, or has this signature already.
    """
    roster, admin = read_roster(path), read_identity(key)
    if admin.id in roster.signatures:
        raise DataError(f"{path}: {admin.id.hex()} has signed it already; have another admin sign it, or hand it out")
    signed = roster.signed(admin)
    try:
        signed.check(tuple(signed.signatures), now)
    except ProtocolError as error:
        raise DataError(f"{path}: {error}") from None
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    _write_new(beside, signed.to_json().encode(), 0o644)
    beside.replace(path)
    return signed


def described(path: Path) -> list[tuple[str, str]]:
    """What is to be known of a key or roster file, line by line. Raises DataError."""
    if _PRIVATE in _read(path):
        found = read_identity(path)
        return [("id", found.id.hex()), ("as a helper", helper_key(found))]
    return roster_lines(read_roster(path))


def roster_lines(roster: Roster) -> list[tuple[str, str]]:
    """What an admin reads before and after signing."""
    caps = [x for x in roster.members if x.rank_cap is not None]
    admins = sorted(x.hex() for x in roster.signatures)
    return [
        ("version", str(roster.version)),
        ("members", f"{len(roster.members):,}" + (f", {len(caps):,} with a largest rank" if caps else "")),
        ("helper", roster.helper.hex() if roster.helper else "none"),
        (
            "expires",
            "never" if roster.expires is None else f"{datetime.fromtimestamp(roster.expires, UTC):%Y-%m-%d %H:%M} UTC",
        ),
        ("fingerprint", roster.fingerprint),
        ("signed by", "\n".join(admins) or "nobody"),
    ]


def _members(entry: str) -> list[Member]:
    path = Path(entry)
    if not path.is_file():
        name, _, id_ = entry.rpartition("=")
        if "=" not in entry and not _is_hex(id_):
            raise DataError(f"{entry}: no such file, and no id; want a file of ids, an id in hex, or NAME=ID")
        return [_member(id_, name, None, entry)]
    data = _read(path)
    if _PRIVATE in data:
        raise DataError(f"{path}: is a private key, which its owner alone should have; want the id that `init` printed")
    try:
        lines = [(i, x.split("#")[0].split()) for i, x in enumerate(data.decode("utf8").splitlines(), 1)]
    except UnicodeDecodeError:
        raise DataError(f"{path}: is no text; want one member a line: ID NAME RANK_CAP") from None
    lines = [(i, x) for i, x in lines if x]
    if not lines:
        raise DataError(f"{path}: has no ids; want one member a line: ID NAME RANK_CAP")
    if len(lines) == 1 and len(lines[0][1]) == 1:
        return [_member(lines[0][1][0], path.stem, None, f"{path}")]
    return [_of_line(words, f"{path}, line {i}") for i, words in lines]


def _of_line(words: Sequence[str], where: str) -> Member:
    match words:
        case [id_]:
            return _member(id_, "", None, where)
        case [id_, name]:
            return _member(id_, name, None, where)
        case [id_, name, cap]:
            return _member(id_, name, cap, where)
    raise DataError(f"{where}: got {len(words)} words; want ID NAME RANK_CAP, the last two where there are any")


def _member(id_: str, name: str, cap: str | None, where: str) -> Member:
    if cap is not None and not (cap.isascii() and cap.isdigit()):
        raise DataError(f"{where}: got a rank_cap of {cap!r}; want a whole number")
    found = _bytes(id_, where)
    try:
        return Member(found, name, None if cap is None else int(cap))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


def _bytes(said: str, where: str) -> bytes:
    if len(said) != 2 * ID_SIZE or not _is_hex(said):
        raise DataError(f"{where}: got {said[:80]!r}; want {2 * ID_SIZE} characters of hex: what `keys init` printed")
    return bytes.fromhex(said)


def pinned(said: str, where: str) -> bytes:
    """An admin's id of a configuration. Raises DataError, naming where it is."""
    found = _bytes(said, where)
    if not is_id(found):
        raise DataError(f"{where}: {said} is no Ed25519 public key; want what `fedpeft keys init` printed")
    return found


def _is_hex(said: str) -> bool:
    return said.isascii() and all(x in "0123456789abcdefABCDEF" for x in said)


def _read(path: Path, secret: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if secret and os.name == "posix" and mode & _OTHERS:
                raise DataError(
                    f"{path}: got permissions {stat.S_IMODE(mode):04o}, so that others can read or change this key; "
                    f"want 0600: `chmod 600 {path}`, and a new key if others had access"
                )
            data = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise DataError(f"{path}: is larger than {_MOST_BYTES >> 20} MB; want a key or a roster")
    return data


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """A new file, never over another, on the disk before this returns."""
    if path.is_symlink() or path.exists():
        raise DataError(f"{path}: is there already, and is not overwritten; name another file, or move it away")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)  # nor where it came to be just now
    except OSError as error:
        raise DataError(f"{path}: can't be written: {error.strerror}") from None
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise DataError(f"{path}: can't be written: {error.strerror}") from None
