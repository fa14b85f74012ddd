"""FedKSeed against its algorithm, written out over plain vectors, on quadratics.

Sources: Qin et al., arXiv:2312.06353, algorithm 1; Malladi et al., arXiv:2305.17333, algorithm 1. Everything is fp64,
and so is the channel.
"""

from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update
from fedpeft.channel import PlainChannel
from fedpeft.rounds import Metrics, SumRound, contribute
from fedpeft.rules import FedKSeed, Momentum, Pool, ServerState, Task

EXACT = PlainChannel(exact=True)
SIZES = {"gate": (), "head": (5,), "w/a": (2, 3), "w/b": (4, 2)}
N, K, STEPS, LR, EPSILON = 20, 9, 5, 0.02, 1e-4
ROUNDING = 1e-12
RULE = FedKSeed(seed=3, size=K, epsilon=EPSILON)


def named(vector):
    ends = np.cumsum([int(np.prod(s)) for s in SIZES.values()])
    return {n: x.reshape(s) for (n, s), x in zip(SIZES.items(), np.split(vector, ends[:-1]), strict=True)}


def vector(adapter):
    held = adapter.tensors()
    return np.concatenate([np.ravel(held[n]) for n in SIZES])


def start():
    x = named(np.random.default_rng(8).normal(size=N))
    first = Adapter({"w": LowRank(x["w/a"], x["w/b"], 0.5)}, {"head": x["head"], "gate": x["gate"]})
    return ServerState(Task(first.spec), first)


def direction(i):
    seed = int.from_bytes(sha256(f"3 {i}".encode()).digest()[:8], "little")
    bits = np.unpackbits(np.random.PCG64(seed).random_raw(1).astype("<u8").view(np.uint8))
    return 2.0 * bits[:N] - 1


def loss(client, x):
    rng = np.random.default_rng([4, client])
    q, _ = np.linalg.qr(rng.normal(size=(N, N)))
    goal, curves = rng.normal(size=N), rng.uniform(0.2, 1.5, N)
    return 0.5 * float(np.sum(curves * (q.T @ (x - goal)) ** 2))


def steps_of(client, round, x):
    """What a client does from here: where it ends, and its sums of −lr·g by direction."""
    draw, sums = np.random.default_rng([client, round]), np.zeros(K)
    for _ in range(STEPS):
        j = int(draw.integers(K))
        z = direction(j)
        g = (loss(client, x + EPSILON * z) - loss(client, x - EPSILON * z)) / (2 * EPSILON)
        x = x - LR * g * z
        sums[j] -= LR * g
    return x, sums


def played(state, chosen, weights, **options):
    """A round; each client's trained vector as well."""
    machine = SumRound(state, dict.fromkeys(chosen, 2), 1, EXACT, rule=RULE, **options)
    ends = {}
    for client, sent in machine.outbox().items():
        round = sent.task.round
        ends[client], sums = steps_of(client, round, vector(sent.adapter))
        update = Update(sent.adapter, sent.adapter.put(named(ends[client])), 0.0, sums)
        term = contribute(RULE, EXACT, update, weights[client], Metrics(1, 1, 1, 1), sent.task)
        assert term.shape == (K + 5,)
        machine.receive(client, term, round, 0)
    machine.close()
    return machine.result().state, ends


@pytest.mark.parametrize("weights", [(1, 1, 1, 1, 1), (1, 7, 2, 4, 3)], ids=["equal", "weighted"])
def test_rounds_of_some_clients_are_those_of_the_algorithm(weights):
    state = start()
    x = first = vector(state.adapter)
    accumulated = np.zeros(K)
    for round, chosen in enumerate([(0, 1, 2), (1, 4), (0, 1, 2, 3, 4), (3,)]):
        state, ends = played(state, chosen, weights)
        share = {i: weights[i] / sum(weights[j] for j in chosen) for i in chosen}
        accumulated = accumulated + sum(share[i] * steps_of(i, round, x)[1] for i in chosen)
        mean = sum(share[i] * ends[i] for i in chosen)
        x = first + sum(accumulated[j] * direction(j) for j in range(K))
        np.testing.assert_allclose(x, mean, atol=ROUNDING)  # the paper's model from scalars is the mean of clients
        np.testing.assert_allclose(vector(state.adapter), x, atol=ROUNDING)
        np.testing.assert_allclose(state.adapter.fixed["walk/moves"], accumulated, atol=ROUNDING)
        assert (state.task.round, state.tail, state.memory) == (round + 1, {}, {})


def test_a_round_of_one_client_is_what_it_trained():
    state, ends = played(start(), (2,), (1,) * 5)
    np.testing.assert_allclose(vector(state.adapter), ends[2], atol=ROUNDING)
    assert np.linalg.norm(ends[2] - vector(start().adapter)) > 0.1


def test_the_losses_fall():
    state, everyone = start(), range(5)

    def joint(state):
        return sum(loss(i, vector(state.adapter)) for i in everyone)

    before = joint(state)
    for _ in range(30):
        state, _ = played(state, everyone, (1,) * 5)
    within = np.stack([direction(j) for j in range(K)])
    moved = vector(state.adapter) - vector(start().adapter)
    np.testing.assert_allclose(np.linalg.lstsq(within.T, moved, rcond=None)[0] @ within, moved, atol=1e-9)
    assert joint(state) < 0.8 * before


def test_a_server_optimiser_works_on_moves():
    """Momentum of the scalars is that of the adapter: directions stay the same from round to round."""
    state, x = start(), vector(start().adapter)
    momentum = np.zeros(N)
    for round in range(3):
        ends = {i: steps_of(i, round, x)[0] for i in (0, 1)}
        state, _ = played(state, (0, 1), (1, 1), optimiser=Momentum(lr=0.7, beta=0.6))
        momentum = 0.6 * momentum + (ends[0] + ends[1]) / 2 - x
        x = x + 0.7 * momentum
        np.testing.assert_allclose(vector(state.adapter), x, atol=ROUNDING)


def test_moves_of_an_older_round_count_as_moves_of_this_one():
    """As in buffered rounds: what was found along a direction is added along the same."""
    state, moves = start(), np.linspace(-0.3, 0.2, K)
    later = played(state, (0, 1), (1, 1))[0]
    after = RULE.decode({"moves": moves}, later)
    far = sum(m * direction(j) for j, m in enumerate(moves))
    np.testing.assert_allclose(vector(after.adapter), vector(later.adapter) + far, atol=ROUNDING)


def test_what_is_sent_is_the_adapter_and_what_travels_of_it_is_in_its_moves():
    state = start()
    first = RULE.send(state, 1)
    assert first.adapter.spec == state.task.spec == first.task.spec
    np.testing.assert_array_equal(first.adapter.fixed["walk/moves"], np.zeros(K))
    np.testing.assert_array_equal(vector(first.adapter), vector(state.adapter))
    state, _ = played(state, (0, 1, 2), (1,) * 5)
    for rank in (1, 2, 1 << 30):
        sent = RULE.send(state, rank)
        assert sent.adapter is state.adapter
        assert RULE.is_for(sent, rank)
        assert not RULE.is_for(replace(sent, adapter=sent.adapter.cut(1)), 1)


def test_a_tail_that_is_there_is_sent_along():
    tail = {"w": LowRank(np.ones((1, 3)), np.ones((4, 1)), 1.0)}
    assert RULE.send(replace(start(), tail=tail), 2).tail is tail


def test_an_update_tells_its_moves_and_without_them_nothing_but_that_nothing_was_done():
    state = start()
    held = state.adapter
    moves = np.arange(K) / 7
    assert RULE.encode(Update(held, held, moves=moves), state.task)["moves"] is moves
    still = RULE.encode(Update(held, held), state.task)
    assert set(still) == {"moves"}
    np.testing.assert_array_equal(still["moves"], np.zeros(K))
    other = held.moved({"gate": np.ones(())})
    with pytest.raises(ValueError, match=r"^an update came without its moves; want a trainer that walks"):
        RULE.encode(Update(held, other), state.task)


def test_it_says_what_it_is():
    assert RULE.pool == Pool(3, K, EPSILON)
    assert RULE.layout(start().task).shapes == (("moves", (K,)),)
    assert (FedKSeed(5).size, FedKSeed(5).epsilon) == (1024, 1e-3)
    for options, message in (({"size": 0}, "size: got 0"), ({"epsilon": 0.0}, "epsilon: got 0.0")):
        with pytest.raises(ValueError, match=f"^{message}"):
            FedKSeed(5, **options)
    with pytest.raises(ValueError, match=r"^seed: got -1"):
        FedKSeed(-1)
