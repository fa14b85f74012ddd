"""Under Flower's own simulation runtime, as ``flwr run`` starts it: Ray actors in other processes."""

from pathlib import Path

import numpy as np
import pytest

from fedpeft.flower import in_process
from tests.end_to_end.fleet import ROOT, fleet
from tests.end_to_end.runs import EXPERIMENT, adapter_of, run_in_process
from tests.end_to_end.toy.toy import build, main

TOY = Path(__file__).parent / "toy"


def resources(clients: int) -> dict[str, int]:
    """This many nodes, over two actors: so a client's messages don't all reach one process."""
    return {"num-supernodes": clients, "client-resources-num-cpus": 1, "init-args-num-cpus": 2}


@pytest.mark.slow
def test_the_simulation_runtime_ends_a_numpy_model_in_the_adapter_of_the_in_process_grid(tmp_path: Path) -> None:
    simulated, here = tmp_path / "simulated", tmp_path / "here"
    for run in (simulated, here):
        run.mkdir()
    with fleet(tmp_path / "flower", (), simulation=True) as flower:
        flower.run(TOY, {"experiment": "3", "run": str(simulated)}, seconds=240, federation=resources(3))
    main(in_process(build, 3), {"experiment": "3", "run": str(here)})
    left, right = np.load(simulated / "adapter.npz"), np.load(here / "adapter.npz")
    assert set(left) == set(right) == {"loss", "q/a", "q/b", "bias"}
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])  # numpy alone, one machine: bit for bit


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fedit"])
def test_a_simulated_experiment_ends_in_the_adapter_of_the_in_process_run(tmp_path: Path, rule: str) -> None:
    changes = [f"rule.name={rule}"]
    with fleet(tmp_path / "flower", (), simulation=True) as flower:
        config = {"experiment": str(EXPERIMENT), "changes": ";".join(changes), "folder": str(tmp_path / "simulated")}
        flower.run(ROOT, config, seconds=400, federation=resources(2))
    run_in_process(tmp_path / "here", changes)
    left, right = adapter_of(tmp_path / "simulated"), adapter_of(tmp_path / "here")
    assert left.keys() == right.keys()
    for name, x in left.items():
        np.testing.assert_allclose(x, right[name], rtol=0, atol=1e-6, err_msg=name)
