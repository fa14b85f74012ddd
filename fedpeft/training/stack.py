"""Many clients' trained tensors on one model: each client's rows go through its own, in one forward pass.

A batch holds the rows of K clients, one client after the other, the same number each. Whatever is frozen sees it as
any batch. A module with trained tensors runs as K modules at once: a low-rank layer through batched matrix products,
any other under ``torch.vmap``, so that heads, biases, norms, IA3 vectors, prompts and whole PEFT layers need no code
of their own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpeft.adapters import Adapter, LowRank
from fedpeft.training.bridge import Bridge
from fedpeft.training.tails import layer
from fedpeft.training.units import ADAPTER, Unit, units


@dataclass(slots=True, eq=False)
class Stack:
    """A bridge's model, ready to run K clients at once. Make one with ``Stack.on``.

    names, shapes: of the trained tensors, in the order of ``Adapter.tensors``; size: numbers in one client's row.
    """

    bridge: Bridge
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    _units: tuple[Unit, ...]
    _now: Mapping[str, Tensor] = field(default_factory=dict)
    _tails: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _clients: int = 0
    _rows: int = 0

    @classmethod
    def on(cls, bridge: Bridge) -> "Stack":
        """The stack of a bridge. Its model works as before outside of ``running``."""
        live = bridge.live
        shapes = tuple(tuple(x.shape) for x in live.values())
        return cls(bridge, tuple(live), shapes, tuple(units(bridge.model, live)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each tensor has."""
        return tuple(int(np.prod(x)) for x in self.shapes)

    def holds(self, module: nn.Module | None) -> bool:
        """Whether the module, or one inside it, has trained tensors."""
        inside = set() if module is None else {id(x) for x in module.modules()}
        return any(id(x.module) in inside for x in self._units)

    @property
    def is_plain(self) -> bool:
        """Whether all that is trained are linear layers' low-rank pairs and modules of the model's own."""
        return all(x.is_plain for x in self._units)

    def row(self, adapter: Adapter) -> NDArray[np.float32]:
        """An adapter as one row of numbers (sum of ``sizes``,), its low-rank layers padded with zeros to the model's.

        Zeros stay zeros in training: the gradient of each pad is a product with the other. Raises ValueError for
        an adapter that is not this model's.
        """
        whole = self.bridge.padded(adapter).tensors()
        return np.concatenate([np.ravel(whole[n]).astype(np.float32) for n in self.names])

    def adapter(self, row: NDArray[np.float32], like: Adapter) -> Adapter:
        """The inverse of ``row``, cut to the ranks of ``like``, with its scales and fixed tensors."""
        parts = dict(zip(self.names, np.split(row, np.cumsum(self.sizes)[:-1]), strict=True))
        spec = self.bridge.spec
        layers = {
            x.name: LowRank(
                parts[f"{x.name}/a"].reshape(x.rank, x.k), parts[f"{x.name}/b"].reshape(x.d, x.rank), x.scale
            ).cut(like.layers[x.name].rank)
            for x in spec.layers
        }
        layers = {n: LowRank(x.a.copy(), x.b.copy(), x.scale) for n, x in layers.items()}
        return Adapter(layers, {n: parts[n].reshape(shape).copy() for n, shape in spec.dense}, like.fixed)

    @contextmanager
    def running(self, tails: Sequence[str] = ()) -> Iterator[None]:
        """A context in which the model's forward pass takes batches of as many clients as ``put`` said.

        tails: the layers that run a frozen low-rank path beside them. ValueError for one that the model has not.
        """
        hooks = []
        try:
            for name in tails:
                hooks.append(layer(self.bridge.model, name).register_forward_hook(self._adding(name)))
            for unit in self._units:
                patched = self._linear(unit) if unit.pair else self._mapped(unit)
                unit.module.forward = patched
            if self.bridge.prompts_by_row:
                self.bridge.model.get_prompt = self._prompts  # type: ignore[method-assign]
            yield
        finally:
            for unit in self._units:
                vars(unit.module).pop("forward", None)
            vars(self.bridge.model).pop("get_prompt", None)
            for hook in hooks:
                hook.remove()
            self._now, self._tails = {}, {}

    def put(
        self,
        tensors: Mapping[str, Tensor],
        clients: int,
        rows: int,
        tails: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """What the next pass runs with.

        tensors: the trained tensors (clients, *shape) by name; rows: of each client; tails: by layer, a (clients, r,
        k) and b (clients, d, r), which holds the scale.
        """
        self._now, self._clients, self._rows, self._tails = tensors, clients, rows, tails or {}

    def _adding(self, name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            a, b = self._tails[name]
            x = args[0].to(a.dtype)
            if x.shape[-1] != a.shape[2] or y.shape[-1] != b.shape[1]:
                raise ValueError(f"tail: {name} is ({y.shape[-1]}, {x.shape[-1]}); got ({b.shape[1]}, {a.shape[2]})")
            more = torch.bmm(torch.bmm(x.reshape(self._clients, -1, a.shape[2]), a.transpose(1, 2)), b.transpose(1, 2))
            return y + more.to(y.dtype).reshape(y.shape)

        return hook

    def _linear(self, unit: Unit) -> Callable[..., Tensor]:
        """y = f(x) + scale · b a x with each client's a and b: as two batched products."""
        assert unit.pair is not None
        left, right = unit.pair
        module: Any = unit.module
        scale = float(module.scaling[ADAPTER])
        base, dropout = module.base_layer, module.lora_dropout[ADAPTER]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y: Tensor = base(x, *args, **kwargs)
            a, b = self._now[left], self._now[right]
            if torch.is_autocast_enabled(x.device.type):
                kind = torch.get_autocast_dtype(x.device.type)
                a, b, x = a.to(kind), b.to(kind), x.to(kind)
            else:
                x = x.to(a.dtype)
            inner = torch.bmm(dropout(x).reshape(self._clients, -1, a.shape[2]), a.transpose(1, 2))
            outer = y.reshape(self._clients, -1, b.shape[1])
            if outer.dtype != inner.dtype:
                return (outer + scale * torch.bmm(inner, b.transpose(1, 2))).to(y.dtype).reshape(y.shape)
            return torch.baddbmm(outer, inner, b.transpose(1, 2), alpha=scale).reshape(y.shape)

        return forward

    def _mapped(self, unit: Unit) -> Callable[..., Any]:
        """A module's own forward pass, for all clients at once: arguments with the batch's rows are split by client."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            mine = {f"inner.{inside}": self._now[name] for inside, name in unit.tensors.items()}
            split = [self._split(x) for x in (*args, *kwargs.values())]
            given: list[Any] = []

            def one(tensors: Mapping[str, Tensor], *inputs: Any) -> tuple[Tensor, ...]:
                named = dict(zip(kwargs, inputs[len(args) :], strict=True))
                out = torch.func.functional_call(unit.once, dict(tensors), inputs[: len(args)], named)
                given[:] = out if isinstance(out, tuple) else [out]
                return tuple(x for x in given if isinstance(x, Tensor))

            places = (0, *(0 if is_split else None for _, is_split in split))
            mapped = torch.vmap(one, in_dims=places, randomness="different")(mine, *(x for x, _ in split))
            found = iter([x.reshape(-1, *x.shape[2:]) for x in mapped])
            out = [next(found) if isinstance(x, Tensor) else x for x in given]
            return out[0] if len(out) == 1 else tuple(out)

        return forward

    def _prompts(self, batch_size: int, *args: Any, **kwargs: Any) -> Tensor:
        """Each client's prompt for each of its rows: peft makes one, and repeats it for the batch."""
        model: Any = self.bridge.model
        each: Tensor = type(model).get_prompt(model, 1, *args, **kwargs)
        return each.repeat_interleave(batch_size // self._clients, dim=0)

    def _split(self, x: Any) -> tuple[Any, bool]:
        """(clients, rows of one client, ...), if x has the batch's rows; else x as it is."""
        whole = self._clients * self._rows
        if not isinstance(x, Tensor) or not x.ndim or not x.shape[0] or x.shape[0] % whole:
            return x, False
        return x.reshape(self._clients, -1, *x.shape[1:]), True
