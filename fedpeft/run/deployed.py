"""A run on Flower's own runtimes: the same coordinator, whatever carries the messages."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from fedpeft.config import read
from fedpeft.errors import ConfigError
from fedpeft.flower import Grid
from fedpeft.report import write_report
from fedpeft.run.coordinate import Coordinator
from fedpeft.run.node import Scalar, without_data, workshop
from fedpeft.run.simulate import finish, opened, record
from fedpeft.run.view import Lines


def serve_run(grid: Grid, run_config: Mapping[str, Scalar], root: Path = Path()) -> None:
    """Run the experiment that the run config names, over this grid, into a run folder.

    run_config: "experiment", a TOML file; "changes", "key=value" pairs separated by ";"; "folder", where
    the run is kept (runs/NAME if not given). root: where a relative "experiment" begins. A folder with a
    run in it goes on from its last checkpoint.
    """
    changes = [x.strip() for x in str(run_config.get("changes", "")).split(";") if x.strip()]
    found = read(root / str(run_config["experiment"]), changes)
    path = Path(str(run_config.get("folder") or Path("runs") / found.name))
    if found.simulation.hostile is not None:
        raise ConfigError(
            "simulation.hostile: is for `fedpeft run`, and these clients are nobody's to make hostile; leave it out"
        )
    folder, found = opened(found, path, fresh=False, force=False, carried_by="flower")
    with folder.held():
        here = None if found.fleet.own_data else workshop(found.settings_json)
        record(folder, found, here)
        clients = found.fleet.nodes if here is None else here.federation.clients
        assert clients is not None  # config refuses own_data without fleet.nodes
        Coordinator(found, folder, Lines()).run(grid, clients)
        if find_spec("torch") is not None:
            finish(folder, here or without_data(found))
        else:
            write_report(path)
