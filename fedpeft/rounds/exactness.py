"""How far the server's change of ΔW is from the weighted mean of the clients' changes, from sketches that add up.

The error of a layer is ``‖(W′ − W) − Σ p D‖ / ‖Σ p D‖`` in Frobenius norm: D is a client's change of ``scale · b @ a``,
W what the server's adapter and tail make of the layer. Each client sends ``w Ψ D Ω`` (p, p) beside its vector, with its
weight w and with Ψ (p, d) and Ω (k, p) the same for all, so that sums of them are all that the server needs. It
compares the mean with the sketch of its own change.

What it tells: 0 stays 0 for any Ψ and Ω, so exact rules come out at the rounding of what travels (1e-7 in fp32) and of
what is kept (above that where a change is small beside the adapter). For others it is an estimate. A squared norm is
right in expectation, with a relative deviation of at most ``√(4q/p + 2(1 + q)/p²)`` with q = ‖DDᵀ‖²/‖D‖⁴, from 1 for
a change of rank 1 down to 1/rank: at p = 16 about 50 % to 20 %, half of it for the norm; over all layers much less.
The mean is of changes as they were trained. So a clip, a server's learning rate and momentum count as errors, and
where ``channel.clip`` is there to hide a client, this has to be off: sketches are not clipped.
A layer of which a factor stays on the client has no such number, nor have dense leaves, whose mean is exact. Where
ΔW is not ``scale · b @ a`` (DoRA divides by a norm), it is of that product all the same.
Source: the estimate is Johnson and Lindenstrauss's, on both sides; signs as in Achlioptas, JCSS 66 (2003), theorem 1.1.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import isqrt, prod
from typing import Self

import numpy as np

from fedpeft.adapters import Array, Layout, LowRank, Tensors, Update
from fedpeft.rules import Rule, ServerState, Task

LEAST, MOST = 2, 16
"""What p is at least and at most."""

SHARE = 10
"""A layer's sketch is at most one part in so many of what the layer sends, where that is not less than ``LEAST``²."""


@dataclass(frozen=True, slots=True)
class Exactness:
    """Relative errors. overall: of all layers as one; layers: of each whose mean change is not zero."""

    overall: float
    layers: Mapping[str, float]

    @classmethod
    def of(cls, change: Tensors, mean: Tensors) -> Self | None:
        """From sketches of the server's change and of the clients' mean change; None where the latter is zero."""
        errors = {n: float(np.sum((change[n] - x) ** 2)) for n, x in mean.items()}
        sizes = {n: float(np.sum(x**2)) for n, x in mean.items()}
        if not sum(sizes.values()) > 0:
            return None
        layers = {n: (errors[n] / size) ** 0.5 for n, size in sizes.items() if size > 0}
        return cls((sum(errors.values()) / sum(sizes.values())) ** 0.5, layers)


def sketched(rule: Rule, task: Task) -> Layout:
    """Layout of the sketches that a client sends in this pass: (p, p) by layer; of none but in a round's last pass.

    p is 16, or what makes p² a tenth of what the layer sends: 4 % for rank 8 on 768 × 768, half of that if only b is
    sent.
    """
    if task.pass_ + 1 != rule.passes:
        return Layout(())
    kept = rule.personal(task.spec)
    sent = {x.name: 0 for x in task.spec.layers if not kept & {f"{x.name}/a", f"{x.name}/b"}}
    for name, shape in rule.layout(task).shapes:
        layer = name.rpartition("/")[0]
        while layer and layer not in sent:
            layer = layer.rpartition("/")[0]
        if layer:
            sent[layer] += prod(shape)
    sides = {n: min(MOST, max(LEAST, isqrt(x // SHARE))) for n, x in sent.items() if x}
    return Layout(tuple((n, (p, p)) for n, p in sides.items()))


def sketch(terms: Iterable[tuple[float, Mapping[str, LowRank]]], layout: Layout) -> dict[str, Array]:
    """``Ψ (Σ weight · ΔW) Ω`` for each layer of the layout, in fp64; layers that a term lacks add nothing.

    Cost: O(p·r·(d + k)) a layer and term; no d × k matrix is formed.
    """
    each = list(terms)
    return {
        name: _sketch([(w, x[name]) for w, x in each if name in x], name, shape[0]) for name, shape in layout.shapes
    }


def of_client(update: Update, weight: float, layout: Layout) -> Array:
    """What a client adds to the sum: the sketch of its change times its weight, flat."""
    return layout.flatten(sketch([(weight, update.trained.layers), (-weight, update.received.layers)], layout))


def of_server(before: ServerState, after: ServerState, layout: Layout) -> dict[str, Array]:
    """The sketch of what a round changed in the server's adapter and tail together."""
    terms = [(1.0, after.adapter.layers), (-1.0, before.adapter.layers), (1.0, after.tail), (-1.0, before.tail)]
    return sketch(terms, layout)


def compared(total: Array, weight: float, layout: Layout, before: ServerState, after: ServerState) -> Exactness | None:
    """The errors of a round, from the sum of what its clients sent; None where nothing was measured, or changed."""
    return Exactness.of(of_server(before, after, layout), layout.unflatten(total / weight))


def _sketch(terms: list[tuple[float, LowRank]], name: str, p: int) -> Array:
    total = np.zeros((p, p))
    if terms:
        psi, omega = _signs(name, terms[0][1].b.shape[0], terms[0][1].a.shape[1], p)
    for weight, x in terms:
        total += weight * x.scale * ((psi @ x.b) @ (x.a @ omega))
    return total


def _signs(name: str, d: int, k: int, p: int) -> tuple[Array, Array]:
    """Ψ (p, d) and Ω (k, p) of entries ±1/√p, from the layer's name and size alone: raw bits, the same in any numpy."""
    seed = int.from_bytes(sha256(f"{name} {d} {k}".encode()).digest()[:8], "little")
    raw = np.random.PCG64(seed).random_raw(-(-p * (d + k) // 64)).astype("<u8")
    signs = (np.unpackbits(raw.view(np.uint8))[: p * (d + k)] * 2.0 - 1.0) / np.sqrt(p)
    return signs[: p * d].reshape(p, d), signs[p * d :].reshape(k, p)
