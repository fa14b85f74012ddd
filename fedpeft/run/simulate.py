"""A run on this machine, from its experiment to a folder with a report and an adapter."""

import shlex
import sys
import time
import tomllib
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import inf
from pathlib import Path
from secrets import token_hex
from typing import Any

import tomli_w

from fedpeft import __version__
from fedpeft.config import Experiment, experiment
from fedpeft.config.ranks import largest_rank
from fedpeft.errors import ConfigError, DataError
from fedpeft.flower import ClientStore, in_process, under, with_own
from fedpeft.report import (
    ClientData,
    Json,
    RunFolder,
    RunRecord,
    history,
    label_json,
    write_privacy,
    write_report,
)
from fedpeft.rounds import Buffered
from fedpeft.run.baselines import measure
from fedpeft.run.coordinate import Coordinator
from fedpeft.run.footprints import guarded, of_simulation
from fedpeft.run.hostile import is_hostile, simulated
from fedpeft.run.kits import kit_of, missing
from fedpeft.run.node import Scalar
from fedpeft.run.panel import panel, sample
from fedpeft.run.ranks import Assigned, check_clients, check_holders
from fedpeft.run.runtimes import runtime_of
from fedpeft.run.simulated import SIMULATED, losses, sessions
from fedpeft.run.view import View
from fedpeft.run.virtual import assigned, population, virtual_grid
from fedpeft.run.workshop import Workshop, without_data, workshop
from fedpeft.secagg import Protocol

_PACKAGES = ("torch", "transformers", "peft", "flwr", "numpy", "safetensors")


def simulate(
    found: Experiment, path: Path, view: View, force: bool = False, fresh: bool = False, baselines: bool = True
) -> Path:
    """Run the experiment with all its clients in this process, into the folder ``path``, which is returned.

    Nothing here depends on how fast the machine is: ``fleet.wait`` is for real nodes, and so is ``selection.deadline``
    but where ``simulation.devices`` say how fast clients are.
    A run that is there already goes on from its last checkpoint, and one that is done stays as it is;
    with ``fresh`` a folder that holds a run is refused, or emptied if ``force`` is set. Baselines that the
    experiment asks for and that are not there yet are measured at the end, unless ``baselines`` is off.
    """
    if isinstance(found.schedule, Buffered) and not found.simulation.devices:
        raise ConfigError(
            "schedule.name: got 'buffered' in a simulation where nothing takes time; want [simulation.devices.NAME], "
            "such as [simulation.devices.phone], or schedule.name = 'synchronous'"
        )
    folder, found = opened(found, path, fresh, force)
    with folder.held():
        here = workshop(found.settings_json)
        clients = here.federation.clients
        ranks = assigned(found, here)
        check_clients(found, clients)
        check_holders(found, [ranks(client, 0) for client in here.federation.some()])
        said = ranks.said if found.ranks.is_said else None
        record(folder, found, here, ranks, is_simulated=True)
        if here.trainer.refusal:
            method = found.adapter.method
            view.note(f"clients train one after another: {method} can't be for many at once: {here.trainer.refusal}")
        for quantise in missing(here):
            view.note(f"making the kit of clients on onnx ({quantise}), once: seconds to minutes")
            kit_of(here, quantise, view.note)
        assert here.fleet.base == here.trainer.base  # made now, so that what can't be is said here and not by clients
        weigh = guarded(partial(of_simulation, found, here, ranks), view.note)
        if found.simulation.devices:
            time_grid = virtual_grid(found, here, path / "clients")
            start = Coordinator(_patient(found), folder, view, time_grid, said, None, weigh).run(time_grid, clients)
        else:
            nodes: dict[str, Scalar] = {"state": str(path / "clients"), SIMULATED: True}
            grid = in_process(simulated, clients, nodes, losses(found, clients))
            patient = _patient(found)
            secure = sessions(patient, clients)
            start = Coordinator(patient, folder, view, None, said, secure, weigh).run(grid, clients)
        finish(folder, here)
        if baselines:
            measured = False
            for baseline in measure(found, here, start, view, frozenset(history(path).baselines)):
                folder.append(baseline)
                measured = True
            if measured:
                write_report(path)
    return path


def _patient(found: Experiment) -> Experiment:
    """The experiment without its time limits: clients that take turns in one process are slow, and never silent.

    In virtual time they may be both, so the deadline stays.
    """
    deadline = found.selection.deadline if found.simulation.devices else inf
    fleet = replace(found.fleet, wait=inf, patience=inf)
    return replace(found, selection=replace(found.selection, deadline=deadline), fleet=fleet)


def opened(
    found: Experiment, path: Path, fresh: bool, force: bool, carried_by: str = "process"
) -> tuple[RunFolder, Experiment]:
    """The run in a folder, or a new one, and its experiment.

    carried_by: "process" or "flower", what carries its messages. Raises ConfigError for a run with other settings
    or another carrier.
    """
    if fresh or not (path / "config.lock.toml").is_file():
        found = experiment({**found.settings, "run": token_hex(8)})
        lock = {**found.settings, "versions": versions(), "carried": {"by": carried_by}}
        return RunFolder.create(path, tomli_w.dumps(lock), force), found
    by = _lock(path).get("carried", {}).get("by", carried_by)
    if by != carried_by:
        raise ConfigError(
            f"{path}: this run's clients are reached by {by}, and keep what is theirs there; go on with it "
            f"{'with `flwr run` and the same folder' if by == 'flower' else 'with `fedpeft resume`'}"
        )
    there = stored(path)
    own = {"run": "", "name": ""}
    if there.settings | own != found.settings | own:
        raise ConfigError(f"{path}: holds a run with other settings; name another folder, or use --force")
    return RunFolder.open(path), there


def versions() -> dict[str, str]:
    """Of Python, fedpeft and what its numbers depend on, as far as installed."""
    out = {"python": sys.version.split()[0], "fedpeft": __version__}
    for name in _PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def stored(path: Path) -> Experiment:
    """The experiment of a run, from its lock file. Raises DataError, ConfigError naming the file."""
    return experiment({k: v for k, v in _lock(path).items() if k not in ("versions", "carried")})


def _lock(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(RunFolder.open(path).lock_text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path / 'config.lock.toml'}: damaged: {error}; restore it, or start the run anew") from error


def record(
    folder: RunFolder,
    found: Experiment,
    here: Workshop | None,
    ranks: Assigned | None = None,
    is_simulated: bool = False,
) -> None:
    """What was run, written once; without ``here`` the clients' data is theirs to know, and of very many clients it
    is told for those with which the run is evaluated at the end. ranks: of a simulated run's clients; is_simulated:
    whether this process makes the clients' keys.
    """
    if history(folder.path).run.settings:
        return
    clients: dict[int, ClientData] = {}
    people = population(found, here) if here is not None and found.simulation.devices else None
    if here is not None:
        count, largest = here.federation.clients, largest_rank(found.adapter)
        told = here.federation.summary(sample(found, range(count)))
        for row in told["clients"]:
            labels = dict(zip(here.federation.table.classes, row["labels"], strict=False))
            client = row["client"]
            device = people.name(client) if people is not None else ""
            has_rank = ranks is not None and not found.ranks.is_whole and not found.ranks.changes
            rank = min(largest, ranks(client, 0)) if ranks is not None and has_rank else None
            runtime = str(runtime_of(found, client, count)) if found.simulation.runtimes else ""
            hostile = is_hostile(found, client, count)
            clients[client] = ClientData(row["train"], labels, device, rank, hostile, runtime)
    task = found.data.task if here is None else here.federation.table.task
    command = shlex.join(["fedpeft", *sys.argv[1:]])
    folder.append(
        RunRecord(
            name=found.name,
            settings=found.settings,
            versions=versions(),
            clients=clients,
            population=0 if here is None else here.federation.clients,
            task=task,
            labels=() if here is None else here.federation.table.classes,
            command=command,
            started=time.time(),
            security=security(folder, found, is_simulated, 0 if here is None else here.federation.clients),
        )
    )


def security(folder: RunFolder, found: Experiment, simulated: bool, clients: int) -> dict[str, Json]:
    """The label of a run's secure aggregation, also in ``privacy.json``; empty for a run in the clear."""
    if not isinstance(found.secagg, Protocol):
        return {}
    label = label_json(found.secagg.label(found.selection.wanted(clients or found.fleet.nodes or 0)), simulated)
    write_privacy(folder.path, label)
    return label


def finish(folder: RunFolder, here: Workshop) -> None:
    """The adapter in Hugging Face's peft format, and the report.

    Where a rule leaves parts on the clients, ``adapter/`` holds the shared part over the start, and
    ``adapter/client-N/`` what client N ends with, as far as its state is here; of very many clients those with which
    the run was evaluated at the end.
    """
    bridge = here.trainer.bridge  # whose imports come first: see ``starting``
    from fedpeft.training.export import export_peft

    state = folder.checkpoints.load().state
    bridge.write(state.adapter)
    export_peft(bridge, folder.path / "adapter", tail=state.tail)
    personal = here.found.rule.personal(state.task.spec)
    store = ClientStore(folder.path / "clients")
    for client in panel(here.found, range(here.federation.clients)) if personal else ():
        kept = under(store.load(client, state.task.round) or {}, "personal/")
        bridge.write(with_own(state.adapter, kept, personal))
        export_peft(bridge, folder.path / "adapter" / f"client-{client:06d}", tail=state.tail)
    write_report(folder.path)


_FOLDERS = {"peft": "adapter", "merged": "merged", "onnx": "onnx", "gguf": "gguf"}


def export_run(path: Path, to: str, out: Path | None) -> Path:
    """Write the adapter of a run as "peft", "merged", "onnx" or "gguf" into ``out``, or else into the run's folder.

    Each is loaded again, and its logits compared with those of the run's model, before this returns. ConfigError for
    what a format can't express, or gets wrong.
    """
    folder = RunFolder.open(path)
    found = stored(path)
    trainer = (without_data(found) if found.fleet.own_data else workshop(found.settings_json)).trainer
    from fedpeft.training import export

    bridge, base = trainer.bridge, trainer.frozen
    state = folder.checkpoints.load().state
    bridge.write(state.adapter)
    target = out or path / _FOLDERS[to]
    if to == "merged":
        export.export_merged(bridge, target, base.tokenizer, state.tail)
    elif to == "onnx":
        from fedpeft.training.export_onnx import export_onnx

        export_onnx(bridge, target, base.tokenizer, base.pixels, state.tail)
    elif to == "gguf":
        from fedpeft.training.export_gguf import export_gguf

        export_gguf(bridge, target, state.tail)
    else:
        from fedpeft.training.reload import reload_peft

        export.export_peft(bridge, target, tail=state.tail)
        reload_peft(found.model, base, bridge, trainer.place, target, state.tail)
    return target
