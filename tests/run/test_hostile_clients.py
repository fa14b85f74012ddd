"""Hostile clients of a simulation: who they are, what they send, and that nothing else changes."""

import math

import numpy as np
import pytest
import tomli_w

from fedpeft.adapters import same
from fedpeft.config import experiment
from fedpeft.errors import ConfigError
from fedpeft.flower import InProcessGrid
from fedpeft.report import RunFolder, history
from fedpeft.rounds import Failed, Job
from fedpeft.run import Lines, serve_run, simulate
from fedpeft.run.hostile import Attacker, is_hostile, moved, simulated
from fedpeft.run.node import participant
from fedpeft.run.panel import panel
from fedpeft.run.ranks import check_clients
from fedpeft.run.workshop import workshop
from tests.flower.linear import LinearTrainer, start

CLIENTS = 5


def settings(folder, **changes):
    rows = [f"{'apple pear' if i % 2 else 'hammer saw'} number {i},{'ab'[i % 2]}" for i in range(80)]
    (folder / "own.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf8")
    base = {
        "rounds": 2,
        "model": {"name": "tiny-bert"},
        "data": {"name": str(folder / "own.csv")},
        "partition": {"name": "iid", "clients": CLIENTS},
        "training": {"length": 8, "threads": 1},
        "weighting": {"name": "uniform"},
        "channel": {"exact": True},
        "simulation": {"hostile": {"share": 0.5, "strength": 3.0}},
    }
    return base | changes


def plain(**hostile):
    return experiment({"data": {"name": "wiki11"}, "simulation": {"hostile": {"share": 0.3} | hostile}})


def test_so_many_are_hostile_as_the_share_makes_rounded_down_drawn_by_the_seed():
    found = plain()
    for clients, want in ((20, 6), (10, 3), (7, 2), (4, 1), (3, 0)):
        assert sum(is_hostile(found, c, clients) for c in range(clients)) == want
    mine = [c for c in range(20) if is_hostile(found, c, 20)]
    others = [
        [c for c in range(20) if is_hostile(experiment(found.settings | {"seed": s}), c, 20)] for s in range(1, 4)
    ]
    assert mine != list(range(6))
    assert len({tuple(x) for x in (mine, *others)}) == 4
    assert not is_hostile(experiment({"data": {"name": "wiki11"}}), 0, 20)


def test_a_share_that_makes_nobody_hostile_is_refused():
    check_clients(plain(), 4)
    with pytest.raises(ConfigError, match=r"^simulation.hostile.share: got 0.3, which is less than one of 3 clients"):
        check_clients(plain(), 3)


def pair(found, job):
    """One job done honestly, and as a client of this experiment does it."""
    (done,) = LinearTrainer().train_many([job])
    (told,) = Attacker(LinearTrainer(), found, 20).train_many([job])
    return done, told


def job(found, wanted, trains="ab"):
    client = next(c for c in range(20) if is_hostile(found, c, 20) is wanted)
    return Job(client, 3, 11, start(), trains)


def test_a_flipped_change_is_turned_round_and_scaled():
    found = plain(strength=4.0)
    work = job(found, True)
    done, told = pair(found, work)
    was, now, lie = (x.tensors() for x in (work.start, done.trained, told.trained))
    for name in was:
        want = was[name] - 4.0 * (now[name].astype(np.float64) - was[name])
        np.testing.assert_array_equal(lie[name], want.astype(np.float32))
        assert not np.array_equal(lie[name], was[name])
    assert told.metrics == done.metrics
    assert told.kept is not None


def test_noise_has_the_norm_of_what_was_trained_times_the_strength_and_is_another_every_time():
    found = plain(attack="noise", strength=2.0)
    work = job(found, True)
    done, told = pair(found, work)
    was = work.start.tensors()

    def change(x):
        return np.concatenate([(x.tensors()[n].astype(np.float64) - was[n]).ravel() for n in was])

    mine, honest = change(told.trained), change(done.trained)
    np.testing.assert_allclose(np.linalg.norm(mine), 2 * np.linalg.norm(honest), rtol=1e-5)  # fp32's rounding
    assert abs(mine @ honest) < 0.9 * np.linalg.norm(mine) * np.linalg.norm(honest)
    other = Job(work.client, 4, 12, start())
    again = change(pair(found, work)[1].trained)
    np.testing.assert_array_equal(again, mine)
    assert not np.allclose(change(pair(found, other)[1].trained), mine)


@pytest.mark.parametrize("attack", ["flip", "noise"])
def test_what_is_not_trained_is_not_attacked(attack):
    found = plain(attack=attack)
    _, told = pair(found, job(found, True, "b"))
    assert np.array_equal(told.trained.layers["q"].a, start().layers["q"].a)
    assert not np.array_equal(told.trained.layers["q"].b, start().layers["q"].b)
    assert not np.array_equal(told.trained.dense["bias"], start().dense["bias"])


def test_what_stays_on_a_client_stays_as_it_was_trained():
    found = experiment(plain().settings | {"rule": {"name": "fedsa"}})
    work = job(found, True)
    done, told = pair(found, work)
    assert moved(work.start, done.trained, found.rule) == ["q/a"]
    assert moved(work.start, work.start, found.rule) == []
    assert np.array_equal(told.trained.layers["q"].b, done.trained.layers["q"].b)
    assert np.array_equal(told.trained.dense["bias"], done.trained.dense["bias"])
    assert not np.array_equal(told.trained.layers["q"].a, done.trained.layers["q"].a)


def test_the_honest_and_those_that_fail_are_left_alone():
    found = plain()
    done, told = pair(found, job(found, False))
    assert same(done.trained, told.trained)
    bad = job(found, True)
    (failed,) = Attacker(LinearTrainer(fails=frozenset({bad.client})), found, 20).train_many([bad])
    assert failed == Failed("out of memory")
    attacker = Attacker(LinearTrainer(), found, 20)
    assert (attacker.base, same(attacker.start(), start())) == ("linear-5x4", True)


def test_a_run_has_the_mean_of_the_lies_and_evaluates_the_honest(tmp_path, capsys):
    found = experiment(settings(tmp_path, rounds=1, baselines={"base": True}))
    simulate(found, tmp_path / "run", Lines())
    bad = [c for c in range(CLIENTS) if is_hostile(found, c, CLIENTS)]
    good = [c for c in range(CLIENTS) if c not in bad]
    told = f"baselines are of {len(good)} clients, those of the {CLIENTS} not hostile"
    assert told in capsys.readouterr().out.splitlines()
    assert len(bad) == math.floor(0.5 * CLIENTS)
    here = workshop(found.settings_json)
    before = here.trainer.start()
    jobs = [Job(c, 0, seed_of(found, c), before) for c in range(CLIENTS)]
    done = list(here.trainer.train_many(jobs))
    after = RunFolder.open(tmp_path / "run").checkpoints.load().state.adapter.tensors()
    for name, was in before.tensors().items():
        changes = [x.trained.tensors()[name].astype(np.float64) - was for x in done]
        want = sum((-3.0 if c in bad else 1.0) * changes[c] for c in range(CLIENTS)) / CLIENTS
        # A lie is rounded to fp32, as is what the server keeps.
        np.testing.assert_allclose(after[name] - was, want, rtol=0, atol=1e-6 * max(1.0, float(np.abs(was).max())))
    h = history(tmp_path / "run")
    assert h.rounds[0].survivors == tuple(range(CLIENTS))
    assert sorted(h.rounds[0].validation.clients) == sorted(h.final.test.clients) == good
    assert sorted(h.baselines["base"].clients) == good
    assert panel(found, range(CLIENTS)) == tuple(good)
    assert [c for c, x in h.run.clients.items() if x.hostile] == bad
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf8")
    who = f"{len(bad)} of {CLIENTS} clients ({', '.join(map(str, bad))}) were hostile"
    assert f"{who} and sent their change turned round, times 3." in report


def seed_of(found, client):
    from fedpeft.rounds import derive

    return derive(found.seed, "train", 0, client)


def test_a_resumed_run_has_the_same_hostile_clients_and_ends_the_same(tmp_path):
    quick = {"evaluation": {"clients": False, "central": False}, "baselines": {"base": False}}
    found = experiment(settings(tmp_path, **quick))
    simulate(found, tmp_path / "whole", Lines())
    simulate(found, tmp_path / "cut", Lines())
    folder = RunFolder.open(tmp_path / "cut")
    folder.checkpoints.files()[-1].unlink()
    simulate(experiment(found.settings), tmp_path / "cut", Lines())
    ends = [RunFolder.open(tmp_path / x).checkpoints.load().state.adapter for x in ("whole", "cut")]
    assert same(*ends)


def test_only_simulated_nodes_are_hostile(tmp_path):
    found = experiment(settings(tmp_path))
    assert isinstance(
        simulated(found.settings_json, {"partition-id": 0, "state": str(tmp_path / "a")}).trainer, Attacker
    )
    deployed = participant(found.settings_json, {"partition-id": 0, "state": str(tmp_path / "a")})
    assert deployed.trainer is workshop(found.settings_json).trainer
    (tmp_path / "own.toml").write_text(tomli_w.dumps(settings(tmp_path)), encoding="utf8")
    with pytest.raises(ConfigError, match=r"^simulation.hostile: "):
        serve_run(InProcessGrid(lambda *_: iter(()), []), {"experiment": str(tmp_path / "own.toml")})
