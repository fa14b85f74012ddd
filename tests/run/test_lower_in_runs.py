"""A run that keeps what the lower layers make of texts ends where the run without ends, and its memory is foretold."""

import numpy as np
import pytest

from fedpeft.config import experiment
from fedpeft.report import RunFolder
from fedpeft.run import Lines, forecast, node, simulate
from fedpeft.run.needs import Needs
from fedpeft.run.workshop import workshop

SETTINGS = {
    "rounds": 2,
    "seed": 4,
    "model": {"name": "tiny-bert"},
    "data": {"name": "wiki11", "examples": 120},
    "partition": {"name": "iid", "clients": 3},
    "adapter": {"rank": 4, "layers": 1},
    "baselines": {"base": False},
    "evaluation": {"exactness": False},
}
KEEPING = {"training": {"length": 8, "threads": 1, "lower": "bf16"}}


def found(lower):
    training = {"length": 8, "threads": 1, "lr": 0.01, "lower": lower}
    return experiment(SETTINGS | {"training": training})


def change(path, lower):
    """What the adapter has become, less what it was."""
    what = found(lower)
    simulate(what, path, Lines())
    end = RunFolder.open(path).checkpoints.load().state.adapter.tensors()
    start = workshop(what.settings_json).trainer.start().tensors()
    return np.concatenate([(x - start[n]).ravel() for n, x in end.items()]).astype(np.float64)


def test_a_run_ends_where_the_run_without_ends(tmp_path):
    """In bf16, of which Adam makes a change of any size: 0.03 was seen."""
    want, got = (change(tmp_path / lower, lower) for lower in ("none", "bf16"))
    assert 0 < np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)


@pytest.mark.parametrize("secret", [False, True])
def test_a_node_is_judged_by_the_client_with_most_texts_and_under_secure_aggregation_by_none(secret, monkeypatch):
    """A participant is made without the client's number, and may serve any; what refuses it may be told."""
    secagg = {"secagg": {"name": "full"}, "partition": {"name": "dirichlet", "clients": 4, "alpha": 0.5}}
    what = experiment(SETTINGS | (secagg if secret else {"partition": secagg["partition"]}) | KEEPING)
    sizes = [sum(x) for x in workshop(what.settings_json).federation.sizes()]
    assert sizes[0] < max(sizes)
    seen = []
    monkeypatch.setattr(node, "member", lambda *_: None)
    monkeypatch.setattr(node, "sparing", lambda: None)
    monkeypatch.setattr(node, "keep_within", lambda *given: seen.append(given[-1]))
    node.participant(what.settings_json, {"memory": "2GB"})
    assert seen == [None if secret else max(sizes)]


def test_what_is_kept_is_in_the_memory_of_a_simulation_and_of_a_device():
    plain, keeping = found("none"), found("bf16")
    texts = len(workshop(keeping.settings_json).federation.used())
    assert 100 < texts <= 120
    assert forecast(keeping).memory - forecast(plain).memory == texts * 8 * 24 * 2
    more, less = (Needs(workshop(x.settings_json).trainer) for x in (keeping, plain))
    assert more.of(7, 2) - less.of(7, 2) == 7 * 8 * 24 * 2
    assert more.of(9, 2) - less.of(9, 2) == 9 * 8 * 24 * 2
