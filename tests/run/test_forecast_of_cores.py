"""What clients are foretold to fetch where cores travel: those, and not the factors, which travel once."""

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank
from fedpeft.rounds import WHOLE
from fedpeft.rules import FactorMean, FedSB, Ravan
from fedpeft.run.forecast import fetches

D, K, R = 30, 20, 6
START = Adapter(
    {"q": LowRank(np.ones((R, K), np.float32), np.zeros((D, R), np.float32), 2.0)}, {"bias": np.ones(3, np.float32)}
)


@pytest.mark.parametrize(
    ("rule", "rank", "numbers", "indices"),
    [
        (FactorMean(), WHOLE, R * (D + K), 0),
        (FedSB(), WHOLE, R * R, R),
        (FedSB(), 2, 2 * 2 + R * R, 2 + R),
        (Ravan(seed=0, heads=3), WHOLE, 3 * 2 * 2, R),
        (Ravan(seed=0, heads=3), 2, 3 * 2 * 2, R),
    ],
)
def test_clients_fetch_cores_and_which_directions_they_are_between(rule, rank, numbers, indices):
    rng = np.random.default_rng(0)
    start = START.put({"q/a": rng.normal(size=(R, K)).astype(np.float32)})
    assert fetches(rule, start)(rank) == 4 * (numbers + 3) + 8 * indices
