"""A sweep runs what is not there yet, chooses on validation, and goes on where it stopped."""

import tomllib
from pathlib import Path

import pytest

from fedpeft import sweep
from fedpeft.errors import ConfigError, ProtocolError
from fedpeft.report import History, RoundRecord, RunRecord, Score, Scores
from fedpeft.run import Lines

SWEEP = """
name = "s"
base = "base.toml"
seeds = [1, 2]

[cases.skewed.partition]
alpha = 0.1

[cases.even]
partition = { name = "iid", clients = 3 }

[grid]
"rule.name" = ["fedit", "ffa"]
"""
BASE = """
rounds = 2
[model]
name = "tiny-bert"
[data]
name = "wiki11"
examples = 200
[partition]
name = "dirichlet"
clients = 3
alpha = 0.5
[training]
length = 12
threads = 1
[baselines]
local = true
"""


def written(tmp_path, text=SWEEP):
    (tmp_path / "base.toml").write_text(BASE, encoding="utf8")
    (tmp_path / "s.toml").write_text(text, encoding="utf8")
    return sweep.read(tmp_path / "s.toml")


def test_points_are_cases_times_grid(tmp_path):
    found = sweep.points(written(tmp_path))
    assert [x.name for x in found] == ["skewed, name fedit", "skewed, name ffa", "even, name fedit", "even, name ffa"]
    assert found[0].changes == (("partition.alpha", 0.1), ("rule.name", "fedit"))
    assert found[3].changes == (("partition", {"name": "iid", "clients": 3}), ("rule.name", "ffa"))


def test_the_key_of_a_run_depends_on_what_changes_its_result_alone():
    base = tomllib.loads(BASE)
    assert sweep.key_of(base) == sweep.key_of({**base, "name": "other", "run": "again"})
    assert sweep.key_of(base) != sweep.key_of({**base, "seed": 5})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "s"', "s.toml.base: is missing"),
        ('name = "s"\nbase = "no.toml"', "s.toml.base: no such file"),
        ('name = "s"\nbase = "base.toml"\ngird = 1', "s.toml.gird: no such key; did you mean grid?"),
        (
            'name = "s"\nbase = "base.toml"\n[choose]\nkey = "a"\nvalues = [1]\nseed = 1\nbest = "f1"',
            "choose.best: got 'f1'",
        ),
        ('name = "s"\nbase = "base.toml"\nseeds = []', "s.toml.seeds: got none"),
        (
            'name = "s"\nbase = "base.toml"\n[choose]\nkey = "a"\nvalues = []\nseed = 1',
            "choose.values: got none; want at least one",
        ),
        ('name = "s"\nbase = "base.toml"\n[grid.rule]\nname = ["ffa"]', "s.toml.grid.rule: got a section; want a list"),
        ('name = "s"\nbase = "base.toml"\n[grid]\n"rule.name" = []', "s.toml.grid.rule.name: got an empty list"),
    ],
)
def test_a_bad_sweep_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        written(tmp_path, text)
    assert str(error.value).startswith(message)


def test_large_settings_may_be_written_as_sections_and_leave_the_rest_of_a_section_alone(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sweep, "simulate", lambda found, path, view, baselines: seen.append(found))
    found = written(tmp_path, 'name = "s"\nbase = "base.toml"\nseeds = [1]\n[large.partition]\nclients = 7')
    sweep.run_all(found, tomllib.loads(BASE), tmp_path / "runs", Lines(), large=True)
    assert [(x.partition.clients, x.partition.alpha) for x in seen] == [(7, 0.5)]


CHOICE = 'name = "s"\nbase = "base.toml"\nseeds = [2]\n[choose]\nkey = "training.lr"\nvalues = [9e9, 1e-3]\nseed = 1'


def test_a_value_that_diverges_is_not_chosen_and_does_not_stop_the_sweep(tmp_path, monkeypatch):
    ran = []

    def simulate(found, path, view, baselines):
        if found.training.lr > 1:
            raise ProtocolError("3 rounds in a row had too few answers")
        ran.append((found.seed, found.training.lr))

    one = RoundRecord(1, validation=Scores(0.5, 0.75, {0: Score(0.5, 0.75, 4)}))
    monkeypatch.setattr(sweep, "simulate", simulate)
    monkeypatch.setattr(sweep, "history", lambda path: History(path, RunRecord("s"), (one,)))
    view = Counting()
    sweep.run_all(written(tmp_path, CHOICE), tomllib.loads(BASE), tmp_path / "runs", view)
    assert ran == [(1, 1e-3), (2, 1e-3)]
    assert any("training.lr = 9e+09 is left out: 3 rounds in a row" in x for x in view.notes)
    with pytest.raises(ConfigError, match=r"^choose\.values: s: no run with training\.lr = 9e\+09 could be judged"):
        sweep.run_all(written(tmp_path, CHOICE.replace(", 1e-3", "")), tomllib.loads(BASE), tmp_path / "runs", view)


class Counting(Lines):
    def __init__(self):
        self.rounds, self.notes = 0, []

    def note(self, text):
        self.notes.append(text)

    def round(self, record, rounds):
        self.rounds += 1


@pytest.mark.slow
def test_a_sweep_that_stopped_goes_on_and_one_that_is_done_runs_nothing(tmp_path):
    text = (
        'name = "s"\nbase = "base.toml"\nseeds = [1, 2]\n[choose]\nkey = "training.lr"\nvalues = [1e-3, 1e-2]\nseed = 1'
    )
    found, base = written(tmp_path, text), tomllib.loads(BASE)
    first = Counting()
    done = sweep.run_all(found, base, tmp_path / "runs", first)
    assert first.rounds == 2 * 3  # two learning rates on seed 1, the better one again on seed 2 alone
    assert any("has the best validation accuracy" in x for x in first.notes)
    assert [len(x) for x in done.values()] == [2]
    again = Counting()
    assert sweep.run_all(found, base, tmp_path / "runs", again) == done
    assert again.rounds == 0
    last = Path(done["s"][1])
    for path in (last / "checkpoints").glob("round-00002*"):
        path.unlink()
    third = Counting()
    sweep.run_all(found, base, tmp_path / "runs", third)
    assert third.rounds == 1
