"""What a deployed run and its nodes have to bring to secure aggregation, and what is refused for the lack of it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from fedpeft.config import Experiment
from fedpeft.config import experiment as built
from fedpeft.data import Federation, Table
from fedpeft.errors import ConfigError, DataError, ProtocolError
from fedpeft.flower import Grid
from fedpeft.run import members
from fedpeft.run.deployed import serve_run
from fedpeft.run.keys import collect, make_identity, read_identity, read_roster, sign_roster, write_roster
from fedpeft.run.members import member
from fedpeft.run.secure import DEPLOYED, Sessions
from fedpeft.run.simulated import SIMULATED
from fedpeft.run.workshop import Workshop
from fedpeft.secagg import Identity, Member, Policy, Roster
from fedpeft.secagg.helper import HelperKey

NOW = 1_790_000_000.0
EXPERIMENT = """
[model]
name = "tiny-bert"

[data]
name = "wiki11"
examples = 120

[partition]
clients = {clients}

[secagg]
name = "{name}"
"""


def found(name: str, **changes: object) -> Experiment:
    return built({"model": {"name": "tiny-bert"}, "data": {"name": "wiki11"}, "secagg": {"name": name}, **changes})


def shop(experiment: Experiment) -> Workshop:
    """A workshop of three clients without rows, for what looks at none."""
    none = (np.zeros(0, np.int64),) * 3
    table = Table("lm", (), ())
    return Workshop(experiment, Federation(table, ("a", "b", "c"), none, none, none, none[0]))


def serve(folder: Path, name: str, clients: int = 5, **config: str) -> None:
    """What a coordinator does before it has met anybody: there is nobody to meet."""
    (folder / "experiment.toml").write_text(EXPERIMENT.format(name=name, clients=clients), encoding="utf8")
    path = str(folder / f"run of {name}")
    serve_run(cast(Grid, None), {"experiment": "experiment.toml", "folder": path, **config}, folder)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A client's folder: a roster of three that an admin has signed, and its file."""
    admin, client = make_identity(tmp_path / "admin.key"), make_identity(tmp_path / "client.key")
    others = [Identity.of(bytes([50 + i]) * 32).id.hex() for i in range(2)]
    write_roster(collect([client.id.hex(), *others]), tmp_path / "roster.json")
    sign_roster(tmp_path / "roster.json", tmp_path / "admin.key", NOW)
    trust = f'[trust]\nidentity = "client.key"\nroster = "roster.json"\nadmins = ["{admin.id.hex()}"]\n'
    (tmp_path / "client.toml").write_text(trust + "[policy]\nmin_cohort = 3\n", encoding="utf8")
    return tmp_path


def test_a_coordinator_without_a_roster_is_told_which_key_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"roster: is missing in the run config, and secagg\.name is 'full'"):
        serve(tmp_path, "full")
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        serve(tmp_path, "full", roster=str(tmp_path / "none.json"))


def test_a_coordinator_of_two_servers_is_told_what_it_lacks_of_the_second(place: Path) -> None:
    named = replace(read_roster(place / "roster.json"), helper=HelperKey.of(b"\x51" * 32).public, signatures={})
    write_roster(named, place / "named.json")
    config = {"roster": str(place / "roster.json")}
    for change, told in (
        ({}, "helper: is missing in the run config"),
        ({"helper": "h:1"}, "helper-certificate: is missing in the run config"),
        ({"helper-certificate": str(place / "none.pem")}, r"roster: .*roster\.json names no helper"),
        ({"roster": str(place / "named.json")}, r"helper-certificate: .*none\.pem can't be read: No such file"),
    ):
        config |= change
        with pytest.raises(ConfigError, match=told):
            serve(place, "twoserver", **config)


def test_a_deployed_run_of_two_clients_is_refused_before_anything_is_recorded(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"selection\.count: 2 clients in a round; want at least 3"):
        serve(place, "full", clients=2, roster=str(place / "roster.json"))
    assert not (place / "run of full" / "privacy.json").exists()


def test_ranks_are_shared_by_as_many_as_clients_are_taken_to_ask_for() -> None:
    ranks, roster = {0: 4, 1: 4, 2: 8, 3: 8, 4: 8}, Roster((Member(Identity.of(b"\x01" * 32).id),))
    experiment = found("full", adapter={"rank": 8})
    assert Sessions(experiment, roster, Policy(min_slice=2, max_dropout=0.3)).cohort(ranks) == ranks
    assert Sessions(experiment, roster, DEPLOYED).cohort(ranks) == dict.fromkeys(ranks, 4)


def test_a_node_brings_what_its_file_says(place: Path) -> None:
    mine = member(shop(found("full", run="r")), {"trust": str(place / "client.toml")}, place / "state")
    assert mine is not None
    assert (mine.run, mine.suite, mine.policy.min_cohort) == ("r", "full", 3)
    assert mine.identity(0).id in mine.roster().ids
    assert mine.rank(0, 0) == 8  # the experiment's, all of it


def test_a_node_without_trust_takes_no_part_in_a_secure_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"node-config: trust is missing, and this run has secagg\.name = 'full'"):
        member(shop(found("full")), {}, tmp_path)


def test_a_node_with_trust_takes_no_part_in_a_run_in_the_clear(place: Path) -> None:
    plain = shop(found("none"))
    with pytest.raises(ConfigError, match=r"node-config: trust is given, .* this run has secagg\.name = 'none'"):
        member(plain, {"trust": str(place / "client.toml")}, place)
    assert member(plain, {}, place) is None
    assert member(plain, {SIMULATED: True}, place) is None


def test_a_roster_that_goes_stale_while_a_run_goes_on_is_refused_from_then_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = replace(read_roster(place / "roster.json"), expires=NOW + 10, signatures={})
    (place / "roster.json").write_text(fresh.signed(read_identity(place / "admin.key")).to_json(), encoding="utf8")
    clock = SimpleNamespace(time=lambda: NOW)
    monkeypatch.setattr(members, "time", clock)
    mine = member(shop(found("full")), {"trust": str(place / "client.toml")}, place)
    assert mine is not None
    assert len(mine.roster().members) == 3
    clock.time = lambda: NOW + 10
    with pytest.raises(ProtocolError, match="version 1 has expired"):
        mine.roster()
    with pytest.raises(DataError, match=r"roster\.json: roster: version 1 has expired"):
        member(shop(found("full")), {"trust": str(place / "client.toml")}, place)
