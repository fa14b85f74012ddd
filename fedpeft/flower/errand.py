"""What brings one device its kit: which bytes it lacks, and how many go into a message."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import RecordDict

from fedpeft.errors import ProtocolError
from fedpeft.flower.kits import Chunk, Lack, Piece, Place, pack_chunk
from fedpeft.training.kit import MANIFEST

_MIB = 1 << 20
SMALLEST, FIRST, LARGEST = _MIB // 4, 4 * _MIB, 16 * _MIB
"""Bytes of a chunk. A SuperNode takes seconds for any message, and a slow link minutes for many bytes."""
QUICK, SLOW = 30.0, 120.0
"""Seconds of a chunk's trip below which the next is twice as large, and above which it is half as large."""


@dataclass(slots=True)
class Errand:
    """To one node. place, rest: which bytes it lacks; began: when it first said so; chunk: bytes of the next message.

    message: the id of the one under way, "" for none; sent: when; failed: messages in a row that brought it no further;
    damaged: how often a file came damaged; messages, bytes: so far; held: the ids of what it was asked meanwhile.
    """

    node: int
    place: Place
    rest: tuple[str, ...]
    began: float
    chunk: int = FIRST
    message: str = ""
    sent: float = 0.0
    failed: int = 0
    damaged: int = 0
    messages: int = 0
    bytes: int = 0
    held: list[str] = field(default_factory=list[str])

    def packed(self, folder: Path, digest: str, sizes: Mapping[str, int]) -> RecordDict:
        """The next message, of the kit in a folder. sizes: of its files. ProtocolError for bytes that it doesn't have;
        OSError where they can't be read."""
        room, place, pieces = self.chunk, self.place, list[Piece]()
        rest = iter(self.rest if place[0] != MANIFEST else [x for x in sizes if x != MANIFEST])
        while place[0]:
            piece = _piece(folder, place, sizes.get(place[0]), room)
            room -= len(piece.content)
            pieces.append(piece)
            is_done = place[1] + len(piece.content) == piece.size
            place = (next(rest, ""), 0) if is_done and room > 0 else ("", 0)
        self.bytes += self.chunk - room
        return pack_chunk(Chunk(digest, tuple(pieces)))

    def went_on(self, lack: Lack, seconds: float) -> None:
        """A message came after so many seconds, and this is what is still lacking."""
        self.place, self.rest, self.failed = lack.place, lack.rest, 0
        if seconds < QUICK:
            self.chunk = min(2 * self.chunk, LARGEST)
        elif seconds > SLOW:
            self.chunk = max(self.chunk // 2, SMALLEST)

    def was_lost(self) -> None:
        """A message did not come: the next is smaller."""
        self.message, self.failed = "", self.failed + 1
        self.chunk = max(self.chunk // 2, SMALLEST)


def _piece(folder: Path, place: Place, size: int | None, room: int) -> Piece:
    file, offset = place
    if size is None or offset > size:
        raise ProtocolError(f"it asks for {file[:80]!r} from byte {offset} on, which the kit does not have")
    path, count = folder / file, min(room, size - offset)
    content = np.fromfile(path, np.uint8, count, offset=offset) if count else np.zeros(0, np.uint8)
    if len(content) != count:
        raise ProtocolError(f"the coordinator's {path} was cut off while it was sent")
    return Piece(place, size, content)
