"""Trimmed mean, Krum and multi-Krum, by sorting and by counting.

Sources: Yin et al., arXiv:1803.01498, algorithm 1; Blanchard et al., arXiv:1703.02757, sections 3 and 6.
"""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from fedpeft.adapters import Update
from fedpeft.channel import PlainChannel
from fedpeft.errors import ProtocolError
from fedpeft.rules import Krum, TrimmedMean
from tests.laws.cohorts import cohort, play, start

EXACT = PlainChannel(largest_norm=1e6, exact=True)


def change(update):
    """All that a client moved, as one vector, directions that it lacks included."""
    out = []
    for name, x in update.trained.layers.items():
        y, r = update.received.layers[name], {"q": 3, "v": 2}[name]
        out.append(np.pad(x.a - y.a, ((0, r - x.rank), (0, 0))).ravel())
        out.append(np.pad(x.b - y.b, ((0, 0), (0, r - x.rank))).ravel())
    return np.concatenate(out + [(x - update.received.dense[n]).ravel() for n, x in update.trained.dense.items()])


def server_change(before, after):
    return change(Update(before.adapter, after.adapter))


@pytest.mark.parametrize(
    ("count", "share", "out"),
    [(1, 0.3, 0), (2, 0.3, 0), (3, 0.3, 1), (3, 0.1, 1), (4, 0.3, 1), (5, 0.3, 2), (5, 0.2, 1), (5, 0.0, 0),
     (10, 0.3, 3), (10, 0.49, 4), (9, 0.34, 4), (25, 0.28, 7), (10, 0.3 + 5e-11, 3), (10, 0.3 + 2e-10, 4)],
)  # fmt: skip
def test_a_trimmed_mean_leaves_out_the_ends(count, share, out):
    state = start()
    clients = cohort(TrimmedMean(share), state, [(3, 1, 2)[i % 3] for i in range(count)], 4)
    got = server_change(state, play(TrimmedMean(share), state, clients, EXACT).state)
    each = np.array([change(u) for u, _ in clients.values()])
    want = [np.mean(sorted(column)[out : count - out]) for column in each.T]
    np.testing.assert_allclose(got, want, atol=1e-12)


def krum_scores(vectors, hostile):
    """Each client's sum of squared distances to its n − f − 2 nearest others, over all ways to choose them."""
    scores = []
    for i, x in enumerate(vectors):
        others = [np.linalg.norm(x - y) ** 2 for j, y in enumerate(vectors) if j != i]
        scores.append(min(sum(some) for some in combinations(others, len(vectors) - hostile - 2)))
    return scores


@pytest.mark.parametrize(
    ("count", "share", "hostile"),
    [(5, 0.2, 1), (7, 0.2, 1), (7, 0.3, 2), (4, 0.2, 0), (8, 0.0, 0), (10, 0.3 - 5e-11, 3), (10, 0.3 - 2e-10, 2)],
)
@pytest.mark.parametrize("many", [False, True])
def test_krum_takes_the_change_nearest_to_those_around_it(count, share, hostile, many):
    state, rule = start(), Krum(share, many)
    for seed in range(3):
        clients = cohort(rule, state, [(3, 1, 2)[i % 3] for i in range(count)], seed)
        got = server_change(state, play(rule, state, clients, EXACT).state)
        vectors = [change(u) for u, _ in clients.values()]
        order = np.argsort(krum_scores(vectors, hostile))
        best = order[: count - hostile] if many else order[:1]
        np.testing.assert_allclose(got, np.mean([vectors[i] for i in best], axis=0), atol=1e-12)


@pytest.mark.parametrize("count", [1, 2])
def test_krum_takes_the_first_of_two_that_are_as_far_from_each_other(count):
    state, rule = start(), Krum()
    clients = cohort(rule, state, [3] * count)
    got = server_change(state, play(rule, state, clients, EXACT).state)
    np.testing.assert_allclose(got, change(clients[min(clients)][0]), atol=1e-12)


@pytest.mark.parametrize(("count", "hostile"), [(4, 1), (6, 2), (8, 3)])
def test_krum_refuses_a_round_in_which_too_many_may_be_hostile(count, hostile):
    share = hostile / count
    state, rule = start(), Krum(share)
    want = f"got {count}, of which {hostile} may be hostile .rule.share.; want more than {2 * hostile + 2}"
    with pytest.raises(ProtocolError, match=want):
        play(rule, state, cohort(rule, state, [3] * count))
    play(rule, state, cohort(rule, state, [3] * (2 * hostile + 3)))


@pytest.mark.parametrize("rule", [Krum(0.3), Krum(0.3, many=True), TrimmedMean(0.3)], ids=repr)
def test_hostile_clients_do_not_move_the_result_far(rule):
    state = start()
    clients = cohort(rule, state, [3] * 10, 1)
    honest = [change(u) for u, _ in list(clients.values())[3:]]
    for client in list(clients)[:3]:
        u, _ = clients[client]
        moved = {n: y - 100 * (u.trained.tensors()[n] - y) for n, y in u.received.tensors().items()}
        clients[client] = (replace(u, trained=u.received.put(moved)), 1e4)
    got = server_change(state, play(rule, state, clients, EXACT).state)
    assert np.all(got >= np.min(honest, axis=0) - 1e-9)
    assert np.all(got <= np.max(honest, axis=0) + 1e-9)


@pytest.mark.parametrize("rule", [Krum, TrimmedMean])
@pytest.mark.parametrize("share", [-0.1, 0.5, 0.9])
def test_a_share_of_hostile_clients_out_of_range_is_refused(rule, share):
    with pytest.raises(ValueError, match=f"^share: got {share}; want at least 0 and less than 0.5"):
        rule(share)
    rule(0.0)
    rule(0.4999)
