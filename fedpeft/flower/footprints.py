"""What a node's training took of its memory: noted when it trains, told when it is asked.

Flower starts a process for each message, so the one that is asked is not the one that has trained: the notes are in the
state that the node keeps of a run. They hold nothing that was learned, only the machine's own facts.
"""

import json
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass, fields
from typing import get_args

from flwr.app import ConfigRecord, RecordDict

from fedpeft.errors import ProtocolError
from fedpeft.flower import facts as read
from fedpeft.flower.packing import Json, Parcel, pack, unpack
from fedpeft.training.predict import Engine
from fedpeft.training.settings import Quantise

MEMORY_QUERY = "query.memory"
"""The type of the message that asks for a footprint: it needs no model, and none is loaded."""

_ENGINES: tuple[Engine, ...] = get_args(Engine)
_FORMATS: tuple[Quantise, ...] = get_args(Quantise)
_RECORD = "fedpeft.memory"


@dataclass(frozen=True, slots=True)
class Footprint:
    """A client's training and the memory that it took, in bytes.

    rank: of what it trained, 0 without low-rank layers; engine: "torch" or "onnx"; quantise: what it holds the base in;
    budget: what its node may take, None if that was not said; predicted: by the plan's formula, None where that has
    nothing to say; measured: the peak of the process that trained, since it was started; gpu: what torch had allocated
    on GPUs at most, None where there is none.
    """

    rank: int
    engine: Engine
    quantise: Quantise
    budget: int | None
    predicted: int | None
    measured: int
    gpu: int | None = None


_KEYS = tuple(x.name for x in fields(Footprint))


class Footprints:
    """The largest footprint of each client in a run. cells: where they lie, a plain mapping of this process if not
    given."""

    __slots__ = ("_cells",)

    def __init__(self, cells: MutableMapping[str, str] | None = None) -> None:
        self._cells: MutableMapping[str, str] = {} if cells is None else cells

    @classmethod
    def within(cls, state: RecordDict) -> "Footprints":
        """Those in the state of a Flower context, which a SuperNode keeps in memory while the run goes on."""
        if not isinstance(state.get(_RECORD), ConfigRecord):
            state[_RECORD] = ConfigRecord()
        return cls(state[_RECORD])  # type: ignore[arg-type]  # of values that are all texts

    def note(self, client: int, found: Footprint) -> None:
        """Keep a footprint, unless an earlier one of this client was larger."""
        known = self.of(client)
        if known is None or known.measured <= found.measured:
            self._cells[str(client)] = json.dumps(asdict(found))

    def of(self, client: int) -> Footprint | None:
        """A client's largest; None if it has not trained here."""
        kept = self._cells.get(str(client))
        return None if kept is None else Footprint(**json.loads(kept))


def pack_memory_query() -> RecordDict:
    """The question."""
    return pack(Parcel("query memory", {}, {}))


def pack_footprint(found: Footprint | None) -> RecordDict:
    """The answer; None of a client that has not trained."""
    facts: dict[str, Json] = {} if found is None else asdict(found)
    return pack(Parcel("memory", facts, {}))


def unpack_footprint(content: RecordDict) -> Footprint | None:
    """The inverse of ``pack_footprint``. Raises ProtocolError, and nothing else, for what a node can't have meant."""
    parcel = unpack(content, "memory")
    facts = parcel.facts
    read.none_left(parcel.tensors)
    if not facts:
        return None
    read.exactly(facts, _KEYS)
    engine = next((x for x in _ENGINES if x == facts["engine"]), None)
    quantise = next((x for x in _FORMATS if x == facts["quantise"]), None)
    if engine is None or quantise is None:
        told = f"{facts['engine']} {facts['quantise']}"
        raise ProtocolError(f"it trained with {told[:60]!r}; want {' or '.join(_ENGINES)}, and {', '.join(_FORMATS)}")
    budget, predicted, gpu = (
        None if facts[key] is None else read.whole(facts, key) for key in ("budget", "predicted", "gpu")
    )
    return Footprint(read.whole(facts, "rank"), engine, quantise, budget, predicted, read.whole(facts, "measured"), gpu)
