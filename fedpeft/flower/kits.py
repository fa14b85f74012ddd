"""Kits on their way to devices: the messages that bring them, and what a manifest says.

A kit is a folder with a manifest, ``kit.json``, whose SHA-256 is the kit's digest and whose "files" say the SHA-256 and
the size of every other file. The device says in each answer which bytes it lacks next, and takes these and no others:
so a chunk that is lost, late or sent twice does no harm, and a device that was switched off goes on where it was.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import RecordDict

from fedpeft.errors import ProtocolError
from fedpeft.flower import facts as read
from fedpeft.flower.packing import Json, Parcel, Tensor, glance, pack, unpack
from fedpeft.training.kit import MANIFEST, NAME, hashed

LARGEST_MANIFEST = 1 << 24
MOST_FILES = 64
KIT_QUERY = "query.kit"
"""The type of the messages that bring a kit."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_WHY = 500

Place = tuple[str, int]
"""A file of a kit, and the offset from which on its bytes are lacking; ("", 0) for none."""

WHOLE: Place = ("", 0)


class KitMissingError(Exception):
    """The run's kit is not here, and can be sent. digest: of the run's; has: of the one that is here, if any."""

    def __init__(self, digest: str, has: str = "") -> None:
        Exception.__init__(self, f"the run's kit, {digest[:16]}…, is not here")
        self.digest, self.has = digest, has


@dataclass(frozen=True, slots=True)
class Lack:
    """What a device answers that can't go on without bytes of a kit, or has got some.

    digest: of the kit; place: where its next bytes go; rest: the files of which it then lacks all, as far as it knows;
    has: the digest of the kit that is here, "" for none; why: what was wrong with what is asked for again.
    """

    digest: str
    place: Place
    rest: tuple[str, ...] = ()
    has: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Bytes of a file of a kit, from ``place`` on. size: of the whole file."""

    place: Place
    size: int
    content: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The pieces of a kit that come together, in their order."""

    digest: str
    pieces: tuple[Piece, ...]


def is_digest(name: str) -> bool:
    """Whether a text is a digest, as kits are named by."""
    return _DIGEST.fullmatch(name) is not None


def pack_lack(lack: Lack) -> RecordDict:
    """The answer of a device that lacks bytes of a kit, or has it whole."""
    facts: dict[str, Json] = {
        "digest": lack.digest,
        "place": list(lack.place),
        "rest": list(lack.rest),
        "has": lack.has,
        "why": lack.why[:_WHY],
    }
    return pack(Parcel("lack", facts, {}))


def is_lack(content: RecordDict) -> bool:
    """Whether an answer is one of ``pack_lack``. False for what can't be read."""
    try:
        return glance(content)[0] == "lack"
    except ProtocolError:
        return False


def unpack_lack(content: RecordDict) -> Lack:
    """The inverse of ``pack_lack``."""
    parcel = unpack(content, "lack")
    facts = parcel.facts
    read.exactly(facts, ("digest", "place", "rest", "has", "why"))
    read.none_left(parcel.tensors)
    digest, has, why = (read.text(facts, x) for x in ("digest", "has", "why"))
    rest = read.texts(facts, "rest")
    if len(rest) > MOST_FILES:
        raise ProtocolError(f"{len(rest)} files of a kit are lacking; want at most {MOST_FILES}")
    return Lack(digest_in(digest), _place(facts["place"]), tuple(map(_file, rest)), has[:64], why[:_WHY])


def pack_chunk(chunk: Chunk) -> RecordDict:
    """A message that brings bytes of a kit."""
    told: list[Json] = [[*x.place, x.size] for x in chunk.pieces]
    tensors = {str(i): x.content for i, x in enumerate(chunk.pieces)}
    return pack(Parcel("kit", {"digest": chunk.digest, "pieces": told}, tensors))


def unpack_chunk(content: RecordDict) -> Chunk:
    """The inverse of ``pack_chunk``."""
    parcel = unpack(content, "kit")
    facts, tensors = parcel.facts, dict(parcel.tensors)
    read.exactly(facts, ("digest", "pieces"))
    told = facts["pieces"]
    if not isinstance(told, list) or not 0 < len(told) <= MOST_FILES + 1:
        raise ProtocolError(f"a message of a kit has the pieces {str(told)[:60]}; want 1 to {MOST_FILES + 1}")
    pieces = tuple(_piece(row, tensors.pop(str(i), None)) for i, row in enumerate(told))
    read.none_left(tensors)
    return Chunk(digest_in(read.text(facts, "digest")), pieces)


def _piece(row: Json, content: Tensor | None) -> Piece:
    match row:
        case [file, offset, int(size)] if type(size) is int and size >= 0:
            place = _place([file, offset])
        case _:
            raise ProtocolError(f"a piece of a kit is {str(row)[:80]}; want [file, offset, size]")
    if content is None or content.dtype != np.uint8 or content.ndim != 1:
        raise ProtocolError("a piece of a kit has no content; want bytes")
    count = len(content)
    if place[1] + count > size or (not count and place[1] != size):
        raise ProtocolError(f"a piece of a kit has {count} bytes from {place[1]} on, of a file of {size}")
    return Piece(place, size, content)


def _place(said: Json) -> Place:
    match said:
        case [file, int(offset)] if type(offset) is int and 0 <= offset <= read.LARGEST:
            return _file(file), offset
    raise ProtocolError(f"a place in a kit is {str(said)[:80]}; want [file, offset]")


def files_of(folder: Path) -> dict[str, tuple[str, int]]:
    """The files of a kit by its manifest, whose digest was checked. ProtocolError for what no kit's manifest says."""
    try:
        said = json.loads((folder / MANIFEST).read_bytes())["files"]
        files = {_file(name): (digest_in(sha), int(size)) for name, (sha, size) in said.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtocolError(f"the kit's manifest says no files: {type(error).__name__}: {str(error)[:80]}") from None
    if (
        not files
        or len(files) > MOST_FILES
        or MANIFEST in files
        or "" in files
        or min(x for _, x in files.values()) < 0
    ):
        raise ProtocolError(
            f"the kit's manifest has files {sorted(files)[:5]}; want 1 to {MOST_FILES} others than itself"
        )
    return files


def manifest_of(folder: Path) -> tuple[str, Mapping[str, int]]:
    """The digest of the kit in a folder, and the bytes of each of its files, its manifest first."""
    sizes = {MANIFEST: (folder / MANIFEST).stat().st_size}
    return hashed(folder / MANIFEST), sizes | {name: size for name, (_, size) in files_of(folder).items()}


def digest_in(said: object) -> str:
    """A digest that the other side gave. ProtocolError for what is none."""
    if not isinstance(said, str) or not is_digest(said):
        raise ProtocolError(f"a digest is {str(said)[:70]!r}; want 64 hex digits")
    return said


def _file(said: object) -> str:
    if said == "":
        return ""
    if not isinstance(said, str) or not NAME.fullmatch(said) or said.endswith(".part"):
        raise ProtocolError(f"a file of a kit is called {str(said)[:80]!r}; want a plain name")
    return said
