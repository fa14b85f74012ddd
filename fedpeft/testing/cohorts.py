"""Adapters, clients and rounds to try a rule on: no two sizes are the same, and data has both signs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from fedpeft.adapters import CORES, Adapter, Array, LowRank, Pool, Update, bases
from fedpeft.channel import PlainChannel
from fedpeft.rounds import ListRound, Metrics, Outcome, SumRound, contribute
from fedpeft.rules import Broadcast, ListRule, MeanRule, Rule, ServerState, Task

Sizes: TypeAlias = tuple[str, int, int, int, float]
LAYERS: tuple[Sizes, ...] = (("q", 7, 5, 3, 2.0), ("v", 4, 9, 2, 0.5))
"""Name, d, k, rank and scale of each layer."""
DENSE: tuple[tuple[str, tuple[int, ...]], ...] = (("head", (8, 6)), ("bias", (10,)), ("gate", ()))
"""Name and shape of each dense leaf."""

Client: TypeAlias = tuple[Update, float]
"""What a client did, and its weight."""


def task_of(rule: Rule, state: ServerState, rank: int = 3) -> Task:
    """The task as clients of this rank get it."""
    return rule.send(state, rank).task


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: type = np.float64) -> Array:
    return np.asarray(rng.normal(size=shape), dtype)


def adapter(seed: int = 0, dtype: type = np.float64, layers: Sequence[Sizes] = LAYERS) -> Adapter:
    """An adapter of random numbers, of both signs; nothing in it is zero."""
    rng = np.random.default_rng(seed)
    return Adapter(
        {n: LowRank(normal(rng, (r, k), dtype), normal(rng, (d, r), dtype), s) for n, d, k, r, s in layers},
        {n: normal(rng, shape, dtype) for n, shape in DENSE},
        {"projection": np.arange(3)},
    )


def start(seed: int = 0, dtype: type = np.float64, round: int = 0, layers: Sequence[Sizes] = LAYERS) -> ServerState:
    """What a server holds at the start of a round, with such an adapter."""
    first = adapter(seed, dtype, layers)
    return ServerState(Task(first.spec, round), first)


def train(rule: Rule, sent: Broadcast, rng: np.random.Generator) -> Update:
    """What a client does that moves at random all that this rule lets it train."""
    if rule.pool is not None:
        return _walk(rule.pool, sent, rng)
    trains = rule.trains(sent.task)
    mine = sent.adapter.tensors("" if trains in CORES else trains)
    moved = {n: (x + rng.normal(size=x.shape)).astype(x.dtype) for n, x in mine.items()}
    for name, basis in bases(sent.adapter).items() if trains in CORES else ():
        b, (heads, width) = sent.adapter.layers[name].b, basis.at.shape
        moved[f"{name}/b"] = (b + basis.b(rng.normal(size=(heads, width, width)))).astype(b.dtype)
    return Update(sent.adapter, sent.adapter.put(moved))


_STEPS = 8
"""Directions of a pool that a client goes along: as few as it would have steps for."""


def _walk(pool: Pool, sent: Broadcast, rng: np.random.Generator) -> Update:
    moves = np.zeros(pool.size)
    some = rng.choice(pool.size, min(pool.size, _STEPS), replace=False)
    moves[some] = rng.normal(size=len(some))
    trained = sent.adapter.put(pool.moved(sent.adapter.tensors(), moves))
    return Update(sent.adapter, trained, 0.0, moves)


def cohort(rule: Rule, state: ServerState, ranks: Iterable[int] = (3, 3, 3), seed: int = 1) -> dict[int, Client]:
    """Clients 10, 11, ... of these ranks, each trained at random, with unequal weights."""
    rng = np.random.default_rng(seed)
    return {
        10 + i: (train(rule, rule.send(state, rank), rng), float(rng.integers(1, 50))) for i, rank in enumerate(ranks)
    }


def metrics(client: int) -> Metrics:
    return Metrics(loss=client * 0.5, units=client * 2.0, correct=client * 1.0, examples=client * 1.0)


def numbered(ranks: Iterable[int]) -> dict[int, int]:
    """These ranks by the numbers that ``cohort`` gives its clients."""
    return dict(enumerate(ranks, 10))


def play(
    rule: Rule,
    state: ServerState,
    clients: Mapping[int, Client],
    channel: PlainChannel | None = None,
    ranks: Mapping[int, int] | None = None,
) -> Outcome:
    """A whole round in which everybody answers, in the order of the mapping; all have rank 3 where none are given."""
    channel = channel or PlainChannel()
    ranks = ranks or dict.fromkeys(clients, 3)
    machine: SumRound | ListRound
    if isinstance(rule, MeanRule):
        machine = SumRound(state, ranks, 1, channel, rule=rule)
    elif isinstance(rule, ListRule):
        machine = ListRound(state, ranks, 1, channel, rule=rule)
    else:
        raise ValueError(f"got a {type(rule).__name__}; want a MeanRule or a ListRule")
    while not machine.is_over:
        outbox = machine.outbox()
        for client, (update, weight) in clients.items():
            task = outbox[client].task
            term = contribute(rule, channel, update, weight, metrics(client), task)
            machine.receive(client, term, task.round, task.pass_)
        machine.close()
    return machine.result()


def mean_of(
    rule: MeanRule, state: ServerState, clients: Mapping[int, Client], ranks: Iterable[int]
) -> dict[str, Array]:
    """The weighted mean of what clients 10, 11, ... of these ranks encode in this pass."""
    sent = [
        (rule.encode(clients[i][0], task_of(rule, state, rank)), clients[i][1]) for i, rank in numbered(ranks).items()
    ]
    total = sum(weight for _, weight in sent)
    return {n: np.sum([w / total * x[n] for x, w in sent], axis=0) for n, _ in rule.layout(state.task).shapes}


def in_each_pass(
    rule: Rule, state: ServerState, clients: Mapping[int, Client], ranks: Iterable[int] = (3, 3, 3)
) -> list[ServerState]:
    """The state as the server holds it in each pass of a round with clients 10, 11, ... of these ranks."""
    states = [state]
    while len(states) < rule.passes and isinstance(rule, MeanRule):
        state = states[-1]
        shared = rule.between(mean_of(rule, state, clients, ranks), state)
        states.append(replace(state, task=replace(state.task, pass_=state.task.pass_ + 1, shared=shared)))
    return states


def drops_the_rest(rule: Rule, state: ServerState) -> bool:
    """Whether clients of a low rank run without the directions that they can't train."""
    whole, sent = computed(state), computed(rule.send(state, 1))
    return not all(np.allclose(whole[n], x, rtol=0, atol=1e-3) for n, x in sent.items())


def computed(state: ServerState | Broadcast) -> dict[str, Array]:
    """What the model computes with, the tail included."""
    out = weights(state.adapter)
    return out | {n: out[n] + x.product() for n, x in state.tail.items()}


def weights(x: Adapter) -> dict[str, Array]:
    """What an adapter makes the model compute with: every layer's ΔW and every dense leaf."""
    return {n: layer.scale * layer.b @ layer.a for n, layer in x.layers.items()} | dict(x.dense)


def with_personal(rule: Rule, shared: Adapter, update: Update, state: ServerState) -> Adapter:
    """What the client of this update runs: the shared adapter, with its own tensors as it has trained them."""
    mine = update.trained.tensors()
    return shared.put({n: mine[n] for n in rule.personal(state.task.spec)})


def assert_near(x: Mapping[str, Array], y: Mapping[str, Array], atol: float) -> None:
    assert x.keys() == y.keys()
    for n, value in x.items():
        assert value.shape == y[n].shape, n
        np.testing.assert_allclose(value, y[n], atol=atol, rtol=0, err_msg=n)
