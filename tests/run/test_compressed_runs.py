"""Runs whose messages are coded: near the run that codes nothing, and as few bytes as the codec says."""

import numpy as np
import pytest

from fedpeft.adapters import same
from fedpeft.channel import Coding
from fedpeft.config import experiment
from fedpeft.errors import ConfigError
from fedpeft.flower import ClientStore
from fedpeft.report import RunFolder, history
from fedpeft.rules import Task
from fedpeft.run import Lines, forecast, simulate
from fedpeft.run.compression import bytes_up
from fedpeft.run.workshop import workshop

SETTINGS = {
    "rounds": 3,
    "seed": 4,
    "model": {"name": "tiny-bert"},
    "data": {"name": "wiki11", "examples": 120},
    "partition": {"name": "iid", "clients": 3},
    "adapter": {"rank": 16, "targets": ["query", "value"]},
    "training": {"length": 8, "threads": 1, "lr": 0.01},
    "baselines": {"base": False},
    "evaluation": {"exactness": False, "clients": False},
}
RECORD = 700
"""Bytes of a manifest, at most."""


def ran(path, up="none", down="none", **changes):
    found = experiment(SETTINGS | {"compression": {"up": up, "down": down}} | changes)
    simulate(found, path, Lines())
    return history(path), RunFolder.open(path).checkpoints.load().state.adapter, found


def flat(adapter) -> np.ndarray:
    return np.concatenate([x.ravel() for x in adapter.tensors().values()]).astype(np.float64)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(
    ("up", "near"),
    [("bf16", 0.02), ("int8", 0.05), ("int4", 0.15), ("ternary", 0.9), ("sign", 0.9), ("topk", 0.95)],
)
def test_a_run_with_a_codec_ends_near_the_one_without_and_sends_what_the_codec_says(tmp_path, plain, up, near):
    h, adapter, found = ran(tmp_path / "run", up)
    start = flat(workshop(found.settings_json).trainer.start())
    moved, want = flat(adapter) - start, flat(plain[1]) - start
    # How far from the end of the run without: bounds are about twice what is measured.
    assert np.linalg.norm(moved - want) < near * np.linalg.norm(want)
    spec = workshop(found.settings_json).trainer.start().spec
    coding = Coding(found.compression.codec_up, found.rule.layout(Task(spec)))
    most = bytes_up(found, Task(spec))
    assert most == coding.most + 4 * (coding.behind + 5)
    for round in h.rounds:
        assert (round.survivors, round.refused) == ((0, 1, 2), ())
        # zstd saves a part, more of what is mostly zeros: in the first round a does not move.
        assert 3 * 0.3 * most < round.bytes_up < 3 * (most + RECORD)
        assert round.bytes_up < 0.6 * plain[0].rounds[0].bytes_up
    assert forecast(found).bytes_up == most


def test_the_adapters_change_goes_down_and_the_run_ends_near_the_one_that_sends_all(tmp_path, plain):
    h, adapter, _ = ran(tmp_path / "run", down="int8")
    bytes_down = [x.bytes_down for x in h.rounds]
    assert bytes_down[0] == pytest.approx(plain[0].rounds[0].bytes_down, rel=0.05)
    for now, without in zip(bytes_down[1:], plain[0].rounds[1:], strict=True):
        assert now < 0.4 * without.bytes_down
    moved = flat(adapter) - flat(plain[1])
    assert 0 < np.linalg.norm(moved) < 0.01 * np.linalg.norm(flat(plain[1]))
    # What clients ended with is what the server keeps of it, to the last bit.
    server, client = (ClientStore(tmp_path / "run" / x).load(-17, 99) for x in ("versions", "clients"))
    assert set(server) - set(client) == {"source"}
    assert all(server[n].tobytes() == x.tobytes() for n, x in client.items())


@pytest.mark.parametrize(("up", "down"), [("topk", "int8"), ("int4", "int4")])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tmp_path, up, down):
    _, whole, found = ran(tmp_path / "whole", up, down)
    ran(tmp_path / "cut", up, down)
    RunFolder.open(tmp_path / "cut").checkpoints.files()[-1].unlink()
    simulate(found, tmp_path / "cut", Lines())
    assert same(RunFolder.open(tmp_path / "cut").checkpoints.load().state.adapter, whole)


def test_what_sign_leaves_out_is_kept_by_the_client_and_forgotten_when_its_rank_changes(tmp_path):
    _, _, found = ran(tmp_path / "run", "sign")
    state = ClientStore(tmp_path / "run" / "clients").load(1, 99)
    left = {n for n in state if n.startswith("left/")}
    spec = workshop(found.settings_json).trainer.start().spec
    places = Coding(found.compression.codec_up, found.rule.layout(Task(spec))).places
    assert left == {f"left/{n}" for n in places} | {"left/said"}
    assert any(state[f"left/{n}"].any() for n in places)
    assert state["left/said"].tobytes().decode() == f"Sign() {[16] * len(spec.layers)}"


def test_a_turn_of_one_factor_keeps_what_was_left_out_of_the_other(tmp_path):
    rule = {"name": "rolora"}
    ran(tmp_path / "run", "topk", rule=rule)
    store = ClientStore(tmp_path / "run" / "clients")
    first, second = store.at(0, 0), store.at(0, 1)
    of = {part: {n for n in first if n.startswith("left/") and n.endswith(f"/{part}")} for part in "ab"}
    assert of["b"]
    assert not of["a"]
    assert all(second[n].tobytes() == first[n].tobytes() for n in of["b"])
    assert {n for n in second if n.endswith("/a") and n.startswith("left/")}


def test_clients_of_low_ranks_send_few_bytes_and_ranks_have_versions_of_their_own(tmp_path):
    ranks = {"name": "listed", "by_client": [2, 16, 16]}
    h, _, _ = ran(tmp_path / "run", "int4", "int8", ranks=ranks, rule={"name": "zeropad"})
    assert all(x.survivors == (0, 1, 2) for x in h.rounds)
    store = ClientStore(tmp_path / "run" / "versions")
    shapes = {rank: store.load(-1 - rank, 99) for rank in (2, 16)}
    assert {x.shape[0] for n, x in shapes[2].items() if n.endswith("/a")} == {2}
    assert {x.shape[0] for n, x in shapes[16].items() if n.endswith("/a")} == {16}


@pytest.mark.parametrize("rule", ["subspace", "flora", "median"])
def test_rules_that_send_other_things_than_factors_can_be_coded_too(tmp_path, rule):
    h, _, _ = ran(tmp_path / "run", "int8", "int8", rule={"name": rule}, rounds=2)
    plain, _, _ = ran(tmp_path / "plain", rule={"name": rule}, rounds=2)
    assert all(x.survivors == (0, 1, 2) for x in h.rounds)
    assert h.bytes_up < 0.55 * plain.bytes_up
    # Factors may be turned, so it is what they do that is compared; the loss falls by 0.1 in these rounds.
    assert h.final.central.loss == pytest.approx(plain.final.central.loss, abs=0.005)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"compression": {"up": "int5"}},
            r"compression\.up: got 'int5'; want one of 'none', 'bf16', 'int8', 'int4', 't",
        ),
        ({"compression": {"share": 0.0}}, r"compression\.share: got 0\.0; want more than 0 and at most 1"),
        (
            {"compression": {}, "secagg": {"name": "full"}, "evaluation": {}},
            r"compression\.up: got 'int4', and under secure aggregation .* a smaller channel\.modulus, such as 16",
        ),
        (
            {"compression": {"up": "none"}, "secagg": {"name": "full"}, "evaluation": {}},
            r"compression\.down: got 'int8', and with secagg\.name clients check the digest .*; want 'none'",
        ),
        ({"compression": {}, "channel": {"exact": True}}, r"channel\.exact: sends each number in full, .*; want false"),
        (
            {"compression": {"up": "sign"}, "rule": {"name": "subspace"}},
            r"compression\.up: got 'sign', which sends later what it leaves out, and what subspace .*want 'int4'",
        ),
        (
            {"compression": {"up": "topk"}, "rule": {"name": "median"}},
            r"compression\.up: got 'topk', which sends later",
        ),
        (
            {"compression": {}, "simulation": {"devices": {"phone": {"gflops": 1.0}}}},
            r"compression\.down: got 'int8', and with simulation\.devices who holds which .*; want 'none'",
        ),
        (
            {"compression": {}, "schedule": {"name": "buffered"}},
            r"compression\.down: got 'int8', and with schedule\.name = 'buffered' clients .*; want 'none'",
        ),
    ],
)
def test_what_codecs_can_not_go_with_is_refused_by_key(changes, why):
    with pytest.raises(ConfigError, match=f"^{why}"):
        experiment(SETTINGS | changes)


def test_a_codec_that_would_code_nothing_is_refused_by_check_and_by_run_alike(tmp_path):
    small = {
        "adapter": {"rank": 2, "targets": ["query"]},
        "data": SETTINGS["data"],
        "personal": {"tensors": ["classifier*"]},
    }
    for up, down, key in (("int4", "none", "up"), ("none", "int8", "down")):
        found = experiment(SETTINGS | small | {"compression": {"up": up, "down": down}})
        why = (
            rf"^compression\.{key}: got '{found.compression.up if key == 'up' else down}', which is for tensors of 256 "
        )
        with pytest.raises(ConfigError, match=why):
            forecast(found)
        with pytest.raises(ConfigError, match=why):
            simulate(found, tmp_path / key, Lines())


def test_without_the_section_nothing_is_coded_and_with_it_the_usual_is():
    none = experiment({k: v for k, v in SETTINGS.items() if k != "compression"})
    assert (none.compression.up, none.compression.down) == ("none", "none")
    assert "compression" not in none.settings
    assert none == experiment(SETTINGS | {"compression": {"up": "none", "down": "none"}})
    usual = experiment(SETTINGS | {"compression": {}})
    assert (usual.compression.up, usual.compression.down) == ("int4", "int8")
    assert usual.settings["compression"] == {"up": "int4", "down": "int8", "share": 0.1, "values": "int8"}
    assert experiment(usual.settings) == usual
    topk = experiment(SETTINGS | {"compression": {"up": "topk", "share": 0.25, "values": "int4"}}).compression.codec_up
    assert str(topk) == "TopK(share=0.25, values=Steps(bits=4))"
