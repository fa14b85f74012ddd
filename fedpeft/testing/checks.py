"""What each law of aggregation rules checks, on random clients."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fedpeft.adapters import Array, LowRank, Update, same
from fedpeft.channel import PlainChannel, Running
from fedpeft.rounds import Metrics, contribute
from fedpeft.rules import MeanRule, Rule, ServerState
from fedpeft.testing.cohorts import (
    assert_near,
    cohort,
    computed,
    drops_the_rest,
    in_each_pass,
    metrics,
    numbered,
    play,
    task_of,
    weights,
    with_personal,
)

WIRE = 2e-6
"""What fp32 may be off by: the numbers here stay below 10, and are rounded at most twice (6e-8, relative)."""
ROUNDING = 1e-9
"""What sums of fp64 below 1e3 may be off by, with room for a pseudoinverse that amplifies it."""
BESIDE = 1 + len(Metrics().vector())
"""What is in an answer beside the encoding: its weight and its metrics."""
ROUNDS = (0, 1, 2, 3)
DTYPES = (np.float32, np.float64)


class Start(Protocol):
    """What gives the state that a round begins with; ``fedpeft.testing.start`` does."""

    def __call__(self, seed: int = 0, dtype: type = np.float64, round: int = 0) -> ServerState: ...


@dataclass(frozen=True, slots=True)
class Case:
    """A rule, and how it is tried; as ``rule_laws`` has it."""

    rule: Rule
    counts: tuple[str, ...]
    begin: Start

    def states(self) -> Iterator[ServerState]:
        """A state for each round of the first few, in each precision."""
        for round in ROUNDS:
            for dtype in DTYPES:
                yield self.begin(dtype=dtype, round=round)

    def play(self, state: ServerState, ranks: tuple[int, ...], seed: int = 1) -> ServerState:
        """The state after a round with clients of these ranks."""
        clients = cohort(self.rule, state, ranks, seed)
        return play(self.rule, state, clients, ranks=numbered(ranks)).state


def _need(is_so: bool, what: str) -> None:
    if not is_so:
        raise AssertionError(what)


def layout(case: Case) -> None:
    """Client and server have one layout in every pass, and what clients encode fits it, whatever their rank."""
    rule, ranks = case.rule, (1, 2, 3)
    for state in case.states():
        clients = cohort(rule, state, ranks)
        for step in in_each_pass(rule, state, clients, ranks):
            layout = rule.layout(step.task)
            for client, rank in numbered(ranks).items():
                update, weight = clients[client]
                task = task_of(rule, step, rank)
                _need(rule.layout(task) == layout, f"a client of rank {rank} has another layout than the server")
                got = {n: x.shape for n, x in rule.encode(update, task).items()}
                _need(got == dict(layout.shapes), f"a client of rank {rank} encodes {got}; the layout is {layout}")
                term = contribute(rule, PlainChannel(), update, weight, metrics(client), task)
                _need(term.shape == (layout.size + BESIDE,), f"an answer of {term.shape} for a layout of {layout.size}")


def trees(case: Case) -> None:
    """Sums of some terms, and sums of sums, in any order, decode to the same state."""
    rule, ranks = case.rule, (3, 1, 2, 3, 3)
    assert isinstance(rule, MeanRule)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        state = case.begin(round=seed % 4)
        clients = cohort(rule, state, ranks, seed)
        want = play(rule, state, clients, ranks=numbered(ranks)).state
        for step in range(rule.passes):
            layout = rule.layout(state.task)
            forest = [Running(layout.size + BESIDE) for _ in ranks]
            for tree, i in zip(forest, rng.permutation(len(ranks)), strict=True):
                update, weight = clients[10 + int(i)]
                task = task_of(rule, state, ranks[i])
                sent = contribute(rule, PlainChannel(), update, weight, metrics(10 + int(i)), task)
                tree.add(PlainChannel().weigh(sent, layout.size))
            while len(forest) > 1:
                i = int(rng.integers(len(forest) - 1))
                forest[i].merge(forest.pop(i + 1))
            [root] = forest
            mean, weight, statistics = PlainChannel().down(root.total, layout.size)
            _need(root.count == len(ranks), f"{root.count} terms in the sum of {len(ranks)}")
            _need(weight == sum(w for _, w in clients.values()), f"the sum has weight {weight}")
            np.testing.assert_array_equal(statistics, np.sum([metrics(c).vector() for c in clients], axis=0))
            if step + 1 < rule.passes:
                shared = rule.between(layout.unflatten(mean), state)
                state = replace(state, task=replace(state.task, pass_=step + 1, shared=shared))
        assert_near(computed(rule.decode(layout.unflatten(mean), state)), computed(want), ROUNDING)


def order_of_clients(case: Case) -> None:
    """The same answers under other clients' names give the same state."""
    state, ranks, order = case.begin(), (3, 1, 2, 3), (12, 10, 13, 11)
    clients = cohort(case.rule, state, ranks)
    shuffled = dict(zip(clients, [clients[i] for i in order], strict=True))
    their_ranks = dict(zip(clients, [numbered(ranks)[i] for i in order], strict=True))
    got = play(case.rule, state, shuffled, ranks=their_ranks).state
    assert_near(computed(got), computed(play(case.rule, state, clients, ranks=numbered(ranks)).state), ROUNDING)


def ratio_of_weights(case: Case) -> None:
    """All weights times eight give the same state."""
    state, ranks = case.begin(), (3, 2, 3)
    clients = cohort(case.rule, state, ranks)
    heavier = {client: (update, 8 * weight) for client, (update, weight) in clients.items()}
    got = play(case.rule, state, heavier, ranks=numbered(ranks)).state
    assert_near(computed(got), computed(play(case.rule, state, clients, ranks=numbered(ranks)).state), ROUNDING)


def weight(case: Case) -> None:
    """A client that has nearly all the weight decides."""
    state = case.begin()
    (client, (update, _)), *others = cohort(case.rule, state, (3, 3, 3)).items()
    both = {**dict(others), client: (update, 2.0**40)}, {client: (update, 1.0)}
    got, want = (computed(play(case.rule, state, clients).state) for clients in both)
    assert_near(got, want, 10 * WIRE)


def no_change(case: Case) -> None:
    """Who trained nothing encodes zeros, and a round of such clients leaves what the model computes with."""
    rule = case.rule
    for state in case.states():
        # A client that goes without what it can't train has, by some rules, the opinion that it is zero.
        ranks = (3, 3, 3) if drops_the_rest(rule, state) else (1, 2, 3)
        clients = {
            i: (Update(x, x), float(i)) for i, r in numbered(ranks).items() for x in [rule.send(state, r).adapter]
        }
        for step in in_each_pass(rule, state, clients, ranks):
            for client, rank in numbered(ranks).items():
                encoding = rule.encode(clients[client][0], task_of(rule, step, rank))
                for name, x in encoding.items():
                    if not name.endswith(case.counts or ("\0",)):
                        _need(not x.any(), f"{name}: a client that changed nothing encodes {np.abs(x).max():g}")
        after = play(rule, state, clients, ranks=numbered(ranks)).state
        # Where the product is factored anew, in the adapter's precision: of up to 3 numbers below 10.
        off = 1e-12 if next(iter(state.adapter.tensors().values())).dtype == np.float64 else 1e-5
        assert_near(computed(after), computed(state), off)


def identity(case: Case) -> None:
    """A round of one client ends with what that client trained, in a first round and after one that the rule ended."""
    for state in case.states():
        _gets_its_own_back(case, state, 10 * WIRE)  # ΔW: up to 3 products of numbers near 3
    _gets_its_own_back(case, case.play(case.begin(), (3, 2, 3), seed=2), 50 * WIRE)  # and of larger ones


def _gets_its_own_back(case: Case, state: ServerState, off: float) -> None:
    [(client, (update, _))] = cohort(case.rule, state, (3,)).items()
    after = play(case.rule, state, {client: (update, 1.0)}).state
    own = with_personal(case.rule, after.adapter, update, state)
    assert_near(computed(replace(after, adapter=own)), computed(replace(state, adapter=update.trained)), off)


def identity_of_low_ranks(case: Case) -> None:
    """A round of one client of a low rank does, as far as that client's model goes."""
    rule = case.rule
    for rank in (1, 2):
        state = case.begin()
        clients = cohort(rule, state, (rank,))
        [(update, _)] = clients.values()
        after = play(rule, state, clients, ranks=numbered((rank,))).state
        if drops_the_rest(rule, state):
            own = with_personal(rule, rule.send(after, rank).adapter, update, state)
            assert_near(weights(own), weights(update.trained), 10 * WIRE)
        else:
            want = computed(replace(rule.send(state, rank), adapter=update.trained))
            got = computed(after)
            if rule.personal(state.task.spec):
                sent = rule.send(after, rank)
                got = computed(replace(sent, adapter=with_personal(rule, sent.adapter, update, state)))
            assert_near(got, want, 10 * WIRE)


def identical_clients(case: Case) -> None:
    """Six clients that did the same, with other weights, count as one of them."""
    state = case.begin()
    [client] = cohort(case.rule, state, (3,)).values()
    one = play(case.rule, state, {1: client}).state
    many = play(case.rule, state, {i: (client[0], float(1 + 3 * i)) for i in range(1, 7)}).state
    assert_near(computed(many), computed(one), 5 * WIRE)


def from_zero(case: Case) -> None:
    """From LoRA's own start, where b is zero: the rounds that every run begins with."""
    state = case.begin()
    layers = {n: LowRank(x.a, np.zeros_like(x.b), x.scale) for n, x in state.adapter.layers.items()}
    state = replace(state, adapter=replace(state.adapter, layers=layers))
    for seed in (1, 2, 3):
        state = case.play(state, (1, 3, 2), seed)
        for name, x in computed(state).items():
            _need(bool(np.isfinite(x).all()), f"{name}: NaN or infinity after {seed} rounds from b = 0")


def constants(case: Case) -> None:
    """What the rule calls constant stays to the bit, and the adapter and its fixed tensors stay whole."""
    for dtype in DTYPES:
        first = state = case.begin(dtype=dtype)
        for seed in (1, 2):
            state = case.play(state, (3, 3, 3), seed)
        before, after = first.adapter.tensors(), state.adapter.tensors()
        _need(set(after) == set(before), f"the adapter has other tensors: {sorted(set(after) ^ set(before))}")
        for name in case.rule.constant(first.task.spec):
            _need(np.array_equal(before[name], after[name]), f"{name} is said to be constant, and changes")
        _need(state.adapter.fixed.keys() >= first.adapter.fixed.keys(), "what a method drew once is lost")
        for name, x in first.adapter.fixed.items():
            np.testing.assert_array_equal(state.adapter.fixed[name], x, err_msg=f"fixed {name}")


def next_round(case: Case) -> None:
    """The next state is the next round's, of the same shape, with all that others keep in it."""
    tail, moments = {"q": LowRank(np.ones((4, 5)), np.ones((7, 4)), 1.0)}, {"v/q/a": np.ones(3)}
    for state in case.states():
        state = replace(state, memory=dict(state.memory) | {"of another": np.ones(2)}, tail=tail, moments=moments)
        after = case.play(state, (3, 2, 3))
        task = after.task
        _need(task.round == state.task.round + 1, f"round {task.round} follows round {state.task.round}")
        _need((task.pass_, dict(task.shared)) == (0, {}), "a round does not begin at pass 0 with nothing shared")
        _need(task.spec == state.task.spec == after.adapter.spec, "the adapter's public shape changes")
        _need("of another" in after.memory, "what else is in the server's memory is lost")
        _need(after.moments == state.moments, "the server optimiser's moments are lost")
        alone = case.play(replace(state, tail={}), (3, 2, 3))
        got = {n: x - tail[n].product() if n in tail else x for n, x in computed(after).items()}
        assert_near(got, computed(alone), 50 * WIRE)  # the tail is there, beside what the round does without it


def precision(case: Case) -> None:
    """What is kept and sent has the type of the adapter's numbers."""
    rule, ranks = case.rule, (3, 2, 3)
    for dtype in (np.float16, np.float32):
        state = case.begin(dtype=dtype)
        after = case.play(state, ranks)
        sent = rule.send(after, 1)
        tails = [x for tail in (after.tail, sent.tail) for layer in tail.values() for x in (layer.a, layer.b)]
        found: list[Mapping[str, Array]] = [after.adapter.tensors(), after.memory, sent.task.shared]
        found += [s.task.shared for s in in_each_pass(rule, state, cohort(rule, state, ranks), ranks)]
        wrong = {n for named in found for n, x in named.items() if x.dtype != dtype}
        wrong |= {"the tail"} if any(x.dtype != dtype for x in tails) else set()
        _need(not wrong, f"an adapter of {np.dtype(dtype)} has become another type in {sorted(wrong)}")


def received(case: Case) -> None:
    """A client gets the round, the shape and the tail that the server has, and the model, but for a rest it lacks."""
    rule = case.rule
    tail = {"q": LowRank(np.ones((4, 5)), np.ones((7, 4)), 3.0)}
    state = replace(case.begin(), tail=tail)
    for rank in (1, 2, 3, 1 << 30):
        sent = rule.send(state, rank)
        _need((sent.task.round, sent.task.pass_) == (0, 0), f"a client is sent round {sent.task.round}")
        _need(sent.task.spec == state.task.spec, "a client is sent another shape than the server's")
        for name, x in sent.adapter.layers.items():
            whole = state.adapter.layers[name]
            _need(1 <= x.rank <= whole.rank, f"{name}: rank {x.rank} of {whole.rank}")
            _need(x.scale == whole.scale, f"{name}: scale {x.scale}; the server has {whole.scale}")
        if rank >= 3:
            assert_near(computed(sent), computed(state), 1e-12)
        elif drops_the_rest(rule, state):
            np.testing.assert_array_equal(sent.tail["q"].a[:4], tail["q"].a)


def same_again(case: Case) -> None:
    """Neither hidden randomness, nor arrays that are changed in place."""
    rule, ranks = case.rule, (3, 1, 2)
    for state in case.states():
        kept = [state.adapter.digest]
        clients = cohort(rule, state, ranks)
        kept += [side.digest for update, _ in clients.values() for side in (update.received, update.trained)]
        one, two = (play(rule, state, clients, ranks=numbered(ranks)).state for _ in range(2))
        _need(same(one.adapter, two.adapter), "the same round gives another adapter the second time")
        assert_near(computed(one), computed(two), 0.0)
        now = [state.adapter.digest]
        now += [side.digest for update, _ in clients.values() for side in (update.received, update.trained)]
        _need(now == kept, "an array that was given to the rule has been changed in place")
