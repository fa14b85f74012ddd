"""The coordinate-wise median against sorting by hand."""

import numpy as np
import pytest

from fedpeft.rules import Median
from tests.laws.cohorts import cohort, play, start


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5])
def test_each_number_is_the_middle_one_whatever_the_weights(clients):
    state = start()
    updates = cohort(Median(), state, ranks=[3] * clients, seed=2)
    after = play(Median(), state, updates).state.adapter.tensors()
    for name, x in state.adapter.tensors().items():
        each = np.sort(
            np.array([u.trained.tensors()[name] - u.received.tensors()[name] for u, _ in updates.values()]), axis=0
        )
        middle = (each[(clients - 1) // 2] + each[clients // 2]) / 2
        np.testing.assert_allclose(after[name], x + middle, atol=2e-6)  # terms travel in fp32


def test_one_broken_client_does_not_move_the_median_far():
    state = start()
    updates = cohort(Median(), state, ranks=(3, 3, 3, 3), seed=2)
    [first, *_] = updates
    good = [u for c, (u, _) in updates.items() if c != first]
    update, weight = updates[first]
    broken = update.trained.put({n: x * -300 for n, x in update.trained.tensors().items()})
    updates[first] = (type(update)(update.received, broken), weight)
    after = play(Median(), state, updates).state.adapter.tensors()
    for name, x in after.items():
        each = np.array([u.trained.tensors()[name] for u in good])
        assert np.all(x >= each.min(axis=0) - 2e-6)
        assert np.all(x <= each.max(axis=0) + 2e-6)
