"""Rules, adapters and cohorts for the core's tests: no two sizes are the same, and data has both signs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Adapter, Array, Layer, Layout, LowRank, Tensors, Update, best_rank, stack
from fedpeft.channel import PlainChannel
from fedpeft.rounds import ListRound, Metrics, Outcome, SumRound, contribute
from fedpeft.rules import (
    Broadcast,
    FactorMean,
    FedEx,
    FedSVD,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    Krum,
    ListRule,
    LoRAFair,
    MeanRule,
    Median,
    Rule,
    ServerState,
    Subspace,
    Task,
    TrimmedMean,
    ZeroPad,
)

LAYERS = (("q", 7, 5, 3, 2.0), ("v", 4, 9, 2, 0.5))  # name, d, k, rank, scale
DENSE = (("head", (8, 6)), ("bias", (10,)), ("gate", ()))


@dataclass(frozen=True, slots=True)
class TwoPasses(MeanRule):
    """The mean of products through two sums of thin matrices: Y = Σ D·Ω, Q = qr(Y), then P = Σ Dᵀ·Q and D ≈ Q·Pᵀ.

    Exact up to the cut to the server's rank when the mean change has rank at most ``width``.
    """

    width: int = 6

    @property
    @override
    def passes(self) -> int:
        return 2

    @override
    def layout(self, task: Task) -> Layout:
        if task.pass_ == 0:
            return Layout(tuple((f"{x.name}/y", (x.d, min(x.d, self.width))) for x in task.spec.layers))
        thin = tuple((f"{x.name}/p", (x.k, min(x.d, self.width))) for x in task.spec.layers)
        return Layout(thin) + task.spec.leaves

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        out: dict[str, Array] = {}
        for x in task.spec.layers:
            new, old = (self._seen(side.layers[x.name], x, task) for side in (update.trained, update.received))
            out[f"{x.name}/{'p' if task.pass_ else 'y'}"] = (
                new - old
            )  # each by itself, so that no change is exactly zero
        return out | update.dense() if task.pass_ else out

    def _seen(self, w: LowRank, x: Layer, task: Task) -> Array:
        left, right = stack([(1.0, w)])
        if task.pass_ == 1:
            return right.T @ (left.T @ task.shared[f"{x.name}/q"])
        return left @ (right @ np.random.default_rng([x.d, x.k, task.round]).normal(size=(x.k, min(x.d, self.width))))

    @override
    def between(self, mean: Tensors, state: ServerState) -> Tensors:
        return {f"{x.name}/q": np.linalg.qr(mean[f"{x.name}/y"])[0] for x in state.task.spec.layers}

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        layers: dict[str, LowRank] = {}
        for x in state.task.spec.layers:
            left, right = stack([(1.0, state.adapter.layers[x.name])])
            left = np.hstack([left, state.task.shared[f"{x.name}/q"]])
            layers[x.name] = best_rank(left, np.vstack([right, mean[f"{x.name}/p"].T]), x.rank, x.scale)
        dense = {n: (x + mean[n]).astype(x.dtype) for n, x in state.adapter.dense.items()}
        return state.next(replace(state.adapter, layers=layers, dense=dense))


FEDIT, FFA, ROLORA = FactorMean(), FactorMean(("b",)), FactorMean(("b", "a"))
FEDSA = FactorMean(("a",), personalised=True)
FACTOR_RULES = {"fedit": FEDIT, "ffa": FFA, "rolora": ROLORA, "fedsa": FEDSA}
RBLA = FactorMean(owners=True, rest="dropped")
MEAN_RULES: dict[str, MeanRule] = FACTOR_RULES | {
    "two passes": TwoPasses(),
    "fedit, rest dropped": FactorMean(rest="dropped"),
    "ffa, by owners": FactorMean(("b",), owners=True),
    "rbla": RBLA,
    "zeropad": ZeroPad(),
    "hetlora": HetLoRA(gamma=1.0),  # that nobody prunes, so that one client gets its own update back
    "fedsvd": FedSVD(),
    "subspace": Subspace(seed=5),
    "subspace, cold": Subspace(seed=5, warm=False),
    "subspace, one pass": Subspace(seed=5, one_pass=True),
}
LIST_RULES: dict[str, ListRule] = {
    "median": Median(),
    "trimmed": TrimmedMean(),
    "krum": Krum(0.2),
    "multi-krum": Krum(0.2, many=True),
    "flexlora": FlexLoRA(),
    "flexlora, full": FlexLoRA("full"),
    "flora": FLoRA(seed=3),
    "fedex": FedEx(),
    "lora_fair": LoRAFair(),
}
RULES: dict[str, Rule] = MEAN_RULES | LIST_RULES
DROPPING = ("two passes", "fedsa", "fedit, rest dropped", "rbla", "zeropad", "hetlora", "flexlora, full")
"""Rules whose clients of a low rank go without the directions that they can't train."""
COUNTS = ("/lacks", "/norm")
"""Ends of the names of what is sent that is no change: who holds which direction, and how much it counts."""

REFACTORED = ("two passes", "fedsvd", "flexlora", "flexlora, full", "flora", "subspace")
"""Starts of the names of rules that factor the product anew, so that an adapter that does the same is another one."""

Client = tuple[Update, float]


def is_refactored(rule: Rule) -> bool:
    return any(RULES[name] is rule for name in RULES if name.startswith(REFACTORED))


def drops(rule: Rule) -> bool:
    return any(RULES[name] is rule for name in DROPPING)


def task_of(rule: Rule, state: ServerState) -> Task:
    """The task as clients get it."""
    return rule.send(state, 3).task


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: type = np.float64) -> Array:
    return np.asarray(rng.normal(size=shape), dtype)


def adapter(seed: int = 0, dtype: type = np.float64) -> Adapter:
    rng = np.random.default_rng(seed)
    return Adapter(
        {n: LowRank(normal(rng, (r, k), dtype), normal(rng, (d, r), dtype), s) for n, d, k, r, s in LAYERS},
        {n: normal(rng, shape, dtype) for n, shape in DENSE},
        {"projection": np.arange(3)},
    )


def start(seed: int = 0, dtype: type = np.float64, round: int = 0) -> ServerState:
    first = adapter(seed, dtype)
    return ServerState(Task(first.spec, round), first)


def train(rule: Rule, sent: Broadcast, rng: np.random.Generator) -> Update:
    """What a client does that moves at random all that this rule lets it train."""
    mine = sent.adapter.tensors(rule.trains(sent.task))
    moved = {n: (x + rng.normal(size=x.shape)).astype(x.dtype) for n, x in mine.items()}
    return Update(sent.adapter, sent.adapter.put(moved))


def cohort(rule: Rule, state: ServerState, ranks: Iterable[int] = (3, 3, 3), seed: int = 1) -> dict[int, Client]:
    """Clients 10, 11, ... of these ranks, each trained at random, with unequal weights."""
    rng = np.random.default_rng(seed)
    return {
        10 + i: (train(rule, rule.send(state, rank), rng), float(rng.integers(1, 50))) for i, rank in enumerate(ranks)
    }


def metrics(client: int) -> Metrics:
    return Metrics(loss=client * 0.5, units=client * 2.0, correct=client * 1.0, examples=client * 1.0)


def play(rule: Rule, state: ServerState, clients: Mapping[int, Client], channel: PlainChannel | None = None) -> Outcome:
    """A whole round in which everybody answers, in the order of the mapping."""
    channel = channel or PlainChannel()
    ranks = dict.fromkeys(clients, 3)
    machine: SumRound | ListRound
    if isinstance(rule, MeanRule):
        machine = SumRound(state, ranks, 1, channel, rule=rule)
    else:
        assert isinstance(rule, ListRule)
        machine = ListRound(state, ranks, 1, channel, rule=rule)
    while not machine.is_over:
        outbox = machine.outbox()
        for client, (update, weight) in clients.items():
            task = outbox[client].task
            term = contribute(rule, channel, update, weight, metrics(client), task)
            machine.receive(client, term, task.round, task.pass_)
        machine.close()
    return machine.result()


def computed(state: ServerState | Broadcast) -> dict[str, Array]:
    """What the model computes with, the tail included."""
    out = weights(state.adapter)
    return out | {n: out[n] + x.product() for n, x in state.tail.items()}


def weights(x: Adapter) -> dict[str, Array]:
    """What an adapter makes the model compute with: every layer's ΔW and every dense leaf."""
    return {n: layer.scale * layer.b @ layer.a for n, layer in x.layers.items()} | dict(x.dense)


def assert_near(x: Mapping[str, Array], y: Mapping[str, Array], atol: float) -> None:
    assert x.keys() == y.keys()
    for n, value in x.items():
        assert value.shape == y[n].shape, n
        np.testing.assert_allclose(value, y[n], atol=atol, rtol=0, err_msg=n)
