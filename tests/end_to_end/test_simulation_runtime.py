"""Under Flower's own simulation runtime, as ``flwr run`` starts it: Ray actors in other processes."""

from pathlib import Path

import numpy as np
import pytest

from fedpeft.flower import in_process
from tests.end_to_end.fleet import fleet
from tests.end_to_end.toy.toy import build, main

TOY = Path(__file__).parent / "toy"
RESOURCES = {"num-supernodes": 3, "client-resources-num-cpus": 1, "init-args-num-cpus": 2}


@pytest.mark.slow
def test_the_simulation_runtime_ends_in_the_same_adapter_as_the_in_process_grid(tmp_path: Path) -> None:
    simulated, here = tmp_path / "simulated", tmp_path / "here"
    for run in (simulated, here):
        run.mkdir()
    with fleet(tmp_path / "flower", (), simulation=True) as flower:
        flower.run(
            TOY,
            {"experiment": "3", "run": str(simulated)},
            seconds=240,
            federation=RESOURCES,
        )
    main(in_process(build, 3), {"experiment": "3", "run": str(here)})
    left, right = np.load(simulated / "adapter.npz"), np.load(here / "adapter.npz")
    assert set(left) == set(right) == {"loss", "q/a", "q/b", "bias"}
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])  # numpy alone, one machine: bit for bit
