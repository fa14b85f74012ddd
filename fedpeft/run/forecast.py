"""What a run would take, before it starts."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from fedpeft.adapters import Adapter, lasting
from fedpeft.channel import Codec
from fedpeft.config import Experiment
from fedpeft.config.ranks import largest_rank
from fedpeft.errors import ConfigError
from fedpeft.flower.small import narrowed, narrowed_tail
from fedpeft.rounds import WHOLE
from fedpeft.rules import Rule, ServerState, Task
from fedpeft.run.compression import bytes_of, bytes_up, check_compression
from fedpeft.run.outlook import Outlook, outlook
from fedpeft.run.ranks import Assigned, check_clients, check_holders, check_spec
from fedpeft.run.runtimes import by_runtime, others
from fedpeft.run.secure import DEPLOYED, check_ranks, secrecy
from fedpeft.run.virtual import assigned
from fedpeft.run.workshop import without_data, workshop

ROUGHLY = 0.3
"""How far the memory that is foretold may be off."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run would take.

    clients, cohort, least: of a round; rows: to train on, of all, the smallest and the largest client, from a
    sample where clients are very many; parameters: trained, and the base's; bytes: of one client and round up and
    down, and once; memory: of the process at its peak, and the machine's that is free, in bytes; together: clients
    trained in one step, and refusal: why not more; outlook: of a run in simulated time; ranks: (rank, clients) of what
    clients train, and runtimes: (runtime, clients) of what they train with, where they differ, of ``told`` clients.
    Where each node has data of its own there are no rows to tell of, and ranks that nodes say are not known.
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
    ranks: tuple[tuple[int, int], ...] = ()
    runtimes: tuple[tuple[str, int], ...] = ()
    told: int = 0
    secrecy: tuple[tuple[str, str], ...] = ()


def fetches(rule: Rule, start: Adapter, codec: Codec | None = None) -> Callable[[int], int]:
    """Bytes that a client of a rank fetches in a round, without what travels once.

    Of one in which b is no longer zero, and the rule is beyond what it begins with. codec: of the change since the
    version that the client has from the round before.
    """
    constant = rule.constant(start.spec)
    moved = {f"{name}/b": np.ones_like(x.b) for name, x in start.layers.items()}
    state = ServerState(Task(start.spec, rule.fewest_rounds - 1), start.put(moved))

    @cache
    def of(rank: int) -> int:
        sent = rule.send(state, rank)
        own = [x for n, x in narrowed(sent.adapter).items() if n not in constant]
        each = [*own, *narrowed_tail(sent.tail, sent.adapter).values()]
        return sum(bytes_of(codec, x.size) if x.dtype == np.float32 else x.nbytes for x in each)

    return of


def forecast(found: Experiment) -> Forecast:
    """The forecast of a simulated run. Raises ConfigError or DataError for what can't run.

    That includes a run on the CPU whose memory, foretold within 30 %, is surely more than the machine has.
    """
    from fedpeft.training.environment import memory
    from fedpeft.training.memory import estimate, parts

    own_data, settings = found.fleet.own_data, found.settings_json
    here = without_data(found) if own_data else workshop(settings)
    trainer = here.trainer
    start = trainer.start()
    task = Task(start.spec, found.rule.fewest_rounds - 1)
    state = ServerState(task, start)
    passes = [replace(task, pass_=n) for n in range(found.rule.passes)]
    up = sum(bytes_up(found, x) for x in passes)
    constant = found.rule.constant(start.spec)
    sent, fetched = found.rule.send(state, WHOLE).adapter, fetches(found.rule, start, found.compression.codec_down)
    once = sum(x.nbytes for n, x in sent.tensors().items() if n in constant)
    once += sum(x.nbytes for x in lasting(sent).values())
    clients = found.fleet.nodes or 0 if own_data else here.federation.clients
    check_clients(found, clients, DEPLOYED if own_data else None)
    check_spec(found, start.spec)
    check_compression(found, start.spec)
    some = range(clients) if own_data else here.federation.some()
    assign = Assigned(found.ranks, clients, found.seed, lambda _: None) if own_data else assigned(found, here)
    ranks = [] if own_data and found.ranks.is_said else [min(assign(c, 0), largest_rank(found.adapter)) for c in some]
    check_holders(found, ranks)
    check_ranks(found, ranks, start.spec)
    sizes = [] if own_data else [here.federation.size(client).train for client in some]
    base = trainer.frozen
    trained = sum(x.size for x in start.tensors().values())
    cohort = found.selection.wanted(clients)
    together = min(trainer.together, cohort) if found.rule.pool is None else 1
    training = replace(
        trainer.training, batch=min([trainer.training.batch, *([max(sizes)] if sizes else [])]) * together
    )
    texts = None if own_data or not training.bytes_lower else len(here.federation.used())
    peak = estimate(base.model.config, base.parameters, start.spec, training, base.quantise, texts=texts)
    for other in others(found):
        more = parts(base.model.config, base.parameters, start.spec, found.training, other.quantise, other.engine)
        peak += more.total if other.engine == "onnx" else more.base + more.adapter
    machine = memory()
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
        rows=round(sum(sizes) * clients / len(sizes)) if sizes else 0,
        smallest=min(sizes, default=0),
        largest=max(sizes, default=0),
        parameters=trained,
        base_parameters=base.parameters,
        bytes_up=up,
        bytes_down=round(sum(map(fetched, ranks)) / len(ranks)) if ranks else fetched(WHOLE),
        bytes_once=once,
        memory=peak,
        available=machine["available"],
        together=together,
        refusal=trainer.refusal,
        outlook=None if own_data or not found.simulation.devices else outlook(found, here, fetched),
        ranks=() if found.ranks.is_whole else tuple(sorted(Counter(ranks).items())),
        runtimes=() if own_data else by_runtime(found, clients, some),
        told=len(ranks),
        secrecy=secrecy(found, cohort),
    )
