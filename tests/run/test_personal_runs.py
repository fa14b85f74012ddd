"""Runs whose clients have parts of their own, train for themselves at the end, or get an adapter of their own."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedpeft.config import experiment
from fedpeft.errors import ConfigError
from fedpeft.flower import ClientStore
from fedpeft.report import history
from fedpeft.run import Lines, simulate
from fedpeft.run.forecast import forecast
from fedpeft.run.workshop import workshop

HEAD = "base_model.model.classifier"
SECOND = "base_model.model.bert.encoder.layer.1"
KINDS = {
    "parts": {"personal": {"tensors": ["classifier*", "layer.1.*"]}, "rule": {"name": "flexlora"}},
    "tuned": {"personal": {"tensors": ["*/b"], "finetune": 2}},
    "dual": {"personal": {"dual": True, "finetune": 2, "mix": 0.5}, "rule": {"name": "ffa"}},
}
DROPPED = {"seconds", "seconds_training", "timeline", "started", "command", "settings", "bytes_up", "bytes_down"}
DROPPED |= {"processes"}


class CutError(Exception):
    pass


class Cut(Lines):
    """Stops the run when its first round is over, and when clients begin to train for themselves."""

    def __init__(self, at):
        self.at = at

    def round(self, record, rounds):
        if self.at == record.round:
            raise CutError

    def work(self, what, total):
        if self.at == what:
            raise CutError


@pytest.fixture
def settings(tmp_path):
    rows = [f"{'apple pear' if i % 2 else 'hammer saw'} number {i},{'ab'[i % 2]}" for i in range(90)]
    (tmp_path / "own.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf8")
    return {
        "rounds": 2,
        "model": {"name": "tiny-bert"},
        "data": {"name": str(tmp_path / "own.csv")},
        "partition": {"name": "dirichlet", "clients": 3, "alpha": 0.5},
        "training": {"length": 8, "threads": 1, "lr": 0.01},
        "baselines": {"base": False},
    }


def records(folder):
    found = [json.loads(x) for x in (folder / "metrics.jsonl").read_text(encoding="utf8").splitlines()]
    return [{k: v for k, v in record.items() if k not in DROPPED} for record in found]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_cut_and_resumed_gives_the_same_bytes(settings, tmp_path, kind):
    found = experiment(settings | KINDS[kind])
    whole = simulate(found, tmp_path / "whole", Lines())
    for at in (1, "each client for itself") if found.personal.finetune else (1,):
        with pytest.raises(CutError):
            simulate(found, tmp_path / "cut", Cut(at))
    cut = simulate(found, tmp_path / "cut", Lines())
    assert records(cut) == records(whole)
    for path in sorted(whole.glob("adapter/**/*.safetensors")):
        assert path.read_bytes() == (cut / path.relative_to(whole)).read_bytes()
    stores = [ClientStore(run / "clients") for run in (whole, cut)]
    for client in range(3):
        one, other = (store.load(client, 9) or {} for store in stores)
        assert one.keys() == other.keys()
        assert all(one[n].tobytes() == other[n].tobytes() for n in one)


def test_parts_that_stay_differ_between_clients_and_the_server_has_them_as_they_began(settings, tmp_path):
    found = experiment(settings | KINDS["parts"])
    out = simulate(found, tmp_path / "run", Lines())
    final = history(out).final
    assert (final.central, final.tuned) == (None, None)
    assert len(final.test.clients) == 3
    shared = weights(out / "adapter")
    mine = [weights(out / "adapter" / f"client-{c:06d}") for c in range(3)]
    start = workshop(experiment(settings | KINDS["parts"]).settings_json).trainer.start()
    stay = {n for n in shared if n.startswith((HEAD, SECOND))}
    assert 0 < len(stay) < len(shared)
    for name in shared:
        same = np.array_equal(mine[0][name], mine[1][name])
        assert same is (name not in stay)
        assert np.array_equal(mine[0][name], shared[name]) is (name not in stay)
    np.testing.assert_array_equal(
        shared[f"{SECOND}.attention.self.query.lora_A.weight"], start.layers[f"{SECOND}.attention.self.query"].a
    )
    kept = ClientStore(out / "clients").load(1, 9)
    assert {n.split("/")[1].startswith((HEAD, SECOND)) for n in kept} == {True}


@pytest.mark.slow
def test_what_clients_train_for_themselves_changes_their_scores_and_nothing_else(settings, tmp_path):
    plain = experiment(settings)
    tuned = experiment(settings | {"personal": {"finetune": 2}})
    runs = [simulate(x, tmp_path / name, Lines()) for name, x in (("plain", plain), ("tuned", tuned))]
    one, other = (history(x).final for x in runs)
    assert other.tuned is not None
    assert other.tuned.clients.keys() == other.test.clients.keys()
    assert other.tuned.loss != other.test.loss
    assert replace(other, tuned=None, seconds=0, bytes_up=0, bytes_down=0) == replace(
        one, seconds=0, bytes_up=0, bytes_down=0
    )


def test_a_personal_adapter_that_counts_nothing_leaves_the_scores(settings, tmp_path):
    found = experiment(settings | {"rounds": 1, "personal": {"dual": True, "finetune": 1, "mix": 0.0}})
    final = history(simulate(found, tmp_path / "run", Lines())).final
    for client, score in final.test.clients.items():
        # The shared layers are added in another place, in fp32.
        assert final.tuned.clients[client].loss == pytest.approx(score.loss, rel=1e-5)


def test_a_name_of_no_tensor_is_found_before_the_run_begins(settings):
    with pytest.raises(ConfigError, match=r"^personal.tensors: 'clasifier\*' names no tensor; the nearest are .*class"):
        forecast(experiment(settings | {"personal": {"tensors": ["clasifier*"]}}))
