"""Whole simulated runs of rules with a half on the client, cut off and not, in both engines."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fedpeft.config import experiment
from fedpeft.flower import ClientStore
from fedpeft.report import RunFolder
from fedpeft.run import Lines, simulate

SCAFFOLD = {
    "rule": {"name": "scaffold"},
    "training": {"optimiser": "sgd", "lr": 0.1, "batch": 4, "length": 8, "threads": 1},
    "weighting": {"name": "uniform"},
}
HETLORA = {"rule": {"name": "hetlora", "gamma": 0.7, "penalty": 5.0}}
PERSONAL = SCAFFOLD | {"personal": {"tensors": ["*classifier*"]}}


class StoppedError(Exception):
    pass


class Impatient(Lines):
    """Stops within the third round, when a client has answered."""

    rounds = 0

    def round(self, *args: Any) -> None:
        Lines.round(self, *args)
        self.rounds += 1

    def advance(self) -> None:
        if self.rounds == 2:
            raise StoppedError


@pytest.fixture
def settings(tmp_path):
    rows = [f"{'apple pear' if i % 2 else 'hammer saw'} number {i},{'ab'[i % 2]}" for i in range(72)]
    (tmp_path / "own.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf8")
    return {
        "rounds": 3,
        "model": {"name": "tiny-bert"},
        "adapter": {"rank": 4},
        "data": {"name": str(tmp_path / "own.csv")},
        "partition": {"name": "iid", "clients": 4},
        "training": {"length": 8, "threads": 1},
        "selection": {"count": 3},
        "evaluation": {"clients": False},
        "baselines": {"base": False},
    }


@pytest.mark.parametrize("rule", [SCAFFOLD, HETLORA, PERSONAL], ids=["scaffold", "hetlora", "scaffold, personal head"])
def test_a_run_that_was_cut_off_ends_in_the_same_bits(settings, tmp_path, rule: Mapping[str, Any]) -> None:
    found = experiment(settings | rule)
    simulate(found, tmp_path / "whole", Lines())
    with pytest.raises(StoppedError):
        simulate(found, tmp_path / "broken", Impatient())
    assert any(ClientStore(tmp_path / "broken" / "clients").at(client, 2) for client in range(4))
    simulate(found, tmp_path / "broken", Lines())
    mine, other = (RunFolder.open(tmp_path / x).checkpoints.files()[-1] for x in ("broken", "whole"))
    assert mine.read_bytes() == other.read_bytes()
    if rule is HETLORA:  # under a large penalty
        store = ClientStore(tmp_path / "whole" / "clients")
        ranks = [float(x) for i in range(4) for n, x in (store.load(i, 99) or {}).items() if n.endswith("/rank")]
        assert 1 <= min(ranks) <= max(ranks) < 4  # only what was cut is kept


def test_the_engines_agree_and_the_servers_variate_is_the_mean_of_the_clients(settings, tmp_path) -> None:
    states = {}
    for engine in ("loop", "cohort"):
        simulate(experiment(settings | SCAFFOLD | {"simulation": {"engine": engine}}), tmp_path / engine, Lines())
        states[engine] = RunFolder.open(tmp_path / engine).checkpoints.load().state
        store = ClientStore(tmp_path / engine / "clients")
        each = [store.load(client, 99) or {} for client in range(4)]
        assert sum(map(bool, each)) == 4
        for name, c in states[engine].memory.items():
            mean = sum(x.get(f"rule/{name}", np.zeros_like(c)) for x in each) / 4
            np.testing.assert_allclose(c, mean, atol=1e-6)  # fp32 of numbers below 1, added up in three rounds
        assert max(np.abs(c).max() for c in states[engine].memory.values()) > 1e-3
    loop, cohort = (x.adapter.tensors() for x in states.values())
    assert max(float(np.abs(x - cohort[n]).max()) for n, x in loop.items()) <= 2e-6  # a dozen steps of sgd each
