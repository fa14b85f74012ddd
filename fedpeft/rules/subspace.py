"""The mean change of ΔW from sums of thin matrices: unequal ranks where the server sees only sums, and not the ranks.

State: one adapter of rank R a layer, from an SVD: rows of a orthogonal and of norm 1/√3, singular values in b, one
scale for every rank. A client of rank r trains the first r directions and runs the rest frozen, so every client runs
the same model; its change D = scale·(ba − b₀a₀) has rank at most 2r and is kept as factors. Then, with w = R +
``oversampling`` (at most d and k):

1. Y = Σ p D Ω, with Ω (k, w) the same for all: last round's right directions of ΣpD (in the first round, the rows of a
   that all start from, since b = 0 lets hardly anything else move), completed by ``oversampling`` Gaussian columns.
2. The server sends Q = qr(Y), (d, w); P = Σ p Dᵀ Q; ΣpD ≈ Q Pᵀ, which is exact where its rank is at most w.
3. The adapter becomes the best of rank R for what it was plus Q Pᵀ.

The error is never above that of no update at all. In one pass there is no Q to project on: clients send Y and
Z = Ψ D as well, with Ψ (l, d) Gaussian from the seed, l = 2w or d, and ΣpD ≈ Q X with X = pinv(ΨQ) Z. Where the change
has not nearly rank w, that may be worse than no update: so it takes at least 8 columns of oversampling, and always a
warm Ω.

Sent in two passes: w(d + k) numbers a layer up; R(d + k) and w(d + k) down. In one: w·d + l·k up; R(d + k) + w·k down.
The server needs nothing but the mean. Neither form is for noise, which the projection amplifies: with differential
privacy use ``ffa`` or ``fedsvd``.
Sources: Halko et al., arXiv:0909.4061, algorithm 4.1 (the range finder); Vogels et al., arXiv:1905.13727 (PowerSGD:
sums of both sides, warm); Wen et al., arXiv:2507.09990 (FedASK: two passes in federated LoRA); Tropp et al.,
arXiv:1609.00048, algorithm 4 (one pass). Summing the drift, with ranks that differ and stay hidden, is this project's.
"""

from dataclasses import dataclass, replace

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Array, Layer, Layout, LowRank, Tensors, Update, drift, orthogonal, stack
from fedpeft.rules.base import Broadcast, MeanRule, ServerState, Task
from fedpeft.rules.fold import as_kept
from fedpeft.rules.frozen import frozen


@dataclass(frozen=True, slots=True)
class Subspace(MeanRule):
    """Add the mean change of ΔW, in the directions where it lies, and keep the best of the server's rank.

    seed: of Gaussian columns; oversampling: columns of Ω beyond R; one_pass: half the trips, and less sure; warm:
    start from last round's directions (or else from Gaussian columns alone, to compare).
    """

    seed: int
    oversampling: int = 8
    one_pass: bool = False
    warm: bool = True

    def __post_init__(self) -> None:
        if self.oversampling < 1:
            raise ValueError(f"oversampling: got {self.oversampling}; want at least 1 column")
        if self.one_pass and self.oversampling < 8:
            raise ValueError(f"oversampling: got {self.oversampling}; want at least 8 columns where one_pass is set")
        if self.one_pass and not self.warm:
            raise ValueError(
                "warm: got false; want true where one_pass is set: a cold sketch may be worse than nothing"
            )

    @property
    @override
    def tells_factors(self) -> bool:
        return True

    @property
    @override
    def hides_ranks(self) -> bool:
        return True

    @property
    @override
    def passes(self) -> int:
        return 1 if self.one_pass else 2

    def width(self, layer: Layer) -> int:
        """The columns of Ω."""
        return min(layer.rank + self.oversampling, layer.d, layer.k)

    @override
    def layout(self, task: Task) -> Layout:
        y = tuple((f"{x.name}/y", (x.d, self.width(x))) for x in task.spec.layers)
        if self.one_pass:
            z = tuple((f"{x.name}/z", (_rows(x, self.width(x)), x.k)) for x in task.spec.layers)
            return Layout(y + z) + task.spec.leaves
        if task.pass_ == 0:
            return Layout(y)
        return Layout(tuple((f"{x.name}/p", (x.k, self.width(x))) for x in task.spec.layers)) + task.spec.leaves

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        out: dict[str, Array] = {}
        for i, x in enumerate(task.spec.layers):
            left, right = drift(update.trained.layers[x.name], update.received.layers[x.name])
            if task.pass_ == 1:
                out[f"{x.name}/p"] = right.T @ (left.T @ task.shared[f"{x.name}/q"])
                continue
            out[f"{x.name}/y"] = left @ (right @ task.shared[f"{x.name}/omega"])
            if self.one_pass:
                out[f"{x.name}/z"] = (self._psi(task.round, i, x) @ left) @ right
        return out | update.dense() if self.one_pass or task.pass_ == 1 else out

    @override
    def send(self, state: ServerState, rank: int) -> Broadcast:
        sent = frozen(state, rank)
        if state.task.pass_ > 0:
            return sent
        shared = {f"{x.name}/omega": self._omega(state, i, x) for i, x in enumerate(state.task.spec.layers)}
        return replace(sent, task=replace(state.task, shared=shared))

    @override
    def between(self, mean: Tensors, state: ServerState) -> Tensors:
        held = state.adapter.layers
        return {f"{n}/q": np.linalg.qr(mean[f"{n}/y"])[0].astype(x.b.dtype) for n, x in held.items()}

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        layers, memory = dict[str, LowRank](), dict(state.memory)
        for i, x in enumerate(state.task.spec.layers):
            held = state.adapter.layers[x.name]
            if self.one_pass:
                q, _ = np.linalg.qr(mean[f"{x.name}/y"])
                p = (np.linalg.pinv(self._psi(state.task.round, i, x) @ q) @ mean[f"{x.name}/z"]).T
            else:
                q, p = state.task.shared[f"{x.name}/q"], mean[f"{x.name}/p"]
            left, right = stack([(1.0, held)])
            new = orthogonal(np.hstack([left, q]), np.vstack([right, p.T]), x.rank, x.scale)
            layers[x.name] = as_kept(new, held)
            if not p.any():  # nothing has changed: the last directions that are known stay
                continue
            directions, _, _ = np.linalg.svd(p, full_matrices=False)
            memory[f"{x.name}/right"] = directions[:, : x.rank].astype(held.a.dtype)
        after = state.adapter.moved({n: mean[n] for n, _ in state.task.spec.dense})
        return replace(state, memory=memory).next(replace(after, layers=layers))

    def _omega(self, state: ServerState, i: int, layer: Layer) -> Array:
        """Ω (k, w): columns of norm 1, or about it."""
        width = self.width(layer)
        a = state.adapter.layers[layer.name].a
        known = np.zeros((layer.k, 0))
        if self.warm:
            known = state.memory.get(f"{layer.name}/right", np.linalg.qr(a.T.astype(np.float64))[0])
        rng = np.random.default_rng([self.seed, state.task.round, i, 0])
        known = known[:, :width]  # fewer than R where d is
        drawn = rng.normal(size=(layer.k, width - known.shape[1])) / np.sqrt(layer.k)
        return np.hstack([known, drawn]).astype(a.dtype)

    def _psi(self, round: int, i: int, layer: Layer) -> Array:
        """Ψ (l, d), which client and server each draw for themselves."""
        rng = np.random.default_rng([self.seed, round, i, 1])
        return rng.normal(size=(_rows(layer, self.width(layer)), layer.d))


def _rows(layer: Layer, width: int) -> int:
    return min(2 * width, layer.d)
