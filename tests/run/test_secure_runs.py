"""Whole simulated runs under secure aggregation: they end as in the clear, or stop with the reason."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fedpeft.run.members
import fedpeft.run.simulated
from fedpeft.channel.ring import widest
from fedpeft.errors import ConfigError, ProtocolError
from fedpeft.rules import ServerState
from fedpeft.run.simulated import simulated_admin, simulated_identity, simulated_roster
from fedpeft.secagg import Roster
from fedpeft.secagg.messages import Kind
from tests.run.secured import CAP, Ended, Wire, ended, rows, run_of, spoils

COUNTS = (4, 7, 12, 5, 9, 14, 6, 8, 20, 11, 10, 13)
N = len(COUNTS)
LOST = {"losses": {"share": 0.3}}
FULL = {"name": "full"}
DOUBLE = 2.0**-23  # of a number, as much as fp32 may round it off twice


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows(tmp_path_factory.mktemp("secure") / "own.csv", COUNTS)


def step(found: Ended) -> float:
    """What no number of the mean may be off by: a client's is off by less than one step of the grid, and the mean of
    those with weights w by less than the number of clients over the sum of w / CAP."""
    (only,) = found.history.rounds
    trained = found.history.run.clients
    share = sum(min(trained[c].examples, CAP) for c in only.survivors) / CAP
    steps = 2 ** (widest(32, N) - 1) - 1
    return 4.0 / steps * len(only.survivors) / share


def apart(one: ServerState, other: ServerState) -> tuple[float, float]:
    """How far two adapters are from each other at most, factor by factor, and change by change; beside what is due to
    fp32."""
    mine, theirs = one.adapter.tensors(), other.adapter.tensors()
    factors = max(float((np.abs(x - theirs[n]) - DOUBLE * np.abs(x)).max()) for n, x in mine.items())
    pairs = [(x.product(), other.adapter.layers[n].product()) for n, x in one.adapter.layers.items()]
    changes = max(float((np.abs(x - y) - 8 * DOUBLE * np.abs(x).max()).max()) for x, y in pairs)
    leaves = max(float(np.abs(x - other.adapter.dense[n]).max()) for n, x in one.adapter.dense.items())
    return factors, max(changes, leaves - DOUBLE)


# By how much the last step of a rule makes the mean's error larger. fedit, ffa and rolora add the mean to the adapter.
# zeropad takes a share of a's numbers, all below 1, off it, which doubles it; hetlora divides by a mean norm of ΔW,
# here a tenth or so, and by its own error (measured: 5). The others factorise the mean, so that only the products can
# be alike: a mean of them is off by no more than the mean (measured: a tenth, since factors are small).
FACTORS = {"fedit": 1.0, "ffa": 1.0, "rolora": 1.0, "zeropad": 2.0, "hetlora": 20.0}
PRODUCTS = {"subspace": 2.0, "fedsvd": 2.0}


def settled(rule: str) -> dict[str, object]:
    """A rule whose clients prune nothing, as those of secure runs don't."""
    return {"name": rule} | ({"gamma": 1.0} if rule == "hetlora" else {})


@pytest.mark.parametrize("rule", [*FACTORS, *PRODUCTS])
def test_a_run_ends_as_in_the_clear_with_those_who_were_not_lost(table: Path, tmp_path: Path, rule: str) -> None:
    both = ("full", "twoserver") if rule in ("fedit", "subspace") else ("full",)
    found = {
        name: ended(
            run_of(table, rule=settled(rule), secagg={"name": name}, simulation=LOST), tmp_path / f"{rule}-{name}"
        )
        for name in ("none", *both)
    }
    clear = found["none"]
    (expected,) = clear.history.rounds
    assert len(expected.survivors) == N - 3
    assert clear.history.run.security == {}
    assert not (clear.path / "privacy.json").exists()
    for name in both:
        (got,) = found[name].history.rounds
        # Who vanishes after its vector is in the sum is in both.
        assert (got.survivors, got.asked) == (expected.survivors, expected.asked)
        assert got.secure is not None
        assert (got.secure.attempts, got.secure.cut, dict(got.secure.culprits)) == (1, 0, {})
        assert got.train is not None
        assert expected.train is not None
        assert (got.train.examples, got.train.accuracy) == (expected.train.examples, expected.train.accuracy)
        assert got.train.loss == pytest.approx(expected.train.loss, abs=2**-10)  # in steps of 2^-10
        factors, changes = apart(clear.state, found[name].state)
        limit = step(found[name])
        if rule in FACTORS:
            assert factors <= FACTORS[rule] * limit
        else:
            assert changes <= PRODUCTS[rule] * limit
    moved = max(float(np.abs(x.product()).max()) for x in clear.state.adapter.layers.values())
    assert moved > 1e3 * step(clear)


def test_fifty_clients_on_a_ring_end_as_in_the_clear(tmp_path: Path) -> None:
    few = rows(tmp_path / "own.csv", [3] * 50)
    one = {"rule": {"name": "ffa"}, "simulation": {"losses": {"share": 0.06}}, "ranks": {"name": "whole"}}
    clear = ended(run_of(few, **one), tmp_path / "clear")
    ring = ended(run_of(few, secagg={"name": "kregular"}, **one), tmp_path / "ring")
    (expected,), (got,) = clear.history.rounds, ring.history.rounds
    assert got.survivors == expected.survivors
    assert len(got.survivors) == 47
    assert got.secure is not None
    assert got.secure.threshold == 11  # of 16 neighbours
    assert list(got.secure.phases) == ["keys", "shares", "vectors", "survivors", "unmask"]
    trained = ring.history.run.clients
    share = sum(min(trained[c].examples, CAP) for c in got.survivors) / CAP
    limit = 4.0 / (2 ** (widest(32, 50) - 1) - 1) * 47 / share
    assert apart(clear.state, ring.state)[0] <= limit


def stopped(wire: Wire, table: Path, path: Path, **more: object) -> list[str]:
    """Why clients were refused in a run that stops after its first round; nobody has given away a share of a mask, or
    anything in the clear."""
    with pytest.raises(
        ProtocolError, match=r"1 rounds in a row had too few answers; see .*metrics\.jsonl for the reasons"
    ):
        ended(run_of(table, **{"secagg": FULL, **more}), path)  # type: ignore[arg-type]
    assert {x.parcel.kind for x in wire.sent} <= {"capabilities", "secured", "error"}
    assert wire.kinds[Kind.UNMASK.name] == 0
    (only,) = Ended(path, ()).history.rounds
    assert only.survivors == ()
    assert only.secure is not None
    return [why for _, why in only.refused]


def test_with_fewer_clients_than_policies_allow_a_run_does_not_begin(tmp_path: Path, monkeypatch) -> None:
    wire = Wire().tap(monkeypatch)
    with pytest.raises(ConfigError, match=r"selection\.count: 4 clients in a round; want at least 5 under secure"):
        ended(run_of(rows(tmp_path / "own.csv", [4] * 4), secagg=FULL), tmp_path / "run")
    assert wire.sent == []
    assert wire.jobs == []


def test_when_too_many_vanish_the_run_stops_and_no_mask_comes_off(table: Path, tmp_path: Path, monkeypatch) -> None:
    wire = Wire().tap(monkeypatch)
    told = stopped(wire, table, tmp_path / "run", simulation={"losses": {"share": 0.6}})
    assert sum("the node is gone" in why for why in told) > N - 9


def test_clients_with_another_roster_than_the_coordinators_stop_the_run_before_they_train(
    table: Path, tmp_path: Path, monkeypatch
) -> None:
    """The coordinator's has one who is unknown to the clients, as if it had made that one up."""
    wire = Wire().tap(monkeypatch)
    monkeypatch.setattr(fedpeft.run.members, "simulated_roster", without(3))
    told = stopped(wire, table, tmp_path / "run")
    assert len(told) == N
    assert all(why.endswith("goes no further: roster") for why in told)
    assert wire.kinds == {"ABORT": N}
    assert wire.jobs == []


def test_a_client_that_is_not_in_the_roster_is_not_asked_and_the_others_go_on(
    table: Path, tmp_path: Path, monkeypatch
) -> None:
    wire = Wire().tap(monkeypatch)
    monkeypatch.setattr(fedpeft.run.members, "simulated_roster", without(3))
    monkeypatch.setattr(fedpeft.run.simulated, "simulated_roster", without(3))
    (only,) = ended(run_of(table, secagg=FULL), tmp_path / "run").history.rounds
    assert only.refused == ((3, "is not in the roster"),)
    assert only.survivors == tuple(c for c in range(N) if c != 3)
    assert {x.client for x in wire.sent if x.parcel.kind == "secured"} == set(only.survivors)
    assert {job.client for job, _ in wire.jobs} == set(only.survivors)


@pytest.mark.parametrize("name", ["full", "twoserver"])
def test_a_roster_that_has_expired_stops_the_run_before_anybody_trains(
    table: Path, tmp_path: Path, monkeypatch, name: str
) -> None:
    wire = Wire().tap(monkeypatch)
    for module in (fedpeft.run.members, fedpeft.run.simulated):
        monkeypatch.setattr(module, "simulated_roster", stale)
    told = stopped(wire, table, tmp_path / "run", secagg={"name": name})
    assert len(told) == N
    assert all("roster: version 1 has expired" in why for why in told)
    assert wire.kinds == {}
    assert wire.jobs == []


def without(client: int) -> Callable[[str, int], Roster]:
    """A roster that this one is not in."""

    def roster(run: str, clients: int) -> Roster:
        made = simulated_roster(run, clients)
        left = tuple(x for x in made.members if x.id != simulated_identity(run, client).id)
        return replace(made, members=left, signatures={}).signed(simulated_admin(run))

    return roster


def stale(run: str, clients: int) -> Roster:
    """A roster that was in force long ago."""
    return replace(simulated_roster(run, clients), expires=1.0, signatures={}).signed(simulated_admin(run))


@pytest.mark.parametrize(
    ("secagg", "code"),
    [
        ({"name": "full", "fraction": 0.5}, "threshold"),
        ({"name": "full", "consistency": False}, "consistency"),
        ({"name": "twoserver", "max_dropout": 0.6}, "threshold"),
    ],
)
def test_what_clients_policies_do_not_allow_stops_the_run_before_they_train(
    table: Path, tmp_path: Path, monkeypatch, secagg: dict[str, object], code: str
) -> None:
    wire = Wire().tap(monkeypatch)
    told = stopped(wire, table, tmp_path / "run", secagg=secagg)
    assert len(told) == N
    assert all(why.endswith(code) for why in told)
    assert wire.kinds == {"ABORT": N}
    assert wire.jobs == []


def test_a_cheat_is_named_and_left_out_and_nobody_trains_twice(table: Path, tmp_path: Path, monkeypatch) -> None:
    wire = Wire(lambda client, message: spoils(client, message, 5)).tap(monkeypatch)
    found = ended(run_of(table, rounds=2, secagg=FULL), tmp_path / "run")
    first, second = found.history.rounds
    honest = tuple(c for c in range(N) if c != 5)
    assert first.survivors == second.survivors == honest
    assert first.secure is not None
    assert second.secure is not None
    assert (first.secure.attempts, second.secure.attempts) == (2, 1)
    assert list(first.secure.culprits) == [5]
    assert "conflicts over what was dealt" in first.secure.culprits[5]
    assert [why for client, why in first.refused if client == 5] == [first.secure.culprits[5]]
    assert dict(second.secure.culprits) == {}
    # Asked in the first attempt and never again; and each has trained once a round, whatever the attempts.
    assert [x.envelope.kind for x in wire.sent if x.client == 5 and x.parcel.kind == "secured"] == [
        Kind.KEYS,
        Kind.SHARES,
        Kind.VECTOR,
    ]
    trained = sorted((job.round, job.client) for job, _ in wire.jobs)
    assert trained == [(0, c) for c in range(N)] + [(1, c) for c in honest]
    assert "<b>Left out after cheating</b></p><ul><li>client 5: is in " in (found.path / "report.html").read_text()


def test_a_run_says_what_it_hides_in_its_folder_and_its_report(table: Path, tmp_path: Path) -> None:
    found = ended(run_of(table, secagg=FULL), tmp_path / "run")
    said = json.loads((found.path / "privacy.json").read_text())
    assert said == {"schema": 1, "security": found.history.run.security, "differential_privacy": None}
    label = said["security"]
    assert (label["protocol"], label["simulated"]) == ("full", True)
    assert label["dropouts"] == pytest.approx(3 / 12)  # 9 of 12 stay
    assert label["corrupt"] == pytest.approx(5 / 12)  # 2 · 9 - 12 - 1
    (only,) = found.history.rounds
    assert only.secure is not None
    assert only.secure.threshold == 9
    assert {name: (x.asked, x.answered) for name, x in only.secure.phases.items()} == dict.fromkeys(
        ["keys", "shares", "vectors", "survivors", "unmask"], (N, N)
    )
    assert sum(x.bytes_up for x in only.secure.phases.values()) == only.bytes_up
    assert sum(x.bytes_down for x in only.secure.phases.values()) == only.bytes_down
    page = (found.path / "report.html").read_text()
    assert "<h2>Secure aggregation: full</h2><p><b>Simulated:</b>" in page
    assert "Stands against 42 % of a round’s clients corrupt and 25 % lost." in page
    assert "No number was cut at the ring’s range." in page
