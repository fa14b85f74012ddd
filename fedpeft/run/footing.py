"""What a deployed node says of the memory that it has taken."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedpeft.adapters import CORES
from fedpeft.config.runtimes import Runtime
from fedpeft.flower import Footprint
from fedpeft.rounds import Job, bytes_in
from fedpeft.run.needs import CARRIER, largest, taken, taken_on_device
from fedpeft.secagg import Protocol
from fedpeft.training.kit import CONFIG, Kit
from fedpeft.training.peaks import gpu_peak, peak

if TYPE_CHECKING:
    from fedpeft.run.workshop import Workshop


@dataclass(frozen=True, slots=True)
class Footing:
    """What a deployed node says of the memory that it has taken, once it has trained."""

    here: "Workshop"
    node_config: Mapping[str, bool | int | float | str]

    def __call__(self, job: Job) -> Footprint:
        """Of this job, the last that this process has done.

        Under secure aggregation it is foretold for a whole batch: that a client has fewer rows is for nobody to know.
        """
        here, own, spec = self.here, self.here.own, job.start.spec
        batch, texts = here.found.training.batch, None
        if not isinstance(here.found.secagg, Protocol):
            texts = here.counts(job.client).train
            batch = max(1, min(batch, texts))
        budget = self.node_config.get("memory")
        room = None if budget is None else round(bytes_in(budget, "memory"))
        is_foretold, foretold = job.pool is None and job.trains not in CORES, None  # of others there is no formula
        if own is not None and own.engine == "onnx" and own.kit is not None:
            kit, training = Kit.open(own.kit, check=False), replace(here.found.training, batch=batch)
            runtime = Runtime("onnx", kit.facts.quantise)
            if is_foretold and (kit.folder / CONFIG).is_file():  # a kit that was made by other means may lack it
                foretold = CARRIER["onnx"] + taken_on_device(kit, training, spec, job.trains)
        else:
            runtime = Runtime("torch", here.found.model.quantise)
            if is_foretold and here.trainer.place.device.type == "cpu":
                one = taken(here.trainer, runtime, spec, batch, texts, job.trains, spares=room is not None)
                foretold = CARRIER["torch"] + one
        return Footprint(largest(spec), runtime.engine, runtime.quantise, room, foretold, peak(), gpu_peak())
