"""Adapters as immutable values: low-rank layers, dense leaves, and what one client changed."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from hashlib import sha256
from json import dumps
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.layout import Array, Layout, Shape, Tensors
from fedpeft.adapters.lowrank import LowRank


@dataclass(frozen=True, slots=True)
class Layer:
    """An adapted matrix of shape (d, k), with the rank and scale that the server holds for it."""

    name: str
    d: int
    k: int
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class Spec:
    """The public shape of an adapter: what every client and the server agree on before they start."""

    layers: tuple[Layer, ...] = ()
    dense: tuple[tuple[str, Shape], ...] = ()

    def factors(self, parts: str) -> Layout:
        """Layout of the low-rank layers' factors, with ``parts`` one of "a", "b", "ab": names end in /a and /b."""
        return Layout(
            tuple((f"{x.name}/{p}", (x.rank, x.k) if p == "a" else (x.d, x.rank)) for x in self.layers for p in parts)
        )

    @property
    def leaves(self) -> Layout:
        """Layout of the dense leaves."""
        return Layout(self.dense)

    @property
    def digest(self) -> str:
        """SHA-256 in hex of names, shapes, ranks and scales, in order."""
        return sha256(dumps([[astuple(x) for x in self.layers], self.dense]).encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """All the trainable tensors that a PEFT method adds to a frozen base, and its fixed ones.

    layers: low-rank pairs by layer; dense: every other trainable tensor (heads, biases, IA3 vectors,
    prompts); fixed: what the method drew at random and never trains (VeRA's projections), of any
    dtype. Rules see layers and dense; fixed travels once and never changes.
    """

    layers: Mapping[str, LowRank] = field(default_factory=dict[str, LowRank])
    dense: Mapping[str, Array] = field(default_factory=dict[str, Array])
    fixed: Mapping[str, NDArray[Any]] = field(default_factory=dict[str, NDArray[Any]])

    @property
    def spec(self) -> Spec:
        return Spec(
            tuple(Layer(n, x.b.shape[0], x.a.shape[1], x.rank, x.scale) for n, x in self.layers.items()),
            tuple((n, x.shape) for n, x in self.dense.items()),
        )

    @property
    def digest(self) -> str:
        """SHA-256 in hex: the same for two adapters exactly if ``same`` says so, in any order of names."""
        whole = sha256()
        for name, x in sorted(_everything(self).items()):
            whole.update(f"{name} {x.dtype.str} {x.shape} ".encode())
            whole.update(x.tobytes())
        return whole.hexdigest()

    def tensors(self, parts: str = "ab") -> dict[str, Array]:
        """The factors named by ``parts`` as "layer/a" and "layer/b", then the dense leaves; views, not copies."""
        factors = {f"{n}/{p}": _factor(x, p) for n, x in self.layers.items() for p in parts}
        return {**factors, **self.dense}

    def put(self, tensors: Tensors) -> Self:
        """This adapter with these tensors, named and shaped as in ``tensors()``, in place of its own."""
        self._expect(tensors)
        layers = {
            n: replace(x, a=tensors.get(f"{n}/a", x.a), b=tensors.get(f"{n}/b", x.b)) for n, x in self.layers.items()
        }
        return replace(self, layers=layers, dense={n: tensors.get(n, x) for n, x in self.dense.items()})

    def cut(self, rank: int) -> Self:
        """What a client of this rank holds: the first ``rank`` directions of each layer."""
        return replace(self, layers={n: x.cut(rank) for n, x in self.layers.items()})

    def at(self, spec: Spec) -> Self:
        """The same ΔW with the scales that ``spec`` has for these layers; those that it lacks keep theirs."""
        scales = {layer.name: layer.scale for layer in spec.layers}
        return replace(self, layers={n: x.at(scales.get(n, x.scale)) for n, x in self.layers.items()})

    def moved(self, change: Tensors) -> Self:
        """This adapter with ``change`` added to the tensors it names, each kept in its own dtype."""
        self._expect(change)
        mine = self.tensors()
        return self.put({n: (mine[n] + x).astype(mine[n].dtype) for n, x in change.items()})

    def _expect(self, tensors: Tensors) -> None:
        mine = self.tensors()
        for name, x in tensors.items():
            if name not in mine:
                raise ValueError(f"no such tensor in the adapter: {name}; it has {', '.join(list(mine)[:3])} …")
            if x.shape != mine[name].shape:
                raise ValueError(f"{name} does not fit the adapter: got {x.shape}; want {mine[name].shape}")


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What one client did: the adapter it received, and that adapter once trained.

    travel: the sum of the factors that its gradients were multiplied with on the way, so that (received − trained) /
    travel is their mean: steps times learning rate for plain SGD; 0 where the steps were not along gradients.
    moves: how far it went along each of its job's directions (``Pool``), where it was given any.
    """

    received: Adapter
    trained: Adapter
    travel: float = 1.0
    moves: Array | None = None

    def factors(self, parts: str, spec: Spec) -> dict[str, Array]:
        """trained − received in fp64, factor by factor, zero-padded to the server's ranks.

        Factors of different scales don't add up, so a scale that is not the server's raises ValueError,
        as do layers that are not the server's.
        """
        wanted = {layer.name for layer in spec.layers}
        for side in (self.received, self.trained):
            if side.layers.keys() != wanted:
                raise ValueError(
                    f"the adapter is not the server's: it has layers {sorted(side.layers)}; want {sorted(wanted)}"
                )
        change: dict[str, Array] = {}
        for layer in spec.layers:
            new, old = self.trained.layers[layer.name], self.received.layers[layer.name]
            if new.scale != layer.scale or old.scale != layer.scale:
                raise ValueError(
                    f"{layer.name}: factors have scale {new.scale}; want the server's {layer.scale}: "
                    f"use one scale for every rank, or a rule that adds products"
                )
            new, old = new.pad(layer.rank), old.pad(layer.rank)
            change |= {f"{layer.name}/{p}": _change(_factor(new, p), _factor(old, p)) for p in parts}
        return change

    def at(self, spec: Spec) -> Self:
        """This update with the server's scales: what rules that add products take of a client with its own."""
        return replace(self, received=self.received.at(spec), trained=self.trained.at(spec))

    def dense(self) -> dict[str, Array]:
        """trained − received in fp64, for each dense leaf."""
        return {n: _change(x, self.received.dense[n]) for n, x in self.trained.dense.items()}


def _factor(layer: LowRank, part: str) -> Array:
    return {"a": layer.a, "b": layer.b}[part]


def _change(new: Array, old: Array) -> Array:
    """In fp64, where the difference of two fp32 numbers is exact (unless one is 2**29 times the other)."""
    return np.subtract(new, old, dtype=np.float64)


def same(x: Adapter, y: Adapter) -> bool:
    """Whether two adapters are equal bit for bit, in values, names, scales and dtypes."""
    left, right = _everything(x), _everything(y)
    return left.keys() == right.keys() and all(
        a.dtype == right[n].dtype and a.shape == right[n].shape and a.tobytes() == right[n].tobytes()
        for n, a in left.items()
    )


def _everything(x: Adapter) -> dict[str, NDArray[Any]]:
    scales = {f"{n}/scale": np.array(layer.scale) for n, layer in x.layers.items()}
    return x.tensors() | {f"fixed/{n}": v for n, v in x.fixed.items()} | scales
