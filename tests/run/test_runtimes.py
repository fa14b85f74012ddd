"""Clients of one run on trainers that differ: who gets which, in what order, and what one of them breaks."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, same
from fedpeft.config.runtimes import Runtime
from fedpeft.errors import ConfigError
from fedpeft.rounds import Done, Failed, Job, Metrics, Trial
from fedpeft.run.runtimes import MixedTrainer

PLAIN, PACKED, DEVICE = Runtime("torch", "none"), Runtime("torch", "nf4"), Runtime("onnx", "int8")


def start():
    layer = LowRank(np.ones((2, 3), np.float32), np.zeros((4, 2), np.float32), 0.5)
    return Adapter({"q": layer}, {"bias": np.arange(4, dtype=np.float32)}, {"drawn": np.arange(3)})


@dataclass(frozen=True, slots=True)
class Scripted:
    """A trainer whose results say that they are its own, with a log of what it is asked, and when.

    breaks: clients at which it raises.
    """

    name: str
    log: list[str] = field(default_factory=list)
    breaks: frozenset[int] = frozenset()
    base: str = "base"
    begins: Adapter = field(default_factory=start)
    settings: object = None

    def start(self):
        return self.begins

    def over(self, federation, training):
        return replace(self, settings=(federation, training))

    def train_many(self, jobs):
        self.log.append(f"{self.name}: {[x.client for x in jobs]}")
        for job in jobs:
            self.log.append(f"{self.name} trains {job.client}")
            if job.client in self.breaks:
                raise RuntimeError("no memory")
            yield Done(job.start, Metrics(float(job.client), 1.0), {self.name: np.zeros(1, np.float32)})

    def evaluate_many(self, trials):
        self.log.append(f"{self.name}: {[x.client for x in trials]}")
        for trial in trials:
            if trial.client in self.breaks:
                raise RuntimeError("no memory")
            yield Metrics(-1.0 if trial.client is None else float(trial.client), 1.0, len(self.name))


def fleet(breaks=()):
    """Clients 0, 3, … are on plain torch, 1, 4, … on packed, 2, 5, … on a device."""
    log = []
    kinds = (PLAIN, PACKED, DEVICE)
    members = {x: Scripted(str(x), log, frozenset(breaks)) for x in kinds}
    return MixedTrainer.of(members, lambda client: kinds[client % 3], PLAIN), log


def jobs(*clients):
    return [Job(client, 0, client, start()) for client in clients]


def owner(done):
    return next(iter(done.kept))


def test_each_job_is_done_by_its_clients_runtime_and_results_are_in_the_order_of_the_jobs():
    mixed, log = fleet()
    asked = [5, 0, 3, 2, 4, 6, 1]
    done = list(mixed.train_many(jobs(*asked)))
    assert [x.metrics.loss for x in done] == asked
    names = {0: "torch", 1: "torch nf4", 2: "onnx int8"}
    assert [owner(x) for x in done] == [names[client % 3] for client in asked]
    lists = [line for line in log if "trains" not in line]
    assert lists == ["onnx int8: [5, 2]", "torch: [0, 3, 6]", "torch nf4: [4, 1]"]  # one list each, in order


def test_nothing_is_trained_before_its_result_is_asked_for():
    mixed, log = fleet()
    going = mixed.train_many(jobs(0, 1, 3))
    assert log == []
    next(going)
    assert log == ["torch: [0, 3]", "torch trains 0"]
    next(going)
    assert log[2:] == ["torch nf4: [1]", "torch nf4 trains 1"]
    next(going)
    assert log[4:] == ["torch trains 3"]
    assert list(going) == []


def test_what_breaks_one_runtime_is_no_other_clients_affair():
    mixed, _ = fleet(breaks={1})
    failed, *others = mixed.train_many(jobs(1, 0, 2, 4, 7))
    assert failed == Failed("RuntimeError: no memory")
    assert [(x.metrics.loss, owner(x)) for x in others] == [
        (0, "torch"),
        (2, "onnx int8"),
        (4, "torch nf4"),
        (7, "torch nf4"),
    ]


def test_each_trial_is_measured_on_its_clients_runtime_and_the_central_test_set_on_the_one_for_it():
    mixed, log = fleet(breaks={5})
    asked = [4, None, 5, 2, 0, None]
    found = list(mixed.evaluate_many([Trial(x, "test", start()) for x in asked]))
    assert found.pop(2) == Failed("RuntimeError: no memory")
    assert [x.loss for x in found] == [4, -1, 2, 0, -1]
    assert [x.correct for x in found] == [len(x) for x in ("torch nf4", "torch", "onnx int8", "torch", "torch")]
    assert log[:2] == ["torch nf4: [4]", "torch: [None, 0, None]"]


def test_a_fleet_of_other_data_is_the_same_fleet_of_it():
    mixed, _ = fleet()
    other = mixed.over("federation", "training")
    assert {x.settings for x in other.members.values()} == {("federation", "training")}
    assert {x.settings for x in mixed.members.values()} == {None}
    assert [owner(x) for x in other.train_many(jobs(2, 0))] == ["onnx int8", "torch"]


def test_the_fleet_has_the_base_and_the_start_that_all_share():
    mixed, _ = fleet()
    assert mixed.base == "base"
    assert same(mixed.start(), start())


def one_other(**changes):
    return MixedTrainer.of({PLAIN: Scripted("a"), DEVICE: Scripted("b", **changes)}, lambda client: PLAIN, PLAIN)


def test_a_member_of_another_base_is_refused():
    with pytest.raises(ConfigError, match=r"^simulation.runtimes: onnx int8 has base other and torch base; want one"):
        one_other(base="other")


@pytest.mark.parametrize(
    ("begins", "name"),
    [
        (start().put({"q/b": np.full((4, 2), 1e-30, np.float32)}), "q/b"),
        (replace(start(), dense={"bias": np.zeros(4, np.float32)}), "bias"),
        (replace(start(), fixed={"drawn": np.arange(3)[::-1].copy()}), "fixed/drawn"),
        (replace(start(), fixed={}), "fixed/drawn"),
        (replace(start(), layers={"q": replace(start().layers["q"], scale=0.25)}), "its scales"),
    ],
)
def test_a_member_that_begins_with_another_adapter_is_refused_by_the_tensor(begins, name):
    one_other()
    with pytest.raises(ConfigError, match=f"onnx int8 and torch begin with different adapters, first in {name};"):
        one_other(begins=begins)
