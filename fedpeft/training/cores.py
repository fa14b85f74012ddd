"""Training of cores: a layer's b is, for a while, frozen directions times small matrices that alone are trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpeft.adapters import CORES, Adapter, Basis, LowRank, bases, basis_of
from fedpeft.rounds import Job
from fedpeft.training.bridge import Bridge
from fedpeft.training.units import ADAPTER


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """One layer's cores in training: ``core`` (h, r, r), and of heads ``scale`` (h,), which starts at 1."""

    basis: Basis
    core: nn.Parameter
    scale: nn.Parameter | None

    @property
    def value(self) -> Tensor:
        """What is between the frozen directions, (h, r, r)."""
        return self.core if self.scale is None else self.scale[:, None, None] * self.core

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """By the names that the optimiser's order and an error have."""
        return {f"{name}/core": self.core} | ({} if self.scale is None else {f"{name}/scale": self.scale})


@contextmanager
def cores(
    bridge: Bridge, start: Adapter, trains: str, device: torch.device
) -> Iterator[tuple[dict[str, nn.Parameter], Mapping[str, Core]]]:
    """A context in which a bridge's model, which holds ``start``, runs and trains cores in place of its layers' b.

    trains: "core", or "heads" for a scale of each core too. Gives the parameters to train, by name, and the cores by
    layer. Layers that are not in core form train both factors. ValueError for one that is no linear layer.
    """
    found = {n: _core(b, start.layers[n], trains, device) for n, b in bases(start).items()}
    parameters: dict[str, nn.Parameter] = {}
    for name, x in bridge.trainable("ab").items():
        layer, _, part = name.rpartition("/")
        if layer not in found:
            parameters[name] = x
            continue
        x.requires_grad_(False)
        if part == "b":
            parameters |= found[layer].parameters(layer)
    patched: list[nn.Module] = []
    try:
        for name, core in found.items():
            right = right_of(bridge.model, name)
            right.forward = _running(core, device)
            patched.append(right)
        yield parameters, found
    finally:
        for right in patched:
            del right.forward


def put_back(start: Adapter, trained: Adapter, found: Mapping[str, Core]) -> Adapter:
    """``trained``, with what the cores have become in the layers of ``start`` that have them."""
    layers = dict(trained.layers)
    for name, x in found.items():
        value = x.value.detach().cpu().numpy()
        layers[name] = replace(start.layers[name], b=x.basis.pair(value, 1.0).b)
    return replace(trained, layers=layers, fixed=start.fixed)


def right_of(model: nn.Module, name: str) -> nn.Module:
    """The module that multiplies with b in a layer of this name. ValueError where that is no linear layer's."""
    module: Any = model.get_submodule(name)
    right = dict(module.lora_B.named_children()).get(ADAPTER)
    if not isinstance(right, nn.Linear):
        raise ValueError(f"{name}: got a {type(module).__name__} in adapter.targets; cores want linear layers")
    return right


def _core(basis: Basis, layer: LowRank, trains: str, device: torch.device) -> Core:
    core = nn.Parameter(torch.tensor(basis.cores(layer.b), dtype=torch.float32, device=device))
    return Core(basis, core, nn.Parameter(torch.ones(len(core), device=device)) if trains == "heads" else None)


def _running(core: Core, device: torch.device) -> Callable[[Tensor], Tensor]:
    """y = Σᵢ leftᵢ coreᵢ zᵢ for the z = a x of a layer, of which zᵢ are the numbers that belong to the i-th core."""
    heads, width = core.basis.at.shape
    left = torch.tensor(core.basis.left[:, core.basis.at.ravel()], dtype=torch.float32, device=device)

    def forward(z: Tensor) -> Tensor:
        each = z[..., : heads * width].reshape(*z.shape[:-1], heads, width)  # behind them, the zeros of a padded rank
        inner = torch.einsum("...hr,hsr->...hs", each, core.value.to(z.dtype))
        return functional.linear(inner.flatten(-2), left.to(z.dtype))

    return forward


@dataclass(slots=True, eq=False)
class CoreRows:
    """Rows of clients in a pool whose cores are trained: what each one's b is made of.

    lefts: by layer, (rows, h, d, r), padded with zeros to the most heads and directions of a head; ranks: the model's;
    scaled: whether each core has a scale, which is behind the cores in a row's numbers.
    """

    lefts: dict[str, Tensor]
    ranks: Mapping[str, int]
    scaled: bool

    @classmethod
    def of(cls, bridge: Bridge, jobs: Sequence[Job], rows: int, device: torch.device) -> "CoreRows | None":
        """Room for these jobs, which train the same; None where that is no cores.

        ValueError where several heads are not all of one width, or where a layer is no linear layer.
        """
        if jobs[0].trains not in CORES:
            return None
        lefts: dict[str, Tensor] = {}
        each = [bases(job.start) for job in jobs]
        for name, x in each[0].items():
            right_of(bridge.model, name)
            heads, widths = max(b[name].at.shape[0] for b in each), {b[name].at.shape[1] for b in each}
            if heads > 1 and len(widths) > 1:
                raise ValueError(f"{name}: got heads of {sorted(widths)} directions; want one width for all clients")
            lefts[name] = torch.zeros(rows, heads, x.left.shape[0], max(widths), device=device)
        ranks = {x.name: x.rank for x in bridge.spec.layers}
        return cls(lefts, ranks, jobs[0].trains == "heads")

    @property
    def held(self) -> frozenset[str]:
        """The factors that are frozen, by their names in the adapter."""
        return frozenset(f"{n}/a" for n in self.lefts)

    def size(self, name: str) -> int | None:
        """How many numbers are trained in place of a tensor of the adapter; None where it is none's b."""
        layer, _, part = name.rpartition("/")
        if part != "b" or layer not in self.lefts:
            return None
        _, heads, _, width = self.lefts[layer].shape
        return heads * (width * width + self.scaled)

    def begin(self, row: int, start: Adapter) -> None:
        """Give a row to a client."""
        for name, x in bases(start).items():
            left = torch.tensor(x.lefts)
            self.lefts[name][row] = 0
            self.lefts[name][row, : left.shape[0], :, : left.shape[2]] = left

    def numbers(self, name: str, start: Adapter) -> Tensor:
        """The numbers that a client's training begins with, in place of a layer's b."""
        layer = name.rpartition("/")[0]
        _, heads, _, width = self.lefts[layer].shape
        mine = torch.tensor(basis_of(start, layer).cores(start.layers[layer].b), dtype=torch.float32)
        whole = torch.zeros(heads, width, width)
        whole[: mine.shape[0], : mine.shape[1], : mine.shape[2]] = mine
        return torch.cat([whole.flatten(), torch.ones(heads * self.scaled)])

    def b(self, name: str, numbers: Tensor, rows: Tensor) -> Tensor:
        """The b (k, d, R) of these rows' clients, from the numbers (k, n) that each trains in its place."""
        layer = name.rpartition("/")[0]
        left = self.lefts[layer][rows]
        clients, heads, d, width = left.shape
        core = numbers[:, : heads * width * width].reshape(clients, heads, width, width)
        if self.scaled:
            core = core * numbers[:, heads * width * width :, None, None]
        whole = (left @ core).transpose(1, 2).reshape(clients, d, heads * width)
        return functional.pad(whole, (0, self.ranks[layer] - heads * width))
