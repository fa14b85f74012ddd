"""An adapter as a kit's graph takes it, and what of it is trained."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters import CORES, Adapter, Array, Basis, LowRank, Spec, bases


@dataclass(frozen=True, slots=True, eq=False)
class Fed:
    """What a graph is fed beside a batch, all fp32 and our own copies.

    inputs: every tensor of the adapter by name, the factors of all layers of one rank: behind a layer's own directions
    are those of its tail, at its scale, and zeros; own: views of the inputs without them; bases: of the layers whose
    cores are trained; values: what is trained, by name, to be changed in place: views of the inputs, or of such a layer
    its cores and their scales, which ``settle`` then takes into the inputs; slopes_of: the tensors whose gradients say
    those of the values.
    """

    start: Adapter
    inputs: dict[str, Array]
    own: dict[str, Array]
    bases: Mapping[str, Basis]
    values: dict[str, Array]
    slopes_of: tuple[str, ...]

    @classmethod
    def of(cls, start: Adapter, tail: Mapping[str, LowRank], trains: str = "") -> Self:
        """trains: as in ``rounds.Job``; empty for evaluation. ValueError for a tail on no layer, or of other sizes."""
        for name, x in tail.items():
            _need_room(start, name, x)
        wide = {n: x.join(tail[n]) if n in tail else x for n, x in start.layers.items()}
        rank = max((1, *(x.rank for x in wide.values())))
        inputs = {n: np.array(x, np.float32) for n, x in start.dense.items()}
        for name, x in wide.items():
            for part, y in (("a", x.pad(rank).a), ("b", x.pad(rank).b)):
                inputs[f"{name}/{part}"] = np.array(y, np.float32, order="C")
        ranks = {n: x.rank for n, x in start.layers.items()}
        own = {n: _own(n, x, ranks) for n, x in inputs.items()}
        found = bases(start) if trains in CORES else {}
        parts = "ab" if trains in CORES else trains
        wanted = [n for n in start.tensors(parts) if n not in {f"{x}/a" for x in found}] if trains else []
        values: dict[str, Array] = {}
        for name in wanted:
            layer = name.rpartition("/")[0]
            if layer in found:
                cores = found[layer].cores(start.layers[layer].b).astype(np.float32)
                values[f"{layer}/core"] = cores
                if trains == "heads":
                    values[f"{layer}/scale"] = np.ones(len(cores), np.float32)
            else:
                values[name] = own[name]
        return cls(start, inputs, own, found, values, tuple(wanted))

    def slopes(self, found: Mapping[str, NDArray[Any]]) -> dict[str, Array]:
        """The gradients by the values, of those by the tensors ``slopes_of`` as the graph gives them: views, or new."""
        ranks = {n: x.rank for n, x in self.start.layers.items()}
        slopes: dict[str, Array] = {}
        for name in self.slopes_of:
            slope, layer = _own(name, found[name], ranks), name.rpartition("/")[0]
            if layer not in self.bases:
                slopes[name] = slope
                continue
            by_core = self.bases[layer].cores(slope).astype(np.float32)  # leftᵢᵀ times its columns
            scales = self.values.get(f"{layer}/scale")
            if scales is not None:
                slopes[f"{layer}/scale"] = (by_core * self.values[f"{layer}/core"]).sum(axis=(1, 2))
                by_core *= scales[:, None, None]
            slopes[f"{layer}/core"] = by_core
        return slopes

    def settle(self) -> None:
        """Take what the cores have become into the inputs."""
        for layer, basis in self.bases.items():
            self.own[f"{layer}/b"][...] = basis.b(self._cores(layer))

    def adapter(self) -> Adapter:
        """The adapter as it is now: fp32 copies, without its tail."""
        own = {n: x.copy() for n, x in self.own.items()}
        layers = {n: replace(x, a=own[f"{n}/a"], b=own[f"{n}/b"]) for n, x in self.start.layers.items()}
        for layer, basis in self.bases.items():
            layers[layer] = replace(self.start.layers[layer], b=basis.pair(self._cores(layer), 1.0).b)
        return Adapter(layers, {n: own[n] for n in self.start.dense}, self.start.fixed)

    def _cores(self, layer: str) -> Array:
        cores, scales = self.values[f"{layer}/core"], self.values.get(f"{layer}/scale")
        return cores if scales is None else scales[:, None, None] * cores


def need_fit(adapter: Adapter, spec: Spec) -> None:
    """Raise ValueError, naming the tensor, for an adapter that is not of this spec or of lower ranks of it."""
    want: dict[str, object] = {x.name: (x.d, x.k, x.scale) for x in spec.layers} | dict(spec.dense)
    mine = adapter.spec
    got: dict[str, object] = {x.name: (x.d, x.k, x.scale) for x in mine.layers} | dict(mine.dense)
    for name in sorted(got.keys() | want.keys()):
        if got.get(name) != want.get(name):
            raise ValueError(
                f"{name}: got {got.get(name, 'none')}; want {want.get(name, 'none')}: "
                f"the adapter is for another method or model than the kit"
            )
    most = {x.name: x.rank for x in spec.layers}
    for x in mine.layers:
        if x.rank > most[x.name]:
            raise ValueError(f"{x.name}: got rank {x.rank}; want at most {most[x.name]}, the kit's")


def _need_room(start: Adapter, name: str, tail: LowRank) -> None:
    if name not in start.layers:
        raise ValueError(f"tail: the adapter has no layer {name!r}")
    own = start.layers[name]
    d, k = own.b.shape[0], own.a.shape[1]
    if (tail.b.shape[0], tail.a.shape[1]) != (d, k):
        raise ValueError(f"tail: {name} is ({d}, {k}); got ({tail.b.shape[0]}, {tail.a.shape[1]})")


def _own(name: str, x: NDArray[Any], ranks: Mapping[str, int]) -> NDArray[Any]:
    """A view of a factor without what stands behind its layer's own directions; a dense leaf as it is."""
    layer, _, part = name.rpartition("/")
    if layer not in ranks or part not in "ab":
        return x
    return x[: ranks[layer]] if part == "a" else x[:, : ranks[layer]]
