"""A simulated run: what it loads, and what it does not depend on."""

import sys

import pytest

import fedpeft.run.workshop as workshops
from fedpeft.config import experiment
from fedpeft.report import history
from fedpeft.run import Lines, simulate
from fedpeft.training.cohort import CohortTrainer


@pytest.fixture
def settings(tmp_path):
    rows = [f"{'apple pear' if i % 2 else 'hammer saw'} number {i},{'ab'[i % 2]}" for i in range(60)]
    (tmp_path / "own.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf8")
    return {
        "rounds": 1,
        "model": {"name": "tiny-bert"},
        "data": {"name": str(tmp_path / "own.csv")},
        "partition": {"name": "iid", "clients": 3},
        "training": {"length": 8, "threads": 1},
    }


def test_a_run_and_its_baselines_share_one_base_model_and_one_federation(settings, tmp_path, monkeypatch):
    made = []
    load, federate = CohortTrainer.load, workshops.federate
    monkeypatch.setattr(CohortTrainer, "load", lambda *x: made.append("base") or load(*x))
    monkeypatch.setattr(workshops, "federate", lambda *x: made.append("federation") or federate(*x))
    simulate(experiment(settings), tmp_path / "run", Lines())
    assert "base" in history(tmp_path / "run").baselines
    assert made == ["federation", "base"]


def test_a_slow_machine_loses_no_client(settings, tmp_path):
    limits = {"selection": {"deadline": 1e-9}, "fleet": {"wait": 1e-9}}
    simulate(experiment(settings | limits), tmp_path / "run", Lines())
    (only,) = history(tmp_path / "run").rounds
    assert (only.survivors, only.refused) == ((0, 1, 2), ())


def test_a_run_whose_baseline_can_not_be_measured_has_its_report_and_adapter(settings, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(sys.modules["fedpeft.run.simulate"], "measure", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        simulate(experiment(settings), tmp_path / "run", Lines())
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
