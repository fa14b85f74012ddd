"""What a client keeps between messages: state by round, and constants by digest."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise

from fedpeft.errors import DataError

State = Mapping[str, NDArray[Any]]
_KEPT = 3
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"round-(\d{6,})\.safetensors")


@dataclass(frozen=True, slots=True)
class ClientStore:
    """State on disk under ``folder``, written atomically, or in this process's memory if there is none.

    Of each client the three newest rounds are kept, so that a run that was killed, and goes on from the
    last checkpoint or the one before it, finds the state from before that round. One folder serves one run: two that
    share it would read each other's state.
    """

    folder: Path | None = None
    _states: dict[int, dict[int, State]] = field(default_factory=dict, init=False, repr=False)
    _constants: dict[str, State] = field(default_factory=dict, init=False, repr=False)

    def load(self, client: int, before_round: int) -> State | None:
        """The newest state that this client saved in a round before this one; None if there is none.

        Raises DataError for a file that can't be read.
        """
        rounds = [r for r in self._rounds(client) if r < before_round]
        return self.at(client, max(rounds)) if rounds else None

    def at(self, client: int, round: int) -> State | None:
        """The state that this client saved in this very round; None if there is none."""
        if self.folder is None:
            return self._states.get(client, {}).get(round)
        return _read(self._path(client, round))

    def save(self, client: int, round: int, tensors: State) -> None:
        """Keep this state, over any of the same or a later round: those are of a run that was killed.

        Raises OSError if the disk is full; what was saved before is then still there.
        """
        if self.folder is None:
            self._states.setdefault(client, {})[round] = {n: x.copy() for n, x in tensors.items()}
        else:
            _write(self._path(client, round), tensors)
        older = sorted((r for r in self._rounds(client) if r <= round), reverse=True)
        for stale in set(self._rounds(client)) - set(older[:_KEPT]):
            self._forget(client, stale)

    def constants(self, digest: str) -> State | None:
        """The constants of this digest; None if they are not held, or no longer readable."""
        if not _DIGEST.fullmatch(digest):
            return None
        if digest not in self._constants and self.folder is not None:
            with suppress(DataError):
                found = _read(self._constants_path(digest))
                if found is not None:
                    self._constants[digest] = found
        return self._constants.get(digest)

    def save_constants(self, digest: str, tensors: State) -> None:
        """Keep constants, whose digest the caller has checked."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"digest: got {digest[:70]!r}; want 64 hex digits")
        if self.folder is not None:
            _write(self._constants_path(digest), tensors)
        self._constants[digest] = {n: x.copy() for n, x in tensors.items()}

    def digests(self) -> tuple[str, ...]:
        """The digests of all constants held, in ascending order."""
        found = set(self._constants)
        if self.folder is not None:
            found |= {p.stem for p in (self.folder / "constants").glob("*.safetensors") if _DIGEST.fullmatch(p.stem)}
        return tuple(sorted(found))

    def _rounds(self, client: int) -> list[int]:
        if self.folder is None:
            return list(self._states.get(client, {}))
        names = (_NAME.fullmatch(p.name) for p in self._path(client, 0).parent.glob("round-*.safetensors"))
        return [int(m[1]) for m in names if m]

    def _forget(self, client: int, round: int) -> None:
        if self.folder is None:
            del self._states[client][round]
        else:
            self._path(client, round).unlink(missing_ok=True)

    def _path(self, client: int, round: int) -> Path:
        assert self.folder is not None
        return self.folder / f"client-{client:06d}" / f"round-{round:06d}.safetensors"

    def _constants_path(self, digest: str) -> Path:
        assert self.folder is not None
        return self.folder / "constants" / f"{digest}.safetensors"


def _write(path: Path, tensors: State) -> None:
    """A crash at any moment leaves the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(serialise({n: x.copy(order="C") for n, x in tensors.items()}))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path) -> State | None:
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise DataError(
            f"{path}: can't be read as a client's state ({error}); delete it, and the client starts anew"
        ) from None
