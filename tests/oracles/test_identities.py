"""What theory says of rules, on linear models that are trained by hand: where an error comes from, and how it grows.

Models are y = ΔW x with ΔW = scale · b @ a, squared losses, and no noise in y but where it is what is studied.
"""

from itertools import pairwise

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update
from fedpeft.channel import PlainChannel
from fedpeft.rounds import Metrics, SumRound, contribute
from fedpeft.rules import FactorMean, ServerState, Task

EXACT = PlainChannel(exact=True)
FEDIT, FFA, ROLORA = FactorMean(), FactorMean(("b",)), FactorMean(("b", "a"))


def begin(a, d, scale=1.0):
    adapter = Adapter({"q": LowRank(a, np.zeros((d, len(a))), scale)})
    return ServerState(Task(adapter.spec), adapter)


def federated(rule, state, train, weights):
    """A round: ``train(client, layer, parts)`` gives a client's trained layer; the outcome, and what each trained."""
    round_ = SumRound(state, dict.fromkeys(range(len(weights)), 99), 1, EXACT, rule=rule, exactness=True)
    trained = {}
    for client, sent in round_.outbox().items():
        trained[client] = train(client, sent.adapter.layers["q"], rule.trains(sent.task))
        update = Update(sent.adapter, Adapter({"q": trained[client]}))
        answer = contribute(rule, EXACT, update, weights[client], Metrics(), sent.task, True)
        round_.receive(client, answer, sent.task.round, 0)
    round_.close()
    return round_.result(), trained


def w(layer):
    return layer.scale * layer.b @ layer.a


# ---- fedit's error is the clients' covariance: local steps make it, and only where clients differ


def missed(steps, unlike, lr=0.025):
    """fedit's relative error after one round of so many local steps of SGD; and what the round's sketches say."""
    rng = np.random.default_rng(2)
    d, k, rank, clients = 30, 24, 4, 5
    weights = [1.0, 7.0, 2.0, 4.0, 3.0]
    common = rng.normal(size=(d, k))
    wanted = [common + unlike * rng.normal(size=(d, k)) for _ in range(clients)]
    a = rng.uniform(-1, 1, (rank, k)) / np.sqrt(k)

    def train(client, x, parts):
        a, b = x.a, x.b
        for _ in range(steps):
            slope = x.scale * (x.scale * b @ a - wanted[client])
            a, b = a - lr * b.T @ slope, b - lr * slope @ a.T
        return LowRank(a, b, x.scale)

    got, trained = federated(FEDIT, begin(a, d, scale=1.5), train, weights)
    mean = sum(p * w(trained[c]) for c, p in enumerate(weights)) / sum(weights)
    error = np.linalg.norm(w(got.state.adapter.layers["q"]) - mean) / np.linalg.norm(mean)
    return error, got.exactness.overall


def test_fedits_error_grows_with_local_steps_where_clients_differ_and_is_none_after_one():
    errors = [missed(steps, unlike=1.0)[0] for steps in (1, 2, 4, 8, 16)]
    assert errors[0] < 1e-14  # b starts at zero, so the first step leaves a alone: all share it
    assert errors[1] > 1e-4
    assert all(many > 1.5 * few for few, many in pairwise(errors[1:]))
    assert errors[-1] > 0.05


def test_fedits_error_grows_with_the_clients_differences_and_is_none_between_equals():
    assert missed(16, unlike=0.0)[0] < 1e-14
    errors = [missed(16, unlike=x)[0] for x in (0.125, 0.25, 0.5, 1.0)]
    assert all(many > 1.5 * few for few, many in pairwise(errors))


def test_the_sketches_that_clients_send_say_the_same():
    for steps in (1, 4, 16):
        error, told = missed(steps, unlike=1.0)
        assert told == pytest.approx(error, rel=0.6, abs=1e-14)  # one layer of 4 × 4 sketches: 50 % is one deviation


# ---- a factor that stays at its start is a floor: rank 1, Gaussian inputs, one truth for all


def paths(rule, rounds, clients=4, rows=300, k=10, d=7):
    """The population loss ‖ΔW − W*‖² before each round and after the last; ‖b*‖²; and sin² of the angle (a₀, a*)."""
    rng = np.random.default_rng(5)
    a_true, b_true = rng.normal(size=k), rng.normal(size=d)
    a_true /= np.linalg.norm(a_true)
    a_start = a_true + rng.normal(size=k) / np.sqrt(k)
    a_start /= np.linalg.norm(a_start)
    truth = np.outer(b_true, a_true)
    inputs = [rng.normal(size=(rows, k)) for _ in range(clients)]

    def train(client, x, parts):
        """b by least squares; a by two steps of gradient descent, of a size that b's length gives."""
        seen = inputs[client]
        a, b = x.a, x.b
        if "b" in parts:
            hidden = seen @ a.T
            b = (np.linalg.lstsq(hidden, seen @ truth.T, rcond=None)[0]).T
        else:
            for _ in range(2):
                error = seen @ (b @ a - truth).T
                a = a - b.T @ (error.T @ seen) / rows / np.sum(b**2)
        return LowRank(a, b, x.scale)

    state, losses = begin(a_start[None], d), []
    for _ in range(rounds):
        losses.append(np.sum((w(state.adapter.layers["q"]) - truth) ** 2))
        state = federated(rule, state, train, [1.0] * clients)[0].state
    losses.append(np.sum((w(state.adapter.layers["q"]) - truth) ** 2))
    return np.array(losses), np.sum(b_true**2), 1 - (a_start @ a_true) ** 2


def test_rolora_converges_geometrically():
    losses, size, _ = paths(ROLORA, 30)
    assert losses[0] == pytest.approx(size)  # b is zero
    assert losses[30] < 1e-9 * size
    pairs = losses[2:22:2]  # after a round of each factor; further on there is nothing left but rounding
    assert (pairs[1:] < 0.25 * pairs[:-1]).all()


def test_ffa_stops_at_the_floor_that_the_frozen_factor_leaves():
    losses, size, sine = paths(FFA, 30)
    floor = size * sine
    assert sine > 0.2
    # The floor is of infinite rows. With c = k/n over the clients' n rows a least-squares fit is that much above it.
    assert floor < losses[30] < (1 + 10 / 300) * floor
    np.testing.assert_allclose(losses[2:], losses[1], rtol=1e-12)  # reached in one round, and never left
    assert losses[30] > 1e8 * paths(ROLORA, 30)[0][30]


# ---- noise on both factors is multiplied, noise on one is not


@pytest.mark.parametrize(("sigma", "known"), [(0.01, 1.0), (0.1, 1.8), (1.0, 16.0)])
def test_noise_on_a_one_shot_update_costs_fedit_more_than_ffa(sigma, known):
    rng = np.random.default_rng(6)
    size, rank, small = 256, 8, 0.01
    state = begin(rng.normal(size=(rank, size)) / np.sqrt(size), size)
    b = small * rng.normal(size=(size, rank))
    clean = b @ state.adapter.layers["q"].a

    def error(rule, **change):
        noisy = {f"q/{n}": x + sigma * rng.normal(size=x.shape) for n, x in change.items()}
        return np.linalg.norm(w(rule.decode(noisy, state).adapter.layers["q"]) - clean)

    ratio = error(FEDIT, a=np.zeros((rank, size)), b=b) / error(FFA, b=b)
    # ‖σ Z a + σ b Z′ + σ² Z Z′‖ / ‖σ Z a‖, for Z of independent entries and a of variance 1/256.
    expected = np.sqrt(1 + size * (small**2 + sigma**2))
    assert ratio == pytest.approx(expected, rel=0.05)
    assert ratio == pytest.approx(known, rel=0.1)
