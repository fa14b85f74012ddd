"""Runs whose clients train with different things."""

import numpy as np
import pytest

from fedpeft.adapters import same
from fedpeft.config import experiment
from fedpeft.config.runtimes import Runtime
from fedpeft.errors import ConfigError
from fedpeft.report import RunFolder, history
from fedpeft.rounds import Job
from fedpeft.run import Lines, forecast, serve_run, simulate
from fedpeft.run.runtimes import runtime_of
from fedpeft.run.workshop import workshop
from fedpeft.training.memory import RUNTIME

CLIENTS = 6
TORCH = {"torch": 1, "torch nf4": 1, "torch int8": 1}


def settings(runtimes=TORCH, formats=("none", "nf4", "int8"), **more):
    return {
        "rounds": 2,
        "model": {"name": "tiny-bert", "formats": list(formats)},
        "data": {"name": "wiki11", "examples": 260},
        "partition": {"name": "iid", "clients": CLIENTS},
        "adapter": {"rank": 4, "targets": ["query", "value"]},
        "ranks": {"name": "levels", "levels": [2, 4]},
        "rule": {"name": "subspace"},
        "training": {"batch": 8, "length": 24, "lr": 1e-2, "threads": 1, "device": "cpu"},
        "evaluation": {"exactness": False},
        "baselines": {"base": True},
        "simulation": {"runtimes": runtimes},
    } | more


def test_each_client_trains_as_on_its_own_runtime_alone():
    found = experiment(settings())
    here = workshop(found.settings_json)
    start = here.trainer.start()
    jobs = [Job(client, 0, client, start) for client in range(CLIENTS)]
    done = list(here.fleet.train_many(jobs))
    alone = {}
    for runtime, member in here.fleet.members.items():
        mine = [x for x in jobs if runtime_of(found, x.client, CLIENTS) == runtime]
        alone[runtime] = dict(zip([x.client for x in mine], member.train_many(mine), strict=True))
        assert len(mine) == CLIENTS // 3
    for client, x in enumerate(done):
        runtime = runtime_of(found, client, CLIENTS)
        assert same(x.trained, alone[runtime][client].trained)
    assert sorted(m.frozen.quantise for m in here.fleet.members.values()) == ["int8", "nf4", "none"]
    assert here.fleet.members[Runtime("torch", "none")] is here.trainer


def test_a_mixed_run_learns_says_who_was_on_what_and_goes_on_where_it_was_cut_off(tmp_path):
    found = experiment(settings())
    folder = simulate(found, tmp_path / "run", Lines())
    h = history(folder)
    assert h.rounds[1].train.loss < h.rounds[0].train.loss
    told = {client: str(runtime_of(found, client, CLIENTS)) for client in range(CLIENTS)}
    assert {client: x.runtime for client, x in h.run.clients.items()} == told
    assert sorted(told.values()) == ["torch", "torch", "torch int8", "torch int8", "torch nf4", "torch nf4"]
    report = (folder / "report.html").read_text(encoding="utf8")
    assert "<h2>Clients by runtime</h2>" in report
    assert '<th scope="row" class="n">torch nf4</th><td class="n">2</td>' in report
    assert len(h.baselines["base"].clients) == CLIENTS
    assert {(x.rank, f"{x.runtime} {x.quantise}") for x in h.memory.devices} <= {
        (rank, f"torch {quantise}") for rank in (2, 4) for quantise in ("none", "nf4", "int8")
    }
    assert sorted(client for x in h.memory.devices for client in x.clients) == list(range(CLIENTS))
    assert {x.measured for x in h.memory.devices} == {None}
    assert all(RUNTIME < x.predicted < RUNTIME + 10e6 for x in h.memory.devices)
    ((name, size),) = h.memory.processes
    assert name == "the simulation"
    assert size > 300e6  # torch and its libraries
    assert "<h2>Memory of devices</h2>" in report
    checkpoints = RunFolder.open(folder).checkpoints
    whole = checkpoints.load().state.adapter
    checkpoints.files()[-1].unlink()
    assert checkpoints.load().state.task.round == 1
    simulate(experiment(found.settings), folder, Lines(), baselines=False)
    assert same(checkpoints.load().state.adapter, whole)


def test_a_forecast_counts_the_clients_of_each_runtime_and_the_memory_of_each_base():
    ahead = forecast(experiment(settings()))
    assert ahead.runtimes == (("torch", 2), ("torch int8", 2), ("torch nf4", 2))
    alone = forecast(experiment(settings({})))
    assert alone.runtimes == ()
    assert alone.memory < ahead.memory


def test_runtimes_are_not_for_real_clients(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.toml").write_text('[data]\nname = "wiki11"\n[simulation.runtimes]\ntorch = 1\n', encoding="utf8")
    with pytest.raises(ConfigError, match=r"^simulation\.runtimes: is for `fedpeft run`: each real client says in its"):
        serve_run(None, {"experiment": "x.toml"}, tmp_path)


MIXED = {"torch": 1, "torch nf4": 1, "onnx int8": 1}


def change(found, folder):
    """What a run has made of its adapter, in one vector."""
    was = workshop(found.settings_json).trainer.start().tensors()
    state = RunFolder.open(folder).checkpoints.load().state
    now = {n: x.product() for n, x in state.adapter.layers.items()} | dict(state.adapter.dense)
    for n, layer in state.tail.items():
        now[n] = now[n] + layer.product()
    return np.concatenate([(x - was[n] if n in was else x).ravel() for n, x in sorted(now.items())])


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["subspace", "ffa"])
def test_a_fleet_with_clients_on_onnx_ends_near_one_that_is_all_on_torch_in_the_clear_and_in_secret(rule, tmp_path):
    quiet = {"evaluation": {"exactness": False, "clients": False}, "baselines": {"base": False}}
    # Five of the six have the larger rank: of fewer, nobody would train it in secret.
    ranks = {"name": "levels", "levels": [2, 4], "shares": [1, 5]}
    common = {"rule": {"name": rule}, "weighting": {"cap": 100}, "ranks": ranks, **quiet}
    cases = {
        "torch": settings({}, **common),
        "mixed": settings(MIXED, **common),
        "secret": settings(MIXED, **common, secagg={"name": "full"}),
    }
    ends, losses = {}, {}
    for name, case in cases.items():
        found = experiment(case)
        folder = simulate(found, tmp_path / name, Lines())
        ends[name] = change(found, folder)
        h = history(folder)
        assert [len(x.survivors) for x in h.rounds] == [CLIENTS, CLIENTS]
        losses[name] = h.final.central.loss

    def near(one, other):
        return ends[one] @ ends[other] / np.linalg.norm(ends[one]) / np.linalg.norm(ends[other])

    # Of a base in 4 bits a third of the gradients are 0.9 in cosine, and adamw's first steps are their signs.
    assert near("mixed", "torch") > 0.9
    assert near("secret", "mixed") > 0.999
    assert abs(losses["mixed"] - losses["torch"]) < 0.05
