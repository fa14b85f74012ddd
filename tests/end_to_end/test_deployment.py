"""Deployed on loopback: one SuperLink with a database, two SuperNodes, real processes."""

from pathlib import Path

import numpy as np
import pytest

from fedpeft.flower import in_process
from tests.end_to_end.fleet import fleet
from tests.end_to_end.toy.toy import build, main

TOY = Path(__file__).parent / "toy"


@pytest.mark.slow
def test_deployed_nodes_end_in_the_same_adapter_as_the_in_process_grid(tmp_path: Path) -> None:
    deployed, here = tmp_path / "deployed", tmp_path / "here"
    for run in (deployed, here):
        run.mkdir()
    with fleet(tmp_path / "flower", ("partition-id=0", "partition-id=1")) as flower:
        flower.run(TOY, {"experiment": "2", "run": str(deployed)}, seconds=240)
    main(in_process(build, 2), {"experiment": "2", "run": str(here)})
    left, right = np.load(deployed / "adapter.npz"), np.load(here / "adapter.npz")
    assert set(left) == set(right) == {"loss", "q/a", "q/b", "bias"}
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])  # numpy alone, one machine: bit for bit
