"""Frozen linear layers and embeddings whose weights stay packed in memory, in 8 or 4 bits a number.

A weight is expanded when it is used, forward and again backward, some of its rows at a time, and never kept: what
autograd saves are the packed tensors that the module holds anyway. The arithmetic is that of the input, or autocast's.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from fedpeft.training.dequantise import dequantised, turned
from fedpeft.training.formats import BLOCK, EXPANDED, LEVELS, Format, Packed, pack

_PAIRED = {torch.float32: torch.int64, torch.bfloat16: torch.int32, torch.float16: torch.int32}
"""An integer type of twice a floating type's size."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How codes and scales are read: as (rows, columns) in a format of ``formats``.

    compiled: whether bitsandbytes' kernel reads them, which is for nf4 in whole blocks, and has the codes ``turned``.
    """

    format: Format
    columns: int
    compiled: bool = False


def expanded(codes: Tensor, scales: Tensor, kind: Kind, dtype: torch.dtype) -> Tensor:
    """The matrix (rows, columns) that these rows of codes and scales stand for."""
    if kind.format == "int8":
        return codes.to(dtype).mul_(scales.to(dtype)[:, None])
    if dtype not in _PAIRED:
        return expanded(codes, scales, kind, torch.float32).to(dtype)
    if kind.compiled:
        return dequantised(codes, scales, dtype)
    table = _table(kind.format, dtype, codes.device)
    whole = torch.index_select(table, 0, codes.flatten().int()).view(dtype).view(len(codes), -1)
    factors, cut = scales.to(dtype), kind.columns // BLOCK
    if cut:
        blocks: Tensor = whole[:, : cut * BLOCK].unflatten(1, (cut, BLOCK))  # type: ignore[no-untyped-call]  # torch's own
        blocks.mul_(factors[:, :cut, None])
    if kind.columns % BLOCK:
        whole[:, cut * BLOCK :].mul_(factors[:, cut:])
    return whole[:, : kind.columns]


@lru_cache(maxsize=32)
def _table(format: Format, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256,): for each byte its two levels as one integer, so that expanding is one look-up for two numbers."""
    levels, byte = torch.tensor(LEVELS[format]), torch.arange(256)
    pairs = torch.stack([levels[byte & 15], levels[byte >> 4]], dim=1).to(device, dtype)
    return pairs.view(_PAIRED[dtype]).view(-1)


class _Product(torch.autograd.Function):
    """x Wᵀ + bias for a packed W, which has no gradient and which all clients of a ``vmap`` share."""

    @staticmethod
    @override
    def forward(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, kind: Kind) -> Tensor:
        some = _rows(codes, kind)
        if len(some) == 1:
            return functional.linear(x, expanded(codes, scales, kind, x.dtype), bias)
        y = x.new_empty(*x.shape[:-1], len(codes))
        for part in some:
            weight = expanded(codes[part], scales[part], kind, x.dtype)
            y[..., part] = functional.linear(x, weight, None if bias is None else bias[part])
            del weight  # before the next rows are expanded
        return y

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, codes, scales, _, ctx.kind = inputs
        ctx.save_for_backward(codes, scales)
        ctx.save_for_forward(codes, scales)

    @staticmethod
    @override
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (g,) = grad_outputs
        codes, scales = ctx.saved_tensors
        back: Tensor | None = None
        for part in _rows(codes, ctx.kind) if ctx.needs_input_grad[0] else ():
            more = g[..., part] @ expanded(codes[part], scales[part], ctx.kind, g.dtype)
            back = more if back is None else back + more
        of_bias = g.reshape(-1, g.shape[-1]).sum(dim=0) if ctx.needs_input_grad[3] else None
        return back, None, None, of_bias, None

    @staticmethod
    @override
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        dx, _, _, dbias, _ = grad_inputs
        codes, scales = ctx.saved_tensors
        y = None if dx is None else _product(dx, codes, scales, None, ctx.kind)
        return y if dbias is None else dbias if y is None else y + dbias

    @staticmethod
    @override
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        x, codes, scales, bias, kind = args
        of_x, of_codes, of_scales, of_bias, _ = in_dims
        if of_codes is not None or of_scales is not None:
            raise ValueError("got a packed weight for each client; want one that all share")
        x = x if of_x is None else x.movedim(of_x, 0)
        if of_bias is None:
            return _product(x, codes, scales, bias, kind), 0
        y = _product(x, codes, scales, None, kind)
        ones = (1,) * (y.ndim - 1 - (of_x is not None))
        return y + bias.movedim(of_bias, 0).reshape(info.batch_size, *ones, -1), 0


def _product(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, kind: Kind) -> Tensor:
    flat = x.reshape(-1, kind.columns)  # so that what the function gives is no view, and may be changed in place
    y: Tensor = _Product.apply(flat, codes, scales, bias, kind)  # type: ignore[no-untyped-call]  # torch's own
    return y.view(*x.shape[:-1], len(codes))


def _rows(codes: Tensor, kind: Kind) -> list[slice]:
    """The rows in parts that are expanded at a time."""
    step = max(1, EXPANDED // kind.columns)
    return [slice(i, min(i + step, len(codes))) for i in range(0, len(codes), step)]


class FrozenLinear(nn.Module):
    """A linear layer y = W x + bias with W (out, in) packed. The bias is the layer's own, and may be trained.

    name: of the weight in the base model; transposed: whether the model has it as (in, out), as Conv1D does.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self, kind: Kind, codes: Tensor, scales: Tensor, bias: nn.Parameter | None, name: str, transposed: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = kind.columns, len(codes)
        self.kind, self.name, self.transposed = kind, name, transposed
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = bias

    @override
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _product(x, self.codes, self.scales, bias, self.kind)

    @property
    def weight(self) -> Tensor:
        """All of it in fp32, as the model has it: for what asks for its shape or type, at the price of its memory."""
        whole = expanded(self.codes, self.scales, self.kind, torch.float32)
        return whole.T if self.transposed else whole

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind.format}"


class FrozenEmbedding(nn.Module):
    """An embedding (words, width) that is packed, and gives the rows that are asked for in ``dtype``."""

    codes: Tensor
    scales: Tensor

    def __init__(self, kind: Kind, codes: Tensor, scales: Tensor, dtype: torch.dtype, name: str, pad: int | None):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = len(codes), kind.columns, pad
        self.kind, self.name, self.dtype = kind, name, dtype
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = (
            None,
            2.0,
            False,
            False,
        )  # which peft reads
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @override
    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        return expanded(self.codes[flat], self.scales[flat], self.kind, self.dtype).reshape(*ids.shape, -1)

    @property
    def weight(self) -> Tensor:
        """All of it in fp32."""
        return expanded(self.codes, self.scales, self.kind, torch.float32)

    @override
    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.kind.format}"


def matrices(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose weights can be packed: linear layers and embeddings of torch's and transformers' own types."""
    for module in model.modules():
        plain = type(module) in (nn.Linear, Conv1D)
        if plain or (type(module) is nn.Embedding and module.max_norm is None):
            yield module


def quantise(model: nn.Module, format: Format, names: Mapping[int, str], dtype: torch.dtype) -> None:
    """Pack the frozen matrices of a model, in place: afterwards their fp32 values are nowhere in memory.

    names: of the parameters that may be packed, by their identity; dtype: of what embeddings give. A weight that is
    tied is packed once, and shared. Embeddings, with a head that is tied to one, are packed in int8 in any format: they
    are read once and not multiplied, so that their error is not averaged out.
    """
    tables = {id(x.weight) for x in matrices(model) if isinstance(x, nn.Embedding)}
    packed: dict[tuple[int, bool], tuple[Kind, Tensor, Tensor]] = {}

    def made(module: nn.Module, weight: Tensor) -> tuple[Kind, Tensor, Tensor] | None:
        if id(weight) not in names or weight.requires_grad:
            return None
        flip = isinstance(module, Conv1D)
        key = id(weight), flip
        if key not in packed:
            packed[key] = _packed(weight.T if flip else weight, "int8" if id(weight) in tables else format)
        return packed[key]

    replace(model, made, names, dtype)


def replace(
    model: nn.Module,
    packed: Callable[[nn.Module, Tensor], tuple[Kind, Tensor, Tensor] | None],
    names: Mapping[int, str],
    dtype: torch.dtype,
) -> None:
    """Put a frozen module in the place of each matrix of a model that ``packed`` gives codes for, and None for others.

    packed: takes a module and its weight; names: of weights, by their identity; dtype: of what embeddings give.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, name))
    groups: dict[int, list[nn.Module]] = {}
    for module in matrices(model):
        groups.setdefault(id(module.weight), []).append(module)
    for key in list(groups):  # one after another, so that what is replaced is gone before the next is packed
        for module in groups.pop(key):
            found = packed(module, _of(module))
            if found is not None:
                new = _frozen(module, found, names[key], dtype)
                for parent, name in places.pop(id(module)):
                    parent._modules[name] = new


def compile_nf4(model: nn.Module) -> None:
    """Have a packed model's matrices in nf4 expanded by bitsandbytes' kernel, from the same codes in its order.

    They then are this process's own, and no longer a mapped file's. Those whose rows don't end with a whole block of 64
    stay as they are: the kernel knows blocks, and no rows.
    """
    for module in model.modules():
        if isinstance(module, FrozenLinear) and module.kind.format == "nf4" and not module.kind.columns % BLOCK:
            module.kind = Kind(module.kind.format, module.kind.columns, compiled=True)
            module.codes = turned(module.codes)


def _of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _packed(weight: Tensor, format: Format) -> tuple[Kind, Tensor, Tensor]:
    found: Packed = pack(weight.detach().cpu().float().numpy(), format)
    codes, scales = (torch.from_numpy(np.ascontiguousarray(x)).to(weight.device) for x in (found.codes, found.scales))
    return Kind(format, found.columns), codes, scales


def _frozen(module: nn.Module, packed: tuple[Kind, Tensor, Tensor], name: str, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Embedding):
        made: nn.Module = FrozenEmbedding(*packed, dtype, name, module.padding_idx)
    else:
        bias = module.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        made = FrozenLinear(*packed, bias, name, isinstance(module, Conv1D))
    made.train(module.training)
    return made
