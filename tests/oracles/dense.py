"""Oracles' common ground: dense matrices, and equations over the list of clients."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import LowRank, Update
from fedpeft.channel import PlainChannel
from tests.laws.cohorts import LAYERS

PRODUCT = 2e-5
"""Terms travel in fp32 and numbers are below 10: what a mean product of rank 3 is off by, at most."""
NAMES = [name for name, *_ in LAYERS]
EXACT = PlainChannel(exact=True)


def shares(clients):
    total = sum(weight for _, weight in clients.values())
    return [(weight / total, update) for update, weight in clients.values()]


def product(layer):
    return layer.scale * np.array(layer.b) @ np.array(layer.a)


def model(state):
    """W of each layer, beside the base."""
    out = {n: product(x) for n, x in state.adapter.layers.items()}
    for n, x in state.tail.items():
        out[n] = out[n] + product(x)
    return out


def mean_drift(clients, name):
    return sum(p * (product(u.trained.layers[name]) - product(u.received.layers[name])) for p, u in shares(clients))


def with_scales_of_their_own(clients):
    """The same clients, where each has another scale, and factors to match."""
    out = {}
    for i, (client, (u, w)) in enumerate(clients.items()):
        sides = [
            replace(x, layers={n: LowRank(y.a, y.b / (1.5 + i), y.scale * (1.5 + i)) for n, y in x.layers.items()})
            for x in (u.received, u.trained)
        ]
        out[client] = (Update(*sides), w)
    return out


def truncated(w, rank):
    u, s, vt = np.linalg.svd(w)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def kept(w, energy):
    """w in its fewest directions with this share of its squared singular values."""
    s = np.linalg.svd(w, compute_uv=False)
    rank = next(r for r in range(1, len(s) + 1) if np.sum(s[:r] ** 2) >= energy * np.sum(s**2))
    return truncated(w, rank), rank


def head_is_the_mean(before, after, clients):
    for name in before.adapter.dense:
        want = sum(p * u.trained.dense[name] for p, u in shares(clients))
        np.testing.assert_allclose(after.adapter.dense[name], want, atol=2e-6)


RANKS = [(3, 3, 3, 3), (1, 3, 2, 1), (1, 2)]
each_ranks = pytest.mark.parametrize("ranks", RANKS, ids=str)
each_scales = pytest.mark.parametrize("own_scales", [False, True], ids=["one scale", "scales of their own"])
