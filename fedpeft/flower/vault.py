"""What clients keep of secure sessions between their messages: secret, and in memory only."""

from collections.abc import MutableMapping

from flwr.app import ConfigRecord, RecordDict

_RECORD = "fedpeft.secure"


class Vault:
    """The state of each client's session; one session a client, since a new one ends the one before.

    What is wiped, or written over, is gone from here; Python may leave copies of it in memory that is free. cells:
    where it lies, a plain mapping of this process if not given.
    """

    __slots__ = ("_cells",)

    def __init__(self, cells: MutableMapping[str, bytes] | None = None) -> None:
        self._cells: MutableMapping[str, bytes] = {} if cells is None else cells

    @classmethod
    def within(cls, state: RecordDict) -> "Vault":
        """A vault in the state of a Flower context, which a SuperNode keeps in memory while the run goes on."""
        if not isinstance(state.get(_RECORD), ConfigRecord):
            state[_RECORD] = ConfigRecord()
        return cls(state[_RECORD])  # type: ignore[arg-type]  # of values that are all bytes

    def __repr__(self) -> str:
        return f"Vault({len(self._cells)} sessions)"

    def read(self, client: int, thread: str) -> bytes:
        """What this client keeps of this session; nothing if it keeps none, or one of another."""
        found = self._cells.get(str(client), b"")
        name, _, kept = found.partition(b"\n")
        return kept if name == thread.encode() else b""

    def write(self, client: int, thread: str, state: bytes) -> None:
        """Keep this, in place of what the client had kept of any session."""
        self._cells[str(client)] = thread.encode() + b"\n" + state

    def wipe(self, client: int, thread: str) -> None:
        """Forget this session."""
        if self._cells.get(str(client), b"").partition(b"\n")[0] == thread.encode():
            del self._cells[str(client)]
