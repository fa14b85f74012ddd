"""Server optimisers against the papers' recursions, number by number in plain Python.

Sources: Reddi et al., arXiv:2003.00295, algorithm 2; Hsu et al., arXiv:1909.06335, section 3 (FedAvgM).
"""

from math import sqrt

import numpy as np
import pytest

from fedpeft.channel import PlainChannel
from fedpeft.rounds import SumRound, contribute
from fedpeft.rules import Adagrad, Adam, Averaging, Momentum, Yogi
from tests.laws.cohorts import FEDIT, ROLORA, cohort, metrics, start

MEANS = [[0.5, -2.0, 0.0, 1e-3], [-1.0, -0.25, 0.125, -4e-3], [0.75, 3.0, -0.5, 2e-3], [0.01, -0.02, 4.0, 0.0]]


def run(optimiser, means=MEANS):
    """Steps and the last moments, for one tensor of shape (2, 2)."""
    steps, moments = [], {"other": np.ones(1)}
    for mean in means:
        before = {n: x.copy() for n, x in moments.items()}
        given = moments
        change, moments = optimiser.step({"x": np.array(mean).reshape(2, 2)}, given)
        assert moments is not given
        for n, x in before.items():
            np.testing.assert_array_equal(given[n], x)
        assert change["x"].shape == (2, 2)
        steps.append(change["x"].ravel())
    np.testing.assert_array_equal(moments.pop("other"), np.ones(1))
    return np.array(steps), moments


def by_hand(lr, beta1, tau, second, means=MEANS):
    columns = []
    for deltas in zip(*means, strict=True):
        m, v, steps = 0.0, tau * tau, []
        for delta in deltas:
            m = beta1 * m + (1 - beta1) * delta
            v = second(v, delta * delta)
            steps.append(lr * m / (sqrt(v) + tau))
        columns.append((steps, m, v))
    return np.array([c[0] for c in columns]).T, np.array([c[1] for c in columns]), np.array([c[2] for c in columns])


def sign(x):
    return (x > 0) - (x < 0)


@pytest.mark.parametrize(
    ("optimiser", "lr", "beta1", "tau", "second"),
    [
        (Adagrad(), 0.01, 0.0, 1e-3, lambda v, s: v + s),
        (Adagrad(0.3, 0.5, 0.02), 0.3, 0.5, 0.02, lambda v, s: v + s),
        (Adam(), 0.01, 0.9, 1e-3, lambda v, s: 0.99 * v + 0.01 * s),
        (Adam(0.3, 0.8, 0.02, 0.7), 0.3, 0.8, 0.02, lambda v, s: 0.7 * v + (1 - 0.7) * s),
        (Yogi(), 0.01, 0.9, 1e-3, lambda v, s: v - 0.01 * s * sign(v - s)),
        (Yogi(0.3, 0.8, 0.02, 0.7), 0.3, 0.8, 0.02, lambda v, s: v - (1 - 0.7) * s * sign(v - s)),
        (Adam(beta1=0.0, beta2=0.0), 0.01, 0.0, 1e-3, lambda v, s: s),
    ],
    ids=lambda x: "second" if callable(x) else repr(x),
)
def test_adaptive_servers_follow_algorithm_2(optimiser, lr, beta1, tau, second):
    got, moments = run(optimiser)
    steps, m, v = by_hand(lr, beta1, tau, second)
    np.testing.assert_allclose(got, steps, rtol=1e-9, atol=1e-15)
    assert set(moments) == {"m/x", "v/x"}
    np.testing.assert_allclose(moments["m/x"].ravel(), m, rtol=1e-9, atol=1e-18)
    np.testing.assert_allclose(moments["v/x"].ravel(), v, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize(
    ("optimiser", "lr", "beta"),
    [(Momentum(), 1.0, 0.9), (Momentum(0.5, 0.3), 0.5, 0.3), (Momentum(beta=0.0), 1.0, 0.0)],
)
def test_momentum_is_fedavgm(optimiser, lr, beta):
    got, moments = run(optimiser)
    v, want = np.zeros(4), []
    for delta in np.array(MEANS):
        v = np.array([beta * x + d for x, d in zip(v, delta, strict=True)])
        want.append(lr * v)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert set(moments) == {"v/x"}
    np.testing.assert_allclose(moments["v/x"].ravel(), v, rtol=1e-12)


def test_averaging_takes_the_mean_itself():
    got, moments = run(Averaging())
    np.testing.assert_array_equal(got, MEANS)
    assert moments == {}
    np.testing.assert_array_equal(run(Averaging(0.25))[0], 0.25 * np.array(MEANS))


@pytest.mark.parametrize("optimiser", [Momentum(), Adam(), Yogi(), Adagrad()], ids=repr)
def test_moments_of_a_tensor_wait_while_it_is_not_sent(optimiser):
    """RoLoRA sends b, then a: each has the moments of its own rounds."""
    alone, _ = run(optimiser, MEANS[::2])
    moments, got = {}, []
    for i, mean in enumerate(MEANS):
        change, moments = optimiser.step({("x", "y")[i % 2]: np.array(mean)}, moments)
        if i % 2 == 0:
            got.append(change["x"])
    np.testing.assert_array_equal(got, alone)


@pytest.mark.parametrize(
    ("rule", "optimiser"), [(FEDIT, Adam(0.1)), (ROLORA, Momentum(0.5)), (FEDIT, Averaging(0.5))], ids=repr
)
def test_a_round_takes_the_optimisers_step_and_hands_its_moments_on(rule, optimiser):
    state, moments = start(), {}
    for seed in range(3):
        clients = cohort(rule, state, seed=seed)
        machine = SumRound(state, dict.fromkeys(clients, 3), 1, rule=rule, optimiser=optimiser)
        for client, (update, weight) in clients.items():
            machine.receive(
                client, contribute(rule, PlainChannel(), update, weight, metrics(client), state.task), seed, 0
            )
        machine.close()
        total = sum(w for _, w in clients.values())
        encodings = [(rule.encode(u, state.task), w / total) for u, w in clients.values()]
        mean = {n: sum(p * x[n] for x, p in encodings) for n in encodings[0][0]}
        change, moments = optimiser.step(mean, moments)
        after = machine.result().state
        for n, x in state.adapter.tensors().items():
            want = x + change[n] if n in change else x
            np.testing.assert_allclose(after.adapter.tensors()[n], want, atol=2e-6)  # terms travel in fp32
        assert after.moments.keys() == moments.keys()
        for n, x in moments.items():
            np.testing.assert_allclose(after.moments[n], x, atol=1e-5)
        state = after


GOOD = {"lr": 0.5, "beta": 0.0, "beta1": 0.0, "beta2": 0.0, "tau": 0.5}
BAD = {
    "lr": ((0.0, -1.0, float("nan")), "more than 0"),
    "tau": ((0.0, -1.0, float("nan")), "more than 0"),
    **dict.fromkeys(("beta", "beta1", "beta2"), ((-0.1, 1.0, 1.5, float("nan")), "at least 0 and less than 1")),
}


@pytest.mark.parametrize(
    ("optimiser", "keys"),
    [
        (Averaging, ("lr",)),
        (Momentum, ("lr", "beta")),
        (Adagrad, ("lr", "beta1", "tau")),
        (Adam, ("lr", "beta1", "tau", "beta2")),
        (Yogi, ("lr", "beta1", "tau", "beta2")),
    ],
)
def test_settings_out_of_range_are_refused_by_name(optimiser, keys):
    for key in keys:
        optimiser(**{key: GOOD[key]})
        values, want = BAD[key]
        for value in values:
            with pytest.raises(ValueError, match=f"^{key}: got {value}; want {want}$"):
                optimiser(**{key: value})
