"""Where a device puts the kits that the coordinator sends, chunk by chunk, and finds them again."""

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flwr.app import RecordDict

from fedpeft.errors import DataError, ProtocolError
from fedpeft.flower.kits import (
    LARGEST_MANIFEST,
    WHOLE,
    Chunk,
    Lack,
    Piece,
    digest_in,
    files_of,
    is_digest,
    pack_lack,
    unpack_chunk,
)
from fedpeft.flower.packing import Tensor
from fedpeft.training.kit import MANIFEST, hashed
from fedpeft.training.room import hold, make_room


@dataclass(frozen=True, slots=True)
class Shelf:
    """A folder of kits by digest; what is whole lies under its digest, and what is on its way beside it.

    Processes of one machine may share it: they then fetch a kit in common. What is there is never sent to anybody.
    When a kit is to come, others make room that were used longest ago (``training.room``).
    """

    folder: Path

    def kit(self, digest: str) -> Path | None:
        """The folder of a kit that came whole, which then stays while this process runs; None if it did not."""
        folder = self.folder / digest
        return folder if is_digest(digest) and folder.is_dir() and hold(folder) else None

    def lacks(self, digest: str) -> Lack:
        """Which bytes of this kit are to come next."""
        return self._next(digest)

    def put(self, chunk: Chunk) -> Lack:
        """Keep these bytes, as far as they are the next ones: what is lacking then.

        DataError if they can't be written; what came before is then still there. ProtocolError for bytes of another
        file than the manifest's.
        """
        lack = self.lacks(chunk.digest)
        for piece in chunk.pieces:
            if lack.place != piece.place or lack.why:
                break
            lack = self._put(chunk.digest, piece)
        return lack if lack.why else self.lacks(chunk.digest)

    def _put(self, digest: str, piece: Piece) -> Lack:
        file, offset = piece.place
        try:
            self._check(digest, piece)
            with suppress(FileNotFoundError):  # another process has had the last of it, and moved the file
                _write(self._parts(digest) / f"{file}.part", offset, piece.content)
        except OSError as error:
            raise self._unwritten(error) from None
        return self._next(digest, piece.size if file == MANIFEST else None)

    def mend(self, digest: str) -> bool:
        """Whether a kit that is here was found damaged: then only its good files are kept, and the rest is lacking."""
        folder, parts = self.folder / digest, self._parts(digest)
        try:
            files = files_of(folder) if hashed(folder / MANIFEST) == digest else None
            bad = [f for f, told in (files or {}).items() if not _is_good(folder / f, *told)]
            if files is not None and not bad:
                return False
            shutil.rmtree(parts, ignore_errors=True)
            os.replace(folder, parts)
            for name in bad if files is not None else [MANIFEST]:
                (parts / name).unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritten(error) from None
        return True

    def _next(self, digest: str, size: int | None = None) -> Lack:
        """What is lacking. size: of the manifest, where that is known."""
        if self.kit(digest) is not None:
            return Lack(digest, WHOLE, has=digest)
        parts = self._parts(digest)
        if why := _settle(parts, MANIFEST, digest, size):
            return Lack(digest, (MANIFEST, 0), why=why)
        if not (parts / MANIFEST).exists():
            return Lack(digest, (MANIFEST, _size(parts / f"{MANIFEST}.part")))
        files = files_of(parts)
        for file, told in files.items():
            why = _settle(parts, file, *told)
            if not (parts / file).exists():
                lacking = [x for x in files if not (parts / x).exists()]
                return Lack(digest, (file, _size(parts / f"{file}.part")), tuple(lacking[1:]), why=why)
        with suppress(OSError):  # another process may have done it
            os.rename(parts, self.folder / digest)
        if self.kit(digest) is None:
            raise DataError(f"{parts}: can't be moved to {digest[:16]}…; want a folder that can be written")
        return Lack(digest, WHOLE, has=digest)

    def _check(self, digest: str, piece: Piece) -> None:
        """Refuse bytes that there is no room for, or of a file of another size than the manifest says."""
        parts, (file, offset) = self._parts(digest), piece.place
        parts.mkdir(parents=True, exist_ok=True)
        os.utime(parts)  # in use, as far as others can see: while a large file comes nothing else says so
        if file == MANIFEST:
            if piece.size > LARGEST_MANIFEST:
                raise ProtocolError(f"the kit's manifest has {piece.size} bytes; want at most {LARGEST_MANIFEST}")
            wanted = piece.size - offset
        else:
            files = files_of(parts)
            if files[file][1] != piece.size:
                raise ProtocolError(f"the kit's {file} has {piece.size} bytes; its manifest says {files[file][1]}")
            wanted = sum(size for f, (_, size) in files.items() if not (parts / f).exists()) - offset
            if not offset:
                make_room(self._kits(), wanted, parts)
        if (free := shutil.disk_usage(self.folder).free) < wanted:
            raise DataError(
                f"{self.folder}: has room for {free / 1e6:.0f} MB, and {wanted / 1e6:.0f} MB of the run's kit are to "
                f"come; want room there (kits of earlier runs may be deleted), or kits='FOLDER' in the node's config"
            )

    def _kits(self) -> list[Path]:
        """The kits here and those on their way; of a folder that is a user's, nothing else."""
        named = (x for x in self.folder.iterdir() if is_digest(x.name.removesuffix(".part")))
        return [x for x in named if (x / MANIFEST).is_file()]

    def _parts(self, digest: str) -> Path:
        return self.folder / f"{digest_in(digest)}.part"

    def _unwritten(self, error: OSError) -> DataError:
        return DataError(
            f"{self.folder}: {error.strerror or error}; want a folder with room that can be written: make room, or "
            f"give another with kits='FOLDER' in the node's config"
        )


def answer_kit(shelf: Shelf, content: RecordDict) -> RecordDict:
    """What a device answers to a message of a kit. Raises DataError, ProtocolError."""
    return pack_lack(shelf.put(unpack_chunk(content)))


def _settle(parts: Path, file: str, sha: str, size: int | None) -> str:
    """Move a file that is all there to its own name, if it is what the manifest says; else remove it: why.

    size: that it should have; where it is not known, what is not right yet may still become so.
    """
    path = parts / f"{file}.part"
    try:
        got = path.stat().st_size
        if (parts / file).exists() or (size is not None and got < size):
            return ""
        found = hashed(path) if size is None or got == size else f"that of {got} bytes"
        if found == sha:
            os.replace(path, parts / file)
        elif size is not None:
            path.unlink()
            return f"{file} came damaged: its SHA-256 is {found[:16]}…; want {sha[:16]}…"
    except FileNotFoundError:
        pass  # nothing of it is here yet, or another process was faster
    return ""


def _write(path: Path, offset: int, content: Tensor) -> None:
    """Write at an offset, not at the end: two processes that write the same bytes do no harm."""
    flags = os.O_RDWR | (os.O_CREAT if offset == 0 else 0)
    with open(os.open(path, flags, 0o644), "r+b") as stream:
        stream.seek(offset)
        stream.write(content.data)
        stream.flush()
        os.fsync(stream.fileno())


def _is_good(path: Path, sha: str, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size and hashed(path) == sha


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
