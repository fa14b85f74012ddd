"""What is recorded of the memory of a run's devices."""

from dataclasses import dataclass
from typing import Self

from fedpeft.report.fields import Fields
from fedpeft.report.strict import Json


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """The memory of one client's device, or of a kind of simulated ones; in bytes.

    clients: the one that it is of, or those of its kind; rank: of what is trained; runtime: "torch" or "onnx";
    quantise: what the base is held in; budget: what it may take, None if nothing was said; predicted: by the plan's
    formula, None where that has nothing to say; measured: the peak of the process that trained, gpu: what torch had
    allocated on GPUs at most; None where nothing was measured.
    """

    clients: tuple[int, ...]
    rank: int
    runtime: str
    quantise: str
    budget: int | None = None
    predicted: int | None = None
    measured: int | None = None
    gpu: int | None = None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None where one of them isn't known."""
        return None if self.measured is None or not self.predicted else self.measured / self.predicted

    @classmethod
    def read(cls, x: Fields) -> Self:
        return cls(
            tuple(int(c) for c in x.numbers("clients")),
            x.need_whole("rank"),
            x.text("runtime"),
            x.text("quantise"),
            x.whole("budget"),
            x.whole("predicted"),
            x.whole("measured"),
            x.whole("gpu"),
        )

    def json(self) -> dict[str, Json]:
        return {
            "clients": self.clients,
            "rank": self.rank,
            "runtime": self.runtime,
            "quantise": self.quantise,
            "budget": self.budget,
            "predicted": self.predicted,
            "measured": self.measured,
            **({"gpu": self.gpu} if self.gpu is not None else {}),
        }


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """The memory of a run's devices, asked at its end.

    unknown: clients that trained and of which nothing is known, and why; processes: of a simulation, whose clients
    share them: (the process's name, its peak in bytes).
    """

    devices: tuple[DeviceRecord, ...] = ()
    unknown: tuple[tuple[int, str], ...] = ()
    processes: tuple[tuple[str, int], ...] = ()

    @classmethod
    def read(cls, x: Fields) -> Self:
        processes = x.section("processes")
        return cls(
            tuple(DeviceRecord.read(each) for each in x.objects("devices")),
            tuple(x.reasons("unknown")),
            tuple((name, processes.need_whole(name)) for name in processes.values),
        )

    def json(self) -> dict[str, Json]:
        return {
            "kind": "memory",
            "devices": tuple(x.json() for x in self.devices),
            "unknown": self.unknown,
            "processes": dict(self.processes),
        }
