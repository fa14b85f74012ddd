"""SCAFFOLD against its algorithm, written out over plain vectors, on quadratics with known optima.

Source: Karimireddy et al., arXiv:1910.06378, algorithm 1, option II. Everything is fp64, and so is the channel.
"""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update
from fedpeft.channel import PlainChannel
from fedpeft.rounds import Metrics, SumRound, contribute
from fedpeft.rules import FactorMean, Scaffold, ServerState, Task

EXACT = PlainChannel(exact=True)
STEPS, LR = 4, 0.3
CLIENTS = 5
SIZES = {"w/a": (2, 3), "w/b": (4, 2), "head": (5,), "gate": ()}
N = 6 + 8 + 5 + 1
ROUNDING = 1e-12


def flat(tensors):
    return np.concatenate([np.ravel(tensors[n]) for n in SIZES])


def named(vector):
    ends = np.cumsum([int(np.prod(s)) for s in SIZES.values()])
    return {n: x.reshape(s) for (n, s), x in zip(SIZES.items(), np.split(vector, ends[:-1]), strict=True)}


def start(dtype=np.float64):
    x = {n: v.astype(dtype) for n, v in named(np.random.default_rng(8).normal(size=N)).items()}
    first = Adapter({"w": LowRank(x["w/a"], x["w/b"], 0.5)}, {"head": x["head"], "gate": x["gate"]})
    return ServerState(Task(first.spec), first)


def problem(client):
    """The optimum and the curvature of one client's loss, ½ (x − t)ᵀ H (x − t)."""
    rng = np.random.default_rng([4, client])
    q, _ = np.linalg.qr(rng.normal(size=(N, N)))
    return rng.normal(size=N), q * rng.uniform(0.2, 1.5, N) @ q.T


def gradient(client, x):
    t, h = problem(client)
    return h @ (x - t)


def optimum(weights):
    h = sum(w * problem(i)[1] for i, w in enumerate(weights))
    return np.linalg.solve(h, sum(w * problem(i)[1] @ problem(i)[0] for i, w in enumerate(weights)))


def mask(parts, rank):
    """Which numbers a client of this rank trains where the factors ``parts`` are trained."""
    held = {n: np.zeros(s) for n, s in SIZES.items()}
    if "a" in parts:
        held["w/a"][:rank] = 1
    if "b" in parts:
        held["w/b"][:, :rank] = 1
    return flat(held | {"head": np.ones(5), "gate": np.ones(())})


def local(rule, sent, own, client, steps=STEPS):
    """What one client does as its rule says, and what it keeps."""
    begun = rule.begin(sent.adapter, own)
    objective, now = rule.objective(sent.task, begun, own), begun
    parts = rule.trains(sent.task)
    rank = begun.layers["w"].rank
    tail = sent.tail["w"].rank if "w" in sent.tail else 0
    for _ in range(steps):
        layer = now.layers["w"].join(sent.tail["w"]) if tail else now.layers["w"].pad(2)
        whole = named(gradient(client, flat({"w/a": layer.a, "w/b": layer.b} | dict(now.dense))))
        mine = {"w/a": whole["w/a"][:rank], "w/b": whole["w/b"][:, :rank]} | {n: whole[n] for n in ("head", "gate")}
        now = now.moved({n: -LR * (mine[n] + objective.shift.get(n, 0)) for n in now.tensors(parts)})
    update = Update(begun, now, steps * LR)
    return update, rule.keep(update, sent.task, own)


def played(rule, state, chosen, kept, weights=None, ranks=None):
    """A round of the ``chosen`` clients; ``kept`` by client is brought up to date."""
    ranks = ranks or dict.fromkeys(chosen, 2)
    machine = SumRound(state, ranks, 1, EXACT, rule=rule, clients=CLIENTS)
    for client, sent in machine.outbox().items():
        update, kept[client] = local(rule, sent, kept.get(client, {}), client)
        weight = 1.0 if weights is None else weights[client]
        machine.receive(
            client, contribute(rule, EXACT, update, weight, Metrics(1, 1, 1, 1), sent.task), sent.task.round, 0
        )
    machine.close()
    return machine.result().state


@pytest.mark.parametrize("of", ["fedit", "ffa", "rolora"])
@pytest.mark.parametrize("ranks", [(2, 2, 2, 2, 2), (1, 2, 1, 2, 2)], ids=str)
def test_rounds_of_some_clients_are_those_of_the_algorithm(of, ranks):
    rule, state, kept = Scaffold(of), start(), {}
    x, c, own = flat(state.adapter.tensors()), np.zeros(N), np.zeros((CLIENTS, N))
    cycle = {"fedit": ("ab",), "ffa": ("b",), "rolora": ("b", "a")}[of]
    for round, chosen in enumerate([(0, 1, 2), (1, 4), (0, 1, 2, 3, 4), (3,), (2, 0), (1, 3, 4)]):
        state = played(rule, state, chosen, kept, ranks={i: ranks[i] for i in chosen})
        moves, changes = [], []
        for i in chosen:
            trained, y = mask(cycle[round % len(cycle)], ranks[i]), x
            for _ in range(STEPS):
                y = y - LR * trained * (gradient(i, y) + c - own[i])
            new = own[i] - c + (x - y) / (STEPS * LR)
            moves.append(y - x)
            changes.append(trained * (new - own[i]))
            own[i] = np.where(trained > 0, new, own[i])
        x = x + np.mean(moves, axis=0)
        c = c + len(chosen) / CLIENTS * np.mean(changes, axis=0)
        np.testing.assert_allclose(flat(state.adapter.tensors()), x, atol=ROUNDING)
        control = {n: state.memory.get(f"control/{n}", np.zeros(s)) for n, s in SIZES.items()}
        np.testing.assert_allclose(flat(control), c, atol=ROUNDING)
        np.testing.assert_allclose(c, own.mean(axis=0), atol=ROUNDING)
    for i in range(CLIENTS):
        for n, value in kept[i].items():
            part = named(own[i])[n.removeprefix("control/")]
            np.testing.assert_allclose(value, part[tuple(map(slice, value.shape))], atol=ROUNDING)


@pytest.mark.parametrize("weights", [(1, 1, 1, 1, 1), (1, 7, 2, 4, 3)], ids=["equal", "weighted"])
def test_clients_that_differ_reach_their_joint_optimum_where_fedavg_stops_beside_it(weights):
    best, everyone = optimum(weights), range(CLIENTS)
    state = plain = start()
    kept, none = {}, {}
    for _ in range(150):
        state = played(Scaffold(), state, everyone, kept, weights)
        plain = played(FactorMean(), plain, everyone, none, weights)
    before = flat(plain.adapter.tensors())
    stalled = flat(played(FactorMean(), plain, everyone, none, weights).adapter.tensors())
    assert np.linalg.norm(stalled - before) < 1e-8, "it still moves"
    assert np.linalg.norm(before - best) > 0.05
    assert np.linalg.norm(flat(state.adapter.tensors()) - best) < 1e-8


def test_clients_drawn_by_turns_reach_it_too():
    state, kept, rng = start(), {}, np.random.default_rng(1)
    for _ in range(400):
        state = played(Scaffold(), state, sorted(rng.choice(CLIENTS, 3, replace=False).tolist()), kept)
    assert np.linalg.norm(flat(state.adapter.tensors()) - optimum([1] * CLIENTS)) < 1e-6


def test_at_one_client_it_is_gradient_descent():
    state, kept = start(), {}
    x = flat(state.adapter.tensors())
    for _ in range(3):
        machine = SumRound(state, {2: 2}, 1, EXACT, rule=Scaffold())
        sent = machine.outbox()[2]
        update, kept = local(Scaffold(), sent, kept, 2)
        machine.receive(
            2, contribute(Scaffold(), EXACT, update, 3.0, Metrics(1, 1, 1, 1), sent.task), sent.task.round, 0
        )
        machine.close()
        state = machine.result().state
        assert state.share == 1.0  # of those who were asked, where nobody says how many there are
        for _ in range(STEPS):
            x = x - LR * gradient(2, x)
    np.testing.assert_allclose(flat(state.adapter.tensors()), x, atol=ROUNDING)


def test_only_what_a_round_trains_has_variates_that_travel():
    rule, state, kept = Scaffold("rolora"), start(), {}
    assert rule.send(state, 2).task.shared == {}
    state = played(rule, state, (0, 1), kept)
    assert set(state.memory) == {"control/w/b", "control/head", "control/gate"}
    assert set(rule.send(state, 2).task.shared) == {"control/head", "control/gate"}
    assert set(kept[0]) == {"control/w/b", "control/head", "control/gate"}
    state = played(rule, state, (0,), kept)
    assert set(state.memory) == set(kept[0]) == {f"control/{n}" for n in SIZES}
    assert set(kept[1]) == {"control/w/b", "control/head", "control/gate"}
    assert set(rule.send(state, 2).task.shared) == {"control/w/b", "control/head", "control/gate"}
    assert state.task.shared == {}


def test_the_first_round_has_nothing_to_correct_and_a_newcomer_has_the_servers_part():
    rule, state, kept = Scaffold(), start(), {}
    sent = rule.send(state, 2)
    assert rule.objective(sent.task, sent.adapter, {}).shift == {}
    state = played(rule, state, (0, 1), kept)
    sent = rule.send(state, 1)
    shift = rule.objective(sent.task, sent.adapter, {}).shift
    assert {n: x.shape for n, x in shift.items()} == {"w/a": (1, 3), "w/b": (4, 1), "head": (5,), "gate": ()}
    np.testing.assert_array_equal(shift["w/b"], state.memory["control/w/b"][:, :1])
    np.testing.assert_array_equal(shift["head"], state.memory["control/head"])


def test_who_has_a_variate_when_the_server_has_none_is_corrected_by_its_own():
    """As after a round that failed for want of answers: who answered has moved its variate, and the server has not."""
    state = start()
    update, own = local(Scaffold(), Scaffold().send(state, 2), {}, 0)
    shift = Scaffold().objective(state.task, state.adapter, own).shift
    assert set(shift) == set(SIZES)
    for n, x in shift.items():
        np.testing.assert_array_equal(x, -own[f"control/{n}"])
    way = update.received.tensors()["head"] - update.trained.tensors()["head"]
    np.testing.assert_allclose(own["control/head"], way / (STEPS * LR), atol=ROUNDING)


def test_an_update_of_which_no_more_is_known_has_gone_along_the_sum_of_its_gradients():
    state = start()
    update, _ = local(Scaffold(), Scaffold().send(state, 2), {}, 0)
    sent = Scaffold().encode(Update(update.received, update.trained), state.task)
    np.testing.assert_array_equal(sent["control/head"], -sent["head"])


def test_the_servers_variate_moves_by_the_share_of_all_clients_that_answered():
    rule, state = Scaffold(), start()
    mean = {n: np.full(shape, 3.0) for n, shape in rule.layout(state.task).shapes}
    assert float(rule.decode(mean, state).memory["control/gate"]) == 3.0  # where nobody says otherwise, all did
    after = rule.decode(mean, replace(rule.decode(mean, state), share=0.25))
    assert float(after.memory["control/gate"]) == 3.75
    np.testing.assert_allclose(after.adapter.dense["head"], state.adapter.dense["head"] + 6)
    for clients, share in ((None, 0.5), (8, 0.125)):
        machine = SumRound(state, {0: 2, 1: 2}, 1, EXACT, rule=rule, clients=clients)
        update, _ = local(rule, rule.send(state, 2), {}, 0)
        machine.receive(0, contribute(rule, EXACT, update, 1.0, Metrics(1, 1, 1, 1), state.task), 0, 0)
        machine.close()
        assert machine.result().state.share == share


def test_who_comes_back_with_another_rank_goes_on_from_what_it_has():
    rule, state, kept = Scaffold(), start(), {}
    state = played(rule, state, (0, 1), kept, ranks={0: 2, 1: 1})
    assert all(x.shape == SIZES[n.removeprefix("control/")] for n, x in kept[1].items())
    assert not kept[1]["control/w/a"][1:].any()
    for ranks in ({0: 1, 1: 2}, {0: 2, 1: 2}):
        before = kept[0]["control/w/a"][1:]
        state = played(rule, state, (0, 1), kept, ranks=ranks)
        assert np.array_equal(kept[0]["control/w/a"][1:], before) is (ranks[0] == 1)
        mean = (kept[0]["control/w/a"] + kept[1]["control/w/a"]) / CLIENTS
        np.testing.assert_allclose(state.memory["control/w/a"], mean, atol=ROUNDING)


@pytest.mark.parametrize("travel", [0.0, -1.0])
def test_steps_that_are_not_along_gradients_are_refused(travel):
    state = start()
    update = replace(local(Scaffold(), Scaffold().send(state, 2), {}, 0)[0], travel=travel)
    for act in (lambda: Scaffold().encode(update, state.task), lambda: Scaffold().keep(update, state.task, {})):
        with pytest.raises(ValueError, match=r'SCAFFOLD needs steps along gradients; use training.optimiser = "sgd"'):
            act()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_variates_have_the_dtype_of_their_tensors(dtype):
    state, kept = start(dtype), {}
    for _ in range(2):
        state = played(Scaffold(), state, (0, 1), kept)
        assert all(x.dtype == dtype for x in (*state.memory.values(), *kept[0].values()))


def test_a_variate_keeps_the_dtype_of_what_the_client_received_whatever_it_trains_in():
    state = start(np.float16)
    update = Update(state.adapter, start(np.float64).adapter, 0.5)
    assert {x.dtype for x in Scaffold().keep(update, state.task, {}).values()} == {np.dtype(np.float16)}


def test_what_is_added_to_a_gradient_is_not_rounded_to_the_variates_dtype():
    state = start(np.float16)
    control = {f"control/{n}": x for n, x in state.adapter.tensors().items()}
    server, own = ({n: np.full_like(x, v) for n, x in control.items()} for v in (1, 2**-12))
    assert np.float16(1) - np.float16(2**-12) == 1
    for x in Scaffold().objective(Task(state.task.spec, shared=server), state.adapter, own).shift.values():
        np.testing.assert_array_equal(x, np.full(x.shape, 1 - 2**-12))


def test_directions_that_training_gave_up_have_gone_all_the_way_to_zero():
    first = start().adapter
    shared = {f"control/{n}": np.full(s, 3.0) for n, s in SIZES.items()}
    trained = replace(first, layers={"w": first.layers["w"].cut(1)})
    sent = Scaffold().encode(Update(first, trained, 0.5), Task(first.spec, shared=shared))
    want = {"w/a": first.layers["w"].a * [[0], [2]] - 3, "w/b": first.layers["w"].b * [0, 2] - 3}
    for n, x in want.items():
        np.testing.assert_allclose(sent[f"control/{n}"], x, atol=ROUNDING)


def test_it_says_what_it_needs_and_what_it_takes_layers_for():
    assert Scaffold().needs_sgd
    assert not FactorMean().needs_sgd
    assert not Scaffold().is_change
    assert [Scaffold(x).tells_factors for x in ("fedit", "ffa", "rolora")] == [False, True, True]
    assert Scaffold("ffa").constant(start().task.spec) == {"w/a"}
    assert Scaffold(rest="dropped").send(start(), 1).tail == {}
    assert set(Scaffold().send(start(), 1).tail) == {"w"}
