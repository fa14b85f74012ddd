"""Secure aggregation deployed on loopback: a SuperLink, three SuperNodes and a helper, each its own process.

A SuperNode starts a process for every message, so that what a client keeps of a session goes through bytes each time.
"""

import json
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import Array
from fedpeft.report import RoundRecord, history
from tests.end_to_end.fleet import ROOT, Fleet, fleet, free_port
from tests.end_to_end.people import People, certify, people
from tests.end_to_end.runs import EXPERIMENT, adapter_of, run_in_process, survivors_of

N = 3
CHANGES = ("rounds=1", f"partition.clients={N}", "evaluation.central=false", "evaluation.clients=false")
CLOSE = 1e-5
"""What the adapters of a plain and of a secure run may differ by: weights travel in 65535ths of the cap, 1000, which is
1.5e-4 of the weight of a client with 50 rows, and the mean is off by that part of what changes differ by, which is
under 0.05. The grid's step, 4 / 2^29, is 1000 / 50 times that in the mean, which is less: 1.5e-7."""
PATIENT = ("fleet.patience=400", "selection.deadline=400")
SECONDS = 800
"""For machines that have other things to do: on two idle cores a run takes a minute."""
FULL = [
    ("query", "capabilities"),
    ("query.secure", "secured"),  # keys
    ("train.secure", "secured"),  # shares
    ("train.secure", "secured"),  # vectors
    ("query.secure", "secured"),  # survivors
    ("query.secure", "secured"),  # unmask
]
FAREWELL = ("query.memory", "memory")
"""What each is asked when the run is over."""


@dataclass(frozen=True)
class Deployment:
    """A fleet whose ClientApp is watched, and the people whose nodes are in it."""

    flower: Fleet
    people: People
    app: Path
    folder: Path

    def config(self, secagg: str, run: str, **more: str) -> dict[str, str]:
        """The run config of an experiment with this protocol, in a folder of this name."""
        changes = "; ".join([*CHANGES, *PATIENT, f"secagg.{secagg}"])
        roster = {"roster": str(self.people.roster)}
        return {"experiment": str(EXPERIMENT), "changes": changes, "folder": str(self.folder / run)} | roster | more

    def notes(self, client: int) -> list[dict[str, Any]]:
        """What a client has answered since this was last asked."""
        path = self.people.client(client) / "state" / "watched.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
        return found


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("secure")
    known = people(folder / "people", N)
    with fleet(folder / "flower", tuple(known.node_config(i) for i in range(N))) as flower:
        yield Deployment(flower, known, bundle(folder / "app"), folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Array]:
    """The adapter of the same experiment in the clear, in one process."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run_in_process(folder, CHANGES)
    return adapter_of(folder)


def bundle(folder: Path) -> Path:
    """This repository's app, with a ClientApp that is watched."""
    for part in ("clients", "server"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "simulations").mkdir()
    shutil.copy(EXPERIMENT, folder / "simulations")
    shutil.copy(Path(__file__).with_name("watched.py"), folder / "clients")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    assert '"clients.app:app"' in text
    (folder / "pyproject.toml").write_text(text.replace('"clients.app:app"', '"clients.watched:app"'), encoding="utf8")
    return folder


def check_run(folder: Path, plain: Mapping[str, Array]) -> RoundRecord:
    """That a run has the adapter of the run in the clear, and says what it protects; its only round's record."""
    secure = adapter_of(folder)
    assert secure.keys() == plain.keys()
    for name, x in plain.items():
        np.testing.assert_allclose(secure[name], x, rtol=0, atol=CLOSE, err_msg=name)
    assert survivors_of(folder) == [(0, 1, 2)]
    (record,) = history(folder).rounds
    assert record.refused == ()
    assert record.secure is not None
    assert (record.secure.attempts, record.secure.threshold, record.secure.cut) == (1, N, 0)
    label = json.loads((folder / "privacy.json").read_text())["security"]
    assert label["simulated"] is False
    assert history(folder).run.security == label
    return record


def journal(state: Path, run: str) -> tuple[int, list[tuple[int, int, int]]]:
    """How many sessions a client has begun in all, and the rounds of a run: client, round, whether it is done."""
    if not (state / "secure.sqlite").exists():
        return 0, []
    connection = sqlite3.connect(state / "secure.sqlite")
    try:
        (sessions,) = connection.execute("SELECT count(*) FROM session").fetchone()
        rounds = connection.execute("SELECT client, round, is_done FROM round WHERE run = ?", (run,)).fetchall()
    finally:
        connection.close()
    return sessions, rounds


def name_of(folder: Path) -> str:
    return str(history(folder).run.settings["run"])


@pytest.mark.slow
def test_deployed_nodes_end_in_the_plain_adapter_and_nothing_of_their_session_is_left(
    deployment: Deployment, plain: Mapping[str, Array]
) -> None:
    deployment.flower.run(deployment.app, deployment.config("name=full", "full"), seconds=SECONDS)
    folder = deployment.folder / "full"
    record = check_run(folder, plain)
    phases = record.secure.phases if record.secure else {}
    assert {name: (x.asked, x.answered) for name, x in phases.items()} == dict.fromkeys(
        ("keys", "shares", "vectors", "survivors", "unmask"), (N, N)
    )
    assert json.loads((folder / "privacy.json").read_text())["security"]["protocol"] == "full"
    for client in range(N):
        *notes, last = deployment.notes(client)
        assert [(x["asked"], x["answer"]) for x in notes] == FULL
        assert (last["asked"], last["answer"]) == FAREWELL
        assert all(x["facts"] == {} for x in notes[1:])  # nothing beside the protocol's bytes
        assert notes[0]["facts"]["examples"] is None
        assert len({x["process"] for x in notes}) == len(FULL)
        assert [x["kept"] > 0 for x in notes] == [False, True, True, True, True, False]
        state = deployment.people.client(client) / "state"
        assert journal(state, name_of(folder)) == (1, [(client, 0, 1)])
    for name, secret in deployment.people.secrets().items():
        for path in deployment.folder.rglob("*"):
            if path.is_file() and path.name != name.rpartition("/")[2]:
                assert not any(x in path.read_bytes() for x in (secret, secret.hex().encode())), (name, path)


@pytest.mark.slow
def test_two_servers_end_in_the_plain_adapter_with_one_message_from_each_client(
    deployment: Deployment, plain: Mapping[str, Array]
) -> None:
    known, folder = deployment.people, deployment.folder / "twoserver"
    certificate, private = certify(known.folder / "helper")
    address = f"127.0.0.1:{free_port()}"
    start_helper(deployment.flower, known, address, certificate, private)
    config = deployment.config(
        f"name=twoserver; secagg.min_cohort={N}",
        "twoserver",
        **{"helper": address, "helper-certificate": str(certificate)},
    )
    deployment.flower.run(deployment.app, config, seconds=SECONDS)
    deployment.flower.end("helper")
    record = check_run(folder, plain)
    phases = record.secure.phases if record.secure else {}
    assert {name: (x.asked, x.answered) for name, x in phases.items()} == {"vectors": (N, N), "helper": (1, 1)}
    assert json.loads((folder / "privacy.json").read_text())["security"]["protocol"] == "twoserver"
    log = (deployment.flower.folder / "helper.log").read_text()
    assert log.count(": answered") == 1
    assert "refused" not in log
    for client in range(N):
        *notes, last = deployment.notes(client)
        assert [(x["asked"], x["answer"]) for x in notes] == [FULL[0], ("train.secure", "secured")]
        assert (last["asked"], last["answer"]) == FAREWELL
        assert notes[1]["facts"] == {}
        assert [x["kept"] for x in notes] == [0, 0]
        _, rounds = journal(known.client(client) / "state", name_of(folder))
        assert rounds == [(client, 0, 1)]


@pytest.mark.slow
def test_nodes_without_trust_or_with_a_stale_roster_stop_the_run_and_send_nothing(deployment: Deployment) -> None:
    flower, known, folder = deployment.flower, deployment.people, deployment.folder / "refused"
    known.expire(1)
    flower.end("supernode2")
    flower.start_node(2, known.node_config(2, is_trusting=False))
    begun = [journal(known.client(client) / "state", "") for client in range(N)]
    status, log = flower.submit(deployment.app, deployment.config("name=full", "refused"), seconds=SECONDS)
    assert status.startswith("finished:failed"), log
    said = " ".join(log.split())
    assert "node-config: trust is missing, and this run has secagg.name = 'full'" in said
    assert "roster.json: roster: version 1 has expired" in said
    assert "too few nodes: got 1; want at least 2 of 3" in said
    assert survivors_of(folder) == []
    for client, answer in enumerate(("capabilities", "error", "error")):
        notes = deployment.notes(client)
        assert [(x["asked"], x["answer"]) for x in notes] == [("query", answer)]
        assert journal(known.client(client) / "state", "") == begun[client]
        assert notes[0]["kept"] == 0


def start_helper(flower: Fleet, known: People, address: str, certificate: Path, private: Path) -> None:
    """Start the second server, and return once it listens."""
    here = known.folder / "helper"
    files = {"key": here / "helper.key", "roster": known.roster, "state": here / "state" / "answered.sqlite"}
    tls = {"certificate": certificate, "private-key": private}
    options = [word for key, x in (files | tls).items() for word in (f"--{key}", str(x))]
    flower.start(
        "helper",
        "fedpeft", "helper", *options, "--admin", known.admin, "--address", address, "--min-cohort", str(N),
    )  # fmt: skip
    log, end = flower.folder / "helper.log", time.monotonic() + 60
    while "listening at" not in log.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    assert f"listening at {address}" in log.read_text()
