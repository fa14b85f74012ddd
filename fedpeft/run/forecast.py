"""What a run would take, before it starts."""

from dataclasses import dataclass, replace

from fedpeft.config import Experiment
from fedpeft.errors import ConfigError
from fedpeft.rules import ServerState, Task
from fedpeft.run.node import workshop
from fedpeft.run.outlook import Outlook, outlook

ROUGHLY = 0.3
"""How far the memory that is foretold may be off."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run would take.

    clients, cohort, least: of a round; rows: to train on, of all, the smallest and the largest client, from a
    sample where clients are very many; parameters: trained, and the base's; bytes: of one client and round up and
    down, and once; memory: of the process at its peak, and the machine's that is free, in bytes; together: clients
    trained in one step, and refusal: why not more; outlook: of a run in simulated time.
    """

    clients: int
    cohort: int
    least: int
    rows: int
    smallest: int
    largest: int
    parameters: int
    base_parameters: int
    bytes_up: int
    bytes_down: int
    bytes_once: int
    memory: int
    available: int
    together: int = 1
    refusal: str = ""
    outlook: Outlook | None = None


def forecast(found: Experiment) -> Forecast:
    """The forecast of a simulated run. Raises ConfigError or DataError for what can't run.

    That includes a run on the CPU whose memory, foretold within 30 %, is surely more than the machine has.
    """
    from fedpeft.training.environment import memory
    from fedpeft.training.memory import estimate

    here = workshop(found.settings_json)
    trainer = here.trainer
    start = trainer.start()
    task = Task(start.spec)
    state = ServerState(task, start)
    up = (8 if found.channel.exact else 4) * (found.rule.layout(task).size + 5)
    constant = found.rule.constant(start.spec)
    sent = found.rule.send(state, 1 << 30).adapter.tensors()
    down = sum(x.nbytes for n, x in sent.items() if n not in constant)
    once = sum(x.nbytes for n, x in sent.items() if n in constant) + sum(x.nbytes for x in start.fixed.values())
    clients = here.federation.clients
    sizes = [here.federation.size(client).train for client in here.federation.some()]
    base = sum(x.numel() for x in trainer.frozen.model.parameters())
    trained = sum(x.size for x in start.tensors().values())
    cohort = found.selection.wanted(clients)
    together = min(trainer.together, cohort)
    training = replace(trainer.training, batch=min(trainer.training.batch, max(sizes)) * together)
    peak, machine = estimate(trainer.frozen.model.config, base, start.spec, training), memory()
    if trainer.place.device.type == "cpu" and peak * (1 - ROUGHLY) > machine["total"]:
        raise ConfigError(
            f"training.batch: got {found.training.batch}, with which the run takes about {peak / 1e9:.3g} GB; "
            f"this machine has {machine['total'] / 1e9:.3g} GB: use a smaller batch with training.accumulate, "
            f"a smaller training.length, or training.checkpointing"
        )
    return Forecast(
        clients=clients,
        cohort=cohort,
        least=found.selection.least(clients),
        rows=round(sum(sizes) * clients / len(sizes)),
        smallest=min(sizes),
        largest=max(sizes),
        parameters=trained,
        base_parameters=base - trained,
        bytes_up=up * found.rule.passes,
        bytes_down=down,
        bytes_once=once,
        memory=peak,
        available=machine["available"],
        together=together,
        refusal=trainer.refusal,
        outlook=outlook(found, here, float(down)) if found.simulation.devices else None,
    )
