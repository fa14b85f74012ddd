"""Deployed on loopback: one SuperLink with a database, two SuperNodes, real processes, run by ``flwr run``."""

import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fedpeft.flower import in_process
from tests.end_to_end.fleet import ROOT, fleet
from tests.end_to_end.runs import EXPERIMENT, adapter_of, run_in_process, survivors_of
from tests.end_to_end.toy.toy import build, main

TOY = Path(__file__).parent / "toy"
NODES = ("partition-id=0", "partition-id=1")
ROUNDS = 5  # of which the first is over before the second node is started, and the last begins long after that


@pytest.mark.slow
def test_deployed_nodes_of_a_numpy_model_end_in_the_adapter_of_the_in_process_grid(tmp_path: Path) -> None:
    deployed, here = tmp_path / "deployed", tmp_path / "here"
    for run in (deployed, here):
        run.mkdir()
    with fleet(tmp_path / "flower", NODES) as flower:
        flower.run(TOY, {"experiment": "2", "run": str(deployed)}, seconds=240)
    main(in_process(build, 2), {"experiment": "2", "run": str(here)})
    left, right = np.load(deployed / "adapter.npz"), np.load(here / "adapter.npz")
    assert set(left) == set(right) == {"loss", "q/a", "q/b", "bias"}
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])  # numpy alone, one machine: bit for bit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "nodes", "said", "listed"),
    [
        ("fedsa", NODES, "evaluation.every=2", "evaluation.every=2"),  # with state of each client's own, and constants
        (
            "subspace",  # in two passes, with ranks that the nodes say for themselves
            tuple(f"{node} rank={rank}" for node, rank in zip(NODES, (1, 3), strict=True)),
            "ranks={name='memory', levels=[1, 2, 3]}; rounds=1; evaluation.clients=false",
            "ranks={name='listed', by_client=[1, 3]}; rounds=1; evaluation.clients=false",
        ),
    ],
)
def test_a_deployed_experiment_ends_in_the_adapter_of_the_in_process_run(
    tmp_path: Path, rule: str, nodes: tuple[str, ...], said: str, listed: str
) -> None:
    with fleet(tmp_path / "flower", nodes) as flower:
        changes = f"rule.name={rule}; {said}"
        config = {"experiment": str(EXPERIMENT), "changes": changes, "folder": str(tmp_path / "deployed")}
        flower.run(ROOT, config, seconds=400)
    run_in_process(tmp_path / "here", [f"rule.name={rule}", *listed.split("; ")])
    left, right = adapter_of(tmp_path / "deployed"), adapter_of(tmp_path / "here")
    assert left.keys() == right.keys()
    for name, x in left.items():
        np.testing.assert_allclose(x, right[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_killed_node_is_left_out_at_the_deadline_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "deployed"
    changes = "selection.deadline=45; fleet.wait=120; evaluation.clients=false"
    with fleet(tmp_path / "flower", NODES) as flower:

        def kill_after_the_first_round() -> None:
            until = time.monotonic() + 300
            while time.monotonic() < until and not survivors_of(folder):
                time.sleep(0.1)
            flower.end("supernode1", signal.SIGKILL)

        killer = threading.Thread(target=kill_after_the_first_round)
        killer.start()
        config = {"experiment": str(EXPERIMENT), "changes": changes, "folder": str(folder)}
        flower.run(ROOT, config, seconds=400)
        killer.join()
    assert survivors_of(folder) == [(0, 1), (0,)]


@pytest.mark.slow
def test_a_node_that_comes_after_the_run_has_begun_takes_part_from_then_on(tmp_path: Path) -> None:
    folder = tmp_path / "deployed"
    changes = f"rounds={ROUNDS}; fleet.wait=20; evaluation.clients=false"
    with fleet(tmp_path / "flower", NODES[:1]) as flower:

        def start_the_second_after_the_first_round() -> None:
            until = time.monotonic() + 300
            while time.monotonic() < until and not survivors_of(folder):
                time.sleep(0.1)
            flower.start_node(1, NODES[1])

        late = threading.Thread(target=start_the_second_after_the_first_round)
        late.start()
        config = {"experiment": str(EXPERIMENT), "changes": changes, "folder": str(folder)}
        flower.run(ROOT, config, seconds=500)
        late.join()
    survivors = survivors_of(folder)
    joined = survivors.index((0, 1))
    assert survivors == [(0,)] * joined + [(0, 1)] * (ROUNDS - joined)
    assert joined >= 1
