"""Rules to try, and what they promise; the clients to try them on are in ``fedpeft.testing``."""

from dataclasses import dataclass, replace

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Array, Layer, Layout, LowRank, Tensors, Update, best_rank, stack
from fedpeft.rules import (
    FactorMean,
    FedEx,
    FedKSeed,
    FedRot,
    FedSB,
    FedSVD,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    Krum,
    ListRule,
    LoRAA2,
    LoRAFair,
    MeanRule,
    Median,
    Ravan,
    Rule,
    Scaffold,
    ServerState,
    Subspace,
    Task,
    TrimmedMean,
    ZeroPad,
)
from fedpeft.testing.cohorts import (  # noqa: F401  # tests take them from here
    DENSE,
    LAYERS,
    Client,
    adapter,
    assert_near,
    cohort,
    computed,
    metrics,
    normal,
    play,
    start,
    task_of,
    train,
    weights,
)


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

    @property
    @override
    def hides_ranks(self) -> bool:
        return True

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
    "fedsb": FedSB(),
    "fedsvd": FedSVD(),
    "fedrot": FedRot(),
    "fedrot, soft": FedRot(strength=0.4),
    "fedkseed": FedKSeed(seed=6, size=7),  # as few directions as clients of the cohort go along
    "lora_a2": LoRAA2(),
    "ravan": Ravan(seed=4, heads=6),  # of one direction each
    "ravan, one head": Ravan(seed=4, heads=1),
    "scaffold": Scaffold(),
    "scaffold, rolora": Scaffold("rolora"),
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

REFACTORED = ("two passes", "fedkseed", "fedsb", "fedsvd", "ravan", "flexlora", "flexlora, full", "flora", "subspace")
"""Starts of the names of rules that factor the product anew, so that an adapter that does the same is another one."""


OWN, PRECISION = "one client of a low rank gets its own update back", "an adapter keeps its precision"
WEIGHT = "who has nearly all the weight decides"
SKIPPED = {
    "lora_a2": (OWN,),
    "two passes": (OWN, PRECISION),
    **dict.fromkeys(("median", "trimmed", "krum", "multi-krum"), (WEIGHT,)),
}
"""Laws that a rule breaks on purpose: a low rank is a limit of what is sent; this other rule is as simple as can be; a
hostile client could claim any weight."""


def is_refactored(rule: Rule) -> bool:
    return any(RULES[name] is rule for name in RULES if name.startswith(REFACTORED))


def drops(rule: Rule) -> bool:
    return any(RULES[name] is rule for name in DROPPING)
