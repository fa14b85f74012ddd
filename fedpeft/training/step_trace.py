"""A training step as torch's own operations: forward, losses and gradients, for any number of rows, tokens and units.

Nothing is computed: the model's tensors are stand-ins with a shape and no numbers, so that a large model is traced in
the memory of a small one. What is frozen is an input of the graph, by its name in the base; so is the adapter, by the
names of ``Adapter.tensors``. A language model's head, where it may be run by itself, is one operation, ``HEAD``.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.nn import functional
from typing_extensions import override

from fedpeft.errors import ConfigError
from fedpeft.training.bases import Base
from fedpeft.training.bridge import Bridge
from fedpeft.training.head import passing, runs_alone
from fedpeft.training.objectives import scored
from fedpeft.training.quantised import FrozenEmbedding, FrozenLinear

HEAD = "fedpeft_step::head"
"""(hidden (units, width), weight (words, width), bias or None, targets) -> losses, hits, and the losses' slopes."""

Shape: TypeAlias = tuple[int | str, ...]
"""Sizes; what may be any number has a name."""

_HINTS = {"rows": 3, "length": 13, "units": 7, "rank": 5}  # in the trace; what depends on them is refused afterwards


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """Nodes in the order that torch runs them.

    inputs: placeholders' names in the graph, by what is fed; frozen: by the base's own name; constants: buffers'
    numbers by their placeholders' names. outputs: the names of what is computed, in the order of the graph's output.
    shapes: of what is fed.
    """

    graph: torch.fx.GraphModule
    inputs: Mapping[str, str]
    frozen: Mapping[str, str]
    constants: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    shapes: Mapping[str, Shape]


@lru_cache(maxsize=1)
def _head_operation() -> Any:
    torch.library.define(
        HEAD, "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets) -> (Tensor, Tensor, Tensor)"
    )

    def fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        each = hidden.new_empty(hidden.shape[:1])
        return each, torch.empty_like(each, dtype=torch.bool), torch.empty_like(hidden)

    torch.library.register_fake(HEAD, fake)
    return torch.ops.fedpeft_step.head.default


class _Losses(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        each, hits, slopes = _head_operation()(hidden, weight, bias, targets)
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(hits)
        return each, hits

    @staticmethod
    @override
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (slopes,) = ctx.saved_tensors
        return slopes * grad_outputs[0][:, None], None, None, None


def trace(base: Base, bridge: Bridge, trains: str) -> Traced:
    """The step of a base with an adapter on it, in fp32, without dropout; the model stays as it is.

    trains: the factors that have gradients, "ab" or "b", beside all dense leaves.
    ConfigError naming the model where its code asks for numbers, which a stand-in does not have.
    """
    model, live = bridge.model, bridge.live
    shapes: dict[str, Shape] = {
        "input_ids": ("rows", "length"),
        "attention_mask": ("rows", "length"),
        "targets": ("units",) if base.task == "lm" else ("rows",),
    }
    if base.task == "lm":
        shapes["positions"] = ("units",)
    feeds = tuple(shapes)
    shapes |= {n: _shape(n, x, i) for i, (n, x) in enumerate(live.items())}
    stand_ins = _StandIns()
    given = {n: stand_ins.of(x, torch.int64 if n in feeds else torch.float32) for n, x in shapes.items()}
    packed = [m for m in model.modules() if isinstance(m, FrozenLinear | FrozenEmbedding)]
    frozen = {m.name: stand_ins.of(_as_the_model_has_it(m), torch.float32) for m in packed}
    places, constants = dict[str, str](), dict[str, Tensor]()
    names = {id(x): n for n, x in live.items()}
    for at, x in model.named_parameters(remove_duplicate=False):
        name = names.setdefault(id(x), own_name(at))
        places[at] = name
        if name not in live and name not in frozen:
            frozen[name] = stand_ins.of(tuple(x.shape), torch.float32)
    inside = {id(x) for m in packed for x in (m.codes, m.scales)}
    for at, buffer in model.named_buffers(remove_duplicate=False):
        if id(buffer) not in inside:
            places[at], constants[at] = at, buffer.detach().cpu()
    buffers = {n: stand_ins.of(tuple(x.shape), x.dtype) for n, x in constants.items()}
    trained = [n for n in live if not n.endswith("/a") or "a" in trains]
    order = (*given, *frozen, *buffers)

    def step(*tensors: Tensor) -> list[Tensor]:
        all_of = dict(zip(order, tensors, strict=True))
        for n in trained:
            all_of[n] = all_of[n].detach().requires_grad_()
        own = {
            at: all_of[n].reshape(_live_shape(all_of[n], live[n])) if n in live else all_of[n]
            for at, n in places.items()
        }
        with _unpacked(packed, all_of):
            module = _Loss(base, model)
            losses, hits = functional_call(module, {f"model.{n}": x for n, x in own.items()}, (all_of,))
        slopes = torch.autograd.grad(losses.sum(), [all_of[n] for n in trained], allow_unused=True)
        unused = [n for n, x in zip(trained, slopes, strict=True) if x is None]
        if unused:
            raise ConfigError(f"adapter: the loss of {type(base.model).__name__} does not depend on {unused[0]}")
        return [losses, hits, *(x for x in slopes if x is not None)]

    with _still(base, bridge):
        made = _recorded(step, [*given.values(), *frozen.values(), *buffers.values()], type(base.model).__name__)
    found = dict(zip(order, (x.name for x in made.graph.nodes if x.op == "placeholder"), strict=True))
    return Traced(
        made,
        {n: found[n] for n in given},
        {n: found[n] for n in frozen},
        {found[n]: constants[n] for n in buffers},
        ("losses", "hits", *(f"grad/{n}" for n in trained)),
        shapes,
    )


def _recorded(step: Callable[..., list[Tensor]], tensors: Sequence[Tensor], model: str) -> torch.fx.GraphModule:
    """The operations of a function of stand-ins. model: its name, for errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = make_fx(step, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*tensors)
    except ConfigError:
        raise
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.name: {model} can't be traced for any batch: {why}; use clients with torch, or another model"
        ) from error
    made.graph.eliminate_dead_code()
    return made


def own_name(name: str) -> str:
    """A parameter's name in the base, before there was an adapter on it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


class _StandIns:
    """Tensors without numbers, whose named sizes are symbols."""

    def __init__(self) -> None:
        self._env = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._env, static_shapes=True)
        self._sizes: dict[str, Any] = {}

    def of(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        sizes = [self._size(x) if isinstance(x, str) else x for x in shape]
        with self._mode:
            return torch.empty(sizes, dtype=dtype)

    def _size(self, name: str) -> Any:
        if name not in self._sizes:
            hint, source = _HINTS[name.split(".")[0]], ConstantSource(name)
            symbol = self._env.create_symbol(hint, source, DimDynamic.DYNAMIC, constraint_dim=None)
            self._sizes[name] = self._env.create_symintnode(symbol, hint=hint, source=source)
        return self._sizes[name]


def _shape(name: str, x: Tensor, number: int) -> Shape:
    """What is fed for a trained tensor: the rank of a layer's two factors, which are neighbours, is open."""
    if name.endswith("/a"):
        return f"rank.{number // 2}", x[0].numel()
    return (x.shape[0], f"rank.{number // 2}") if name.endswith("/b") else tuple(x.shape)


def _live_shape(given: Tensor, live: Tensor) -> tuple[Any, ...]:
    """The shape that the model has for what is fed; a rank is the fed tensor's."""
    if live.ndim > 2 and given.ndim == 2:
        return (
            (given.shape[0], *live.shape[1:]) if given.shape[1] == live[0].numel() else (*given.shape, *live.shape[2:])
        )
    return tuple(given.shape)


def _as_the_model_has_it(module: FrozenLinear | FrozenEmbedding) -> tuple[int, int]:
    rows, columns = len(module.codes), module.kind.columns
    return (columns, rows) if isinstance(module, FrozenLinear) and module.transposed else (rows, columns)


class _Loss(nn.Module):
    """Losses and hits of a batch's units."""

    def __init__(self, base: Base, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._base = base

    @override
    def forward(self, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        inputs = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
        targets = given["targets"]
        if self._base.task != "lm":
            return scored(self.model(**inputs).logits, targets)
        head, positions = self._base.head, given["positions"]

        def chosen(x: Tensor) -> Tensor:
            return x.reshape(-1, x.shape[-1])[positions]

        if head is None:
            return scored(chosen(self.model(**inputs, use_cache=False).logits), targets)
        if self._base.vocabulary and isinstance(head, nn.Linear | FrozenLinear) and runs_alone(head):
            weight = given[head.name] if isinstance(head, FrozenLinear) else head.weight
            with passing(head, chosen):
                hidden = self.model(**inputs, use_cache=False).logits
            found: tuple[Tensor, Tensor] = _Losses.apply(hidden, weight, head.bias, targets)  # type: ignore[no-untyped-call]  # torch's
            return found
        hook = head.register_forward_pre_hook(lambda _, args: (chosen(args[0]), *args[1:]))
        try:
            return scored(self.model(**inputs, use_cache=False).logits, targets)
        finally:
            hook.remove()


@contextmanager
def _unpacked(packed: Sequence[FrozenLinear | FrozenEmbedding], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which packed modules compute with these weights, as the model has them."""
    with ExitStack() as stack:
        for module in packed:
            vars(module)["forward"] = _plainly(module, weights[module.name])
            stack.callback(vars(module).pop, "forward", None)
        yield


def _plainly(module: FrozenLinear | FrozenEmbedding, weight: Tensor) -> Callable[[Tensor], Tensor]:
    if isinstance(module, FrozenEmbedding):
        return lambda ids: functional.embedding(ids, weight)
    return lambda x: functional.linear(x, weight.T if module.transposed else weight, module.bias)


@contextmanager
def _still(base: Base, bridge: Bridge) -> Iterator[None]:
    """A context of evaluation, with attention that is plain products and a softmax."""
    model, training = base.model, bridge.model.training
    kind = model.config._attn_implementation
    model.set_attn_implementation("eager")
    bridge.model.eval()
    try:
        yield
    finally:
        bridge.model.train(training)
        model.set_attn_implementation(kind)
