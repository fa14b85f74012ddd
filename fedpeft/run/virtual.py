"""A simulated run in virtual time: the experiment's devices, and what each message asks of them."""

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from fedpeft.config import Experiment
from fedpeft.errors import ConfigError, DataError
from fedpeft.flower import Fleet, Flow, OnReply, VirtualGrid, virtual
from fedpeft.report import Checkpoints, Json
from fedpeft.rounds import (
    Availability,
    Buffer,
    Buffered,
    Errand,
    Memory,
    Population,
    every,
    populate,
    trained_rows,
)
from fedpeft.rules import MeanRule, ServerState, Task
from fedpeft.run.compression import bytes_up
from fedpeft.run.hostile import simulated
from fedpeft.run.needs import Needs
from fedpeft.run.ranks import Assigned, rank_in
from fedpeft.run.workshop import Workshop


def virtual_grid(found: Experiment, here: Workshop, state: Path) -> VirtualGrid:
    """The grid of a simulated run's clients. state: the folder where clients keep theirs."""
    people, work = population(found, here), Work(found, here)

    def errand(client: int, round: int, pass_: int) -> tuple[float, float, str]:
        x = work.errand(people, client, round, pass_)
        return x.tokens, x.up, x.problem

    one_by_one = found.simulation.engine == "loop"
    return virtual(simulated, here.federation.clients, {"state": str(state)}, people, errand, 1 if one_by_one else None)


def population(found: Experiment, here: Workshop) -> Population:
    """Which client is on which device. Raises DataError for a trace that can't be read."""
    devices = found.simulation.devices
    traces = {name: read_trace(Path(x.trace)) for name, x in devices.items() if x.trace is not None}
    return populate(devices, here.federation.clients, matrix_parameters(here), found.seed, traces)


def assigned(found: Experiment, here: Workshop) -> Assigned:
    """The rank of each client of a simulated run. Raises ConfigError where it can't be known."""

    def in_rows(client: int) -> int:
        return rank_in(here.federation, client)

    ranks = found.ranks
    if not isinstance(ranks, Memory):
        return Assigned(ranks, here.federation.clients, found.seed, in_rows)
    if not found.simulation.devices:
        raise ConfigError(
            "ranks.name: got 'memory' in a simulation where no device has any; want [simulation.devices.NAME], such as "
            "[simulation.devices.phone], or ranks.name = 'levels'"
        )
    people, needs = population(found, here), Needs(here.trainer)

    def fitting(client: int) -> int:
        return needs.fitting(ranks.levels, here.counts(client).train, people.device(client).bytes_memory)

    return Assigned(ranks, here.federation.clients, found.seed, cache(fitting))


def matrix_parameters(here: Workshop) -> int:
    """Parameters of the frozen base that each token is multiplied with: all but the table of embeddings."""
    model = here.trainer.frozen.model
    table = model.get_input_embeddings()
    return sum(x.numel() for x in model.parameters()) - sum(x.numel() for x in table.parameters())


class Work:
    """What a client has to do in a round, which is known before it is done."""

    def __init__(self, found: Experiment, here: Workshop) -> None:
        self._found, self._here = found, here
        spec = here.trainer.start().spec
        self._spec = spec
        self.tokens = cache(self._tokens)
        self._up = cache(self._bytes_up)
        self._rank, self._needs = assigned(found, here), Needs(here.trainer)

    def errand(self, people: Population, client: int, round: int, pass_: int, down: float = 0.0) -> Errand:
        """What a message of this round and pass asks of a client: later passes take no training."""
        tokens = self.tokens(client) if pass_ == 0 else 0.0
        rows = self._here.counts(client).train
        needs = self._needs.of(rows, self._rank(client, round))
        holds, name = people.device(client).bytes_memory, people.name(client)
        problem = ""
        if needs > holds:
            problem = (
                f"out of memory: training takes about {needs / 1e9:.2g} GB and a {name} has {holds / 1e9:.2g} GB "
                f"(simulation.devices.{name}.memory)"
            )
        return Errand(down, tokens, self._up(round, pass_), problem)

    def _tokens(self, client: int) -> float:
        training = self._found.training
        encoded = self._here.trainer.rows(client, "train")
        rows = len(encoded)
        if not rows:
            return 0.0
        each = float(encoded.lengths.sum()) / rows * self._patches()
        steps = trained_rows(rows, training.batch, training.accumulate, training.epochs, training.steps)
        return each * steps

    def _patches(self) -> int:
        """Tokens of a row that counts as one: the patches of an image, and the mark before them."""
        pixels = self._here.trainer.frozen.pixels
        if pixels is None:
            return 1
        return int((self._found.training.image_size or pixels.size) // pixels.patch) ** 2 + 1

    def _bytes_up(self, round: int, pass_: int) -> float:
        return float(bytes_up(self._found, Task(self._spec, round, pass_)))


def read_trace(path: Path) -> Sequence[Availability]:
    """The windows of each device in a CSV file with columns from and to, in seconds, and device, if there are several.

    Raises DataError, naming the file and the line.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(encoding="utf8", newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(row.get("device") or "", []).append((float(row["from"]), float(row["to"])))
    except OSError as error:
        raise DataError(
            f"{path}: can't be read ({error.strerror}); want a CSV file with columns from and to"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: line {sum(map(len, found.values())) + 2}: {error}; want numbers under from and to"
        ) from error
    if not found:
        raise DataError(f"{path}: has no windows; want a line (from, to) at least")
    try:
        return tuple(every(windows) for _, windows in sorted(found.items()))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def flow_of(found: Experiment, fleet: Fleet, state: ServerState, on_reply: OnReply) -> Flow | None:
    """What drives a buffered run; None for a synchronous one."""
    if not isinstance(found.schedule, Buffered):
        return None
    assert isinstance(found.rule, MeanRule), "config refuses others"
    if found.schedule.buffer > fleet.known:
        raise ConfigError(
            f"schedule.buffer: got {found.schedule.buffer}; want at most the number of clients, {fleet.known}"
        )
    buffer = Buffer(
        state,
        found.rule,
        found.schedule,
        found.server,
        found.plain,
        found.weighting.largest,
        fleet.rank,
        exactness=found.evaluation.exactness,
    )
    return Flow(fleet, buffer, found.seed, found.selection.deadline, on_reply)


def remembered(grid: VirtualGrid | None, flow: Flow | None) -> dict[str, Json]:
    """What a checkpoint needs beside the state, so that a resumed run has the same schedule."""
    if grid is None:
        return {}
    now, free = grid.time
    at_work = flow.buffer.at_work if flow is not None else {}
    return {
        "now": now,
        "free": [[client, t] for client, t in free.items()],
        "at_work": [[client, round, *grid.begun(client)] for client, round in at_work.items()],
        "draws": flow.buffer.draws if flow is not None else 0,
    }


def recall(grid: VirtualGrid | None, flow: Flow | None, extras: Mapping[str, Json], checkpoints: Checkpoints) -> None:
    """Set the clock, and ask again who was at work, as ``remembered``. Raises DataError if a checkpoint is missing."""
    if grid is None or "now" not in extras:
        return
    at_work = [(int(c), int(r), float(asked), float(free)) for c, r, asked, free in _rows(extras, "at_work")]
    busy = {int(client): float(t) for client, t in _rows(extras, "free")}
    now = extras["now"]
    assert isinstance(now, float), "as it was written"
    grid.restore(now, busy)
    if flow is None:
        return
    draws = extras["draws"]
    assert isinstance(draws, int), "as it was written"
    flow.buffer.restore([(client, round) for client, round, _, _ in at_work], draws)
    for client, round, asked, free in at_work:
        with grid.as_of(client, asked, free):
            flow.again(client, checkpoints.at(round))
    grid.restore(now, busy)


def _rows(extras: Mapping[str, Json], key: str) -> Sequence[Sequence[float]]:
    rows = extras[key]
    assert isinstance(rows, Sequence), "as it was written"
    return rows  # type: ignore[return-value]  # lists of numbers, as they were written
