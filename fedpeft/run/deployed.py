"""A run on Flower's own runtimes: the same coordinator, whatever carries the messages."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from fedpeft.config import Experiment, read
from fedpeft.errors import ConfigError
from fedpeft.flower import Grid, Shipping
from fedpeft.flower.helper import helper_call
from fedpeft.report import exceeded, history, write_report
from fedpeft.run.coordinate import Coordinator
from fedpeft.run.footprints import guarded, of_devices
from fedpeft.run.keys import read_roster
from fedpeft.run.node import Scalar
from fedpeft.run.ranks import check_clients
from fedpeft.run.secure import DEPLOYED, Sessions
from fedpeft.run.shipped import to_send, with_kit
from fedpeft.run.simulate import finish, opened, record
from fedpeft.run.view import Lines
from fedpeft.run.workshop import without_data, workshop
from fedpeft.secagg import Protocol, TwoServer


def serve_run(grid: Grid, run_config: Mapping[str, Scalar], root: Path = Path()) -> None:
    """Run the experiment that the run config names, over this grid, into a run folder.

    run_config: "experiment", a TOML file; "changes", "key=value" pairs separated by ";"; "folder", where
    the run is kept (runs/NAME if not given); "kit", the folder that devices without torch train from, where it is not
    to be made here (fleet.kit); for secure aggregation "roster", the clients' signed roster, and for two
    servers "helper", where the second one is, as host:port, and "helper-certificate", a file with the certificate of
    its authority. root: where a relative "experiment" begins. A folder with a run in it goes on from its last
    checkpoint.
    """
    changes = [x.strip() for x in str(run_config.get("changes", "")).split(";") if x.strip()]
    found = read(root / str(run_config["experiment"]), changes)
    path = Path(str(run_config.get("folder") or Path("runs") / found.name))
    if found.simulation.losses is not None:
        raise ConfigError("simulation.losses: is for `fedpeft run`: real clients vanish by themselves; leave it out")
    if found.simulation.hostile is not None:
        raise ConfigError(
            "simulation.hostile: is for `fedpeft run`, and these clients are nobody's to make hostile; leave it out"
        )
    if found.simulation.runtimes:
        raise ConfigError(
            "simulation.runtimes: is for `fedpeft run`: each real client says in its node config what it trains with "
            "(runtime, quantise); leave it out"
        )
    folder, found = opened(found, path, fresh=False, force=False, carried_by="flower")
    with folder.held():
        sessions = _sessions(found, run_config)  # first: what it refuses need not load a model
        here = None if found.fleet.own_data else workshop(found.settings_json)
        clients = found.fleet.nodes if here is None else here.federation.clients
        assert clients is not None  # config refuses own_data without fleet.nodes
        check_clients(found, clients, DEPLOYED)
        view = Lines()
        if (kit := to_send(found, here or without_data(found), run_config)) is not None:
            grid = Shipping(grid, kit, view.note)
            found = with_kit(found, grid.digest)
            sessions = sessions and replace(sessions, found=found)  # which bind the settings, and so the kit
        record(folder, found, here)
        Coordinator(found, folder, view, sessions=sessions, weigh=guarded(of_devices, view.note)).run(grid, clients)
        if find_spec("torch") is not None:
            finish(folder, here or without_data(found))
        else:
            write_report(path)
        memory = history(path).memory
        if memory is not None and (said := exceeded(memory)):
            view.note(said)


def _sessions(found: Experiment, run_config: Mapping[str, Scalar]) -> Sessions | None:
    """What the coordinator brings to secure rounds. Raises ConfigError, naming the key, for what it lacks."""
    if not isinstance(found.secagg, Protocol):
        return None
    if not run_config.get("roster"):
        raise ConfigError(
            f"roster: is missing in the run config, and secagg.name is {found.settings['secagg']['name']!r}; want the "
            f"clients' signed roster: roster='/etc/fedpeft/roster.json' (docs/secure-aggregation.md)"
        )
    roster = read_roster(Path(str(run_config["roster"])))
    if not isinstance(found.secagg, TwoServer):
        return Sessions(found, roster, DEPLOYED)
    for key, want in (("helper", "where the second server is, as host:port"), ("helper-certificate", "a file")):
        if not run_config.get(key):
            raise ConfigError(f"{key}: is missing in the run config, and secagg.name is 'twoserver'; want {want}")
    if roster.helper is None:
        raise ConfigError(
            f"roster: {run_config['roster']} names no helper, and secagg.name is 'twoserver'; want one that was made "
            f"with `fedpeft keys roster --helper KEY`"
        )
    path = Path(str(run_config["helper-certificate"]))
    try:
        certificate = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"helper-certificate: {path} can't be read: {error.strerror}; want a PEM file") from None
    helper = helper_call(str(run_config["helper"]), certificate, found.fleet.patience)
    return Sessions(found, roster, DEPLOYED, helper)
