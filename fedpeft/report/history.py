"""A run as it was recorded, read back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedpeft.report.devices import MemoryRecord
from fedpeft.report.folder import RunFolder
from fedpeft.report.journal import METRICS, journal
from fedpeft.report.records import BaselineRecord, FinalRecord, RoundRecord, RunRecord


@dataclass(frozen=True, slots=True)
class History:
    """All records of one run: rounds ascending, each once; baselines by name; final is None while it runs, and memory
    in a run whose devices were not asked."""

    path: Path
    run: RunRecord
    rounds: tuple[RoundRecord, ...] = ()
    baselines: Mapping[str, BaselineRecord] = field(default_factory=dict[str, BaselineRecord])
    final: FinalRecord | None = None
    memory: MemoryRecord | None = None

    @property
    def bytes_up(self) -> int:
        """Bytes from all clients in all rounds so far."""
        return sum(x.bytes_up for x in self.rounds)

    @property
    def bytes_down(self) -> int:
        """Bytes to all clients in all rounds so far."""
        return sum(x.bytes_down for x in self.rounds)

    @property
    def seconds(self) -> float:
        """Seconds that the run took, or its rounds so far."""
        if self.final is not None and self.final.seconds is not None:
            return self.final.seconds
        return sum(x.seconds for x in self.rounds)


def history(folder: Path) -> History:
    """The history of the run in a folder, complete or not. Raises DataError if there is none or it can't be read."""
    path = RunFolder.open(folder).path
    run = RunRecord(name=path.resolve().name)
    rounds: dict[int, RoundRecord] = {}
    baselines: dict[str, BaselineRecord] = {}
    final: FinalRecord | None = None
    memory: MemoryRecord | None = None
    for line in journal(path / METRICS):
        match line.record:
            case RunRecord():
                run = line.record
            case RoundRecord():
                rounds[line.record.round] = line.record
            case BaselineRecord():
                baselines[line.record.name] = line.record
            case MemoryRecord():
                memory = line.record
            case FinalRecord():
                final = line.record
    return History(path, run, tuple(rounds[n] for n in sorted(rounds)), baselines, final, memory)
