"""The memory of a run's devices: asked of those of a deployed run, foretold for those of a simulation."""

from collections.abc import Callable
from math import inf, isfinite
from typing import TYPE_CHECKING

from fedpeft.adapters import CORES
from fedpeft.config import Experiment
from fedpeft.config.ranks import largest_rank
from fedpeft.config.runtimes import Runtime
from fedpeft.flower import Fleet, farewell
from fedpeft.report import DeviceRecord, MemoryRecord
from fedpeft.rules import Task
from fedpeft.run.needs import largest, taken
from fedpeft.run.panel import sample
from fedpeft.run.ranks import Assigned
from fedpeft.run.runtimes import runtime_of
from fedpeft.run.virtual import population
from fedpeft.training.peaks import peak, workers

if TYPE_CHECKING:
    from fedpeft.run.workshop import Workshop


def guarded(
    weigh: Callable[[Fleet], MemoryRecord], note: Callable[[str], None]
) -> Callable[[Fleet], MemoryRecord | None]:
    """The same, but where it fails it is noted: what memory was taken is no reason to lose the end of a run."""

    def found(fleet: Fleet) -> MemoryRecord | None:
        try:
            return weigh(fleet)
        except Exception as error:
            note(f"the memory of devices is not in the report: {type(error).__name__}: {error}")
            return None

    return found


def of_devices(fleet: Fleet) -> MemoryRecord:
    """What the nodes of a deployed run say of the memory that they have taken."""
    found, unknown = farewell(fleet)
    devices = tuple(
        DeviceRecord((client,), x.rank, x.engine, x.quantise, x.budget, x.predicted, x.measured, x.gpu)
        for client, x in found.items()
    )
    return MemoryRecord(devices=devices, unknown=unknown)


def of_simulation(found: Experiment, here: "Workshop", ranks: Assigned, fleet: Fleet) -> MemoryRecord:
    """What is foretold for each kind of simulated device, and what the processes that stood for all have taken.

    A kind is a rank, a runtime and a memory; of very many clients those are told that the run was evaluated with. It is
    foretold for the first round, and for the client with the most rows of its kind.
    """
    clients = here.federation.clients
    people = population(found, here) if found.simulation.devices else None
    top = largest_rank(found.adapter)
    kinds: dict[tuple[int, Runtime, float], list[int]] = {}
    for client in sample(found, range(clients)):
        budget = inf if people is None else people.device(client).bytes_memory
        kind = (min(top, ranks(client, 0)), runtime_of(found, client, clients), budget)
        kinds.setdefault(kind, []).append(client)
    devices = []
    for (rank, runtime, budget), some in sorted(kinds.items(), key=lambda x: (x[0][0], str(x[0][1]), x[0][2])):
        spec = here.trainer.start().cut(rank).spec
        rows = max(here.counts(client).train for client in some)
        ways = {found.rule.trains(Task(spec, round)) for round in range(2)}  # some rules take turns
        foretold = None
        if found.rule.pool is None and not ways & set(CORES):
            batch = max(1, min(found.training.batch, rows))
            foretold = max(taken(here.trainer, runtime, spec, batch, rows, trains) for trains in ways)
        room = round(budget) if isfinite(budget) else None
        devices.append(DeviceRecord(tuple(some), largest(spec), runtime.engine, runtime.quantise, room, foretold))
    processes = (("the simulation", peak()), *((f"worker {i}", x) for i, x in enumerate(workers(), 1)))
    return MemoryRecord(tuple(devices), processes=processes)
