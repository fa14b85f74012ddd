"""A peft model as an ``Adapter``: the only place that knows peft's key names and scales."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel, PeftType, PromptLearningConfig, get_peft_model
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant, _DoraConvNdVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedpeft.adapters import Adapter, LowRank, Spec, drawn
from fedpeft.errors import ConfigError
from fedpeft.training.methods import Method, TaskName
from fedpeft.training.targets import settle

_ADAPTER = "default"
_PREFIXES = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ImportError, RuntimeError)
_PLAIN_VARIANTS = (DoraLinearVariant, _DoraConvNdVariant, ALoraLinearVariant)


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """The two factors of one layer, as live parameters, and the scale of their product.

    A convolution's a is (r, in, h, w) and its b (out, r, 1, 1): flattened behind the first axis they
    are the factors of the kernel, flattened likewise. An embedding's are those of its transpose.
    """

    a: nn.Parameter
    b: nn.Parameter
    scale: float

    def value(self) -> LowRank:
        """Copies of the factors."""
        a, b = (_copied(x).reshape(x.shape[0], -1) for x in (self.a, self.b))
        return LowRank(a, b, self.scale)


class Bridge:
    """A base model with a PEFT method on it, whose trainable tensors are read and written as an ``Adapter``.

    Attributes: ``model``, peft's; ``method``, ``task``; ``spec``, the adapter's public shape;
    ``prompt_length``, how many leading positions of a language model's logits belong to the method's
    prompt and not to the batch.
    """

    __slots__ = ("_dense", "_dora", "_drawn", "_fixed", "_pairs", "method", "model", "prompt_length", "spec", "task")

    def __init__(self, model: PeftModel, method: Method, task: TaskName, base: frozenset[int]) -> None:
        """For ``attach``. base: identities of the base's own tensors."""
        self.model = model
        self.method = method
        self.task: TaskName = task
        live = {n: x for n, x in model.named_parameters() if x.requires_grad}
        self._pairs = dict(_pairs(model, {id(x) for x in live.values()}))
        factors = {id(x) for p in self._pairs.values() for x in (p.a, p.b)}
        self._dense = {n: x for n, x in live.items() if id(x) not in factors}
        self._drawn = {n: x for n, x in _frozen(model) if id(x) not in base}
        self._fixed: Mapping[str, NDArray[Any]] = {n: _copied(x) for n, x in self._drawn.items()}
        self._dora = [x for x in model.modules() if isinstance(x, DoraLinearLayer)]
        _need_own_memory(live)
        self.spec: Spec = self.read().spec
        config: Any = model.peft_config[_ADAPTER]
        self.prompt_length = int(config.num_virtual_tokens) if self.prompts_by_row and task == "lm" else 0

    @classmethod
    def attach(
        cls, model: PreTrainedModel, method: Method, task: TaskName, seed: int, fresh: Sequence[str] = ()
    ) -> Self:
        """Put the method on ``model``, which is changed in place: use a model once.

        fresh: parameters of the model that its files don't hold, by name.
        What the method draws depends on ``seed`` alone, and the global random state is left as it was.
        The base is frozen; a classification head (task "classify" or "image") and what is fresh are trained whole.
        Trained tensors are fp32 whatever the base is: run a base in bf16 under autocast.
        Raises ConfigError naming the key for a method, option, target or rank that this model can't have.
        """
        if any(isinstance(x, BaseTunerLayer) for x in model.modules()):
            raise ValueError(f"the {type(model).__name__} has an adapter already; want a freshly loaded model")
        config = settle(model, method, task, fresh).config(task)
        base = frozenset(id(x) for x in (*model.parameters(), *model.buffers()))
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                # peft asks transformers 5 for a property under its old name, and corrects itself for Conv1D.
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
                torch.default_generator.manual_seed(seed)
                wrapped = get_peft_model(model, config)
        except _REFUSALS as error:
            why = " ".join(str(error).split())
            raise ConfigError(f"adapter: peft can't put {method.name} on {type(model).__name__}: {why}") from error
        for x in wrapped.parameters():
            if x.requires_grad and x.dtype != torch.float32:
                x.data = x.data.float()
        return cls(wrapped, method, task, base)

    def read(self, like: Adapter | None = None) -> Adapter:
        """The adapter as it is now: fp32 copies of the trained tensors; ``fixed`` is the same object each time.

        like: an adapter whose ranks the layers are cut to, the one that was written.
        """
        layers = {n: p.value() for n, p in self._pairs.items()}
        if like is not None:
            layers = {n: x.cut(like.layers[n].rank) for n, x in layers.items()}
        return Adapter(layers, {n: _copied(x) for n, x in self._dense.items()}, self._fixed)

    def write(self, adapter: Adapter) -> None:
        """Make ``adapter`` the model's: the inverse of ``read``.

        Layers of a lower rank than the model's are padded with zeros, which training leaves zero: ``read(adapter)``
        cuts them off again. Raises ValueError naming the tensor where its shape, scale or name is not this model's.
        """
        tensors = self.padded(adapter).tensors()
        with torch.no_grad():
            for name, x in self.live.items():
                x.copy_(_tensor(tensors[name]).reshape(x.shape))
        self.write_fixed(adapter)
        for layer in self._dora:
            layer._cache_clear()

    def write_fixed(self, adapter: Adapter) -> None:
        """Make what the method drew at random, and never trains, the model's."""
        if adapter.fixed is not self._fixed:
            self._check_fixed(adapter)
            with torch.no_grad():
                for name, x in self._drawn.items():
                    x.copy_(_tensor(adapter.fixed[name]))
            self._fixed = adapter.fixed

    def padded(self, adapter: Adapter) -> Adapter:
        """The adapter with its layers padded to the model's ranks. Raises ValueError as ``write`` does."""
        self._check(adapter)
        ranks = {x.name: x.rank for x in self.spec.layers}
        return replace(adapter, layers={n: x.pad(ranks[n]) for n, x in adapter.layers.items()})

    def trainable(self, parts: str) -> dict[str, nn.Parameter]:
        """Let the factors named by ``parts`` ("a", "b", "ab") and all dense leaves have gradients, and nothing else.

        Returns them by their names in ``Adapter.tensors``, in that order.
        """
        if not parts or set(parts) - set("ab"):
            raise ValueError(f"parts: got {parts!r}; want 'a', 'b' or 'ab'")
        chosen: dict[str, nn.Parameter] = {}
        for name, x in self.live.items():
            wanted = name in self._dense or name[-1] in parts
            x.requires_grad_(wanted)
            x.grad = None
            if wanted:
                chosen[name] = x
        return chosen

    @property
    def prompts_by_row(self) -> bool:
        """Whether the method puts the same prompt before every row, made once for a batch."""
        config = self.model.peft_config[_ADAPTER]
        return isinstance(config, PromptLearningConfig) and config.peft_type not in _PREFIXES

    @property
    def live(self) -> dict[str, nn.Parameter]:
        """The trained parameters by their names in ``Adapter.tensors``, in that order."""
        factors = {f"{n}/{p}": x for n, pair in self._pairs.items() for p, x in (("a", pair.a), ("b", pair.b))}
        return factors | self._dense

    def _check(self, adapter: Adapter) -> None:
        ranks = {n: x.rank for n, x in adapter.layers.items()}
        want = _shape(self.spec, {x.name: min(x.rank, ranks.get(x.name, x.rank)) for x in self.spec.layers})
        _need_same(_shape(adapter.spec, ranks), want)

    def _check_fixed(self, adapter: Adapter) -> None:
        got = {f"fixed/{n}": f"{x.shape} of {x.dtype}" for n, x in drawn(adapter).items()}
        want = {f"fixed/{n}": f"{tuple(x.shape)} of {_copied(x).dtype}" for n, x in self._drawn.items()}
        _need_same(got, want)


def _pairs(model: PeftModel, live: set[int]) -> Iterator[tuple[str, _Pair]]:
    """Layers whose update is ``scale · b @ a`` with both factors trained, by the module's name."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or isinstance(module, (ParamWrapper, AdaLoraLayer)):
            continue  # Experts have other shapes, and AdaLoRA has a third factor between the two.
        variant = module.lora_variant.get(_ADAPTER)
        if variant is not None and not isinstance(variant, _PLAIN_VARIANTS):
            continue
        for left, right in ((module.lora_A, module.lora_B), (module.lora_embedding_A, module.lora_embedding_B)):
            a, b = _weight(left), _weight(right)
            if a is None or b is None or not {id(a), id(b)} <= live or b[0].numel() != a.shape[0]:
                continue  # Not this kind of layer; one factor is frozen (MiCA); a grouped convolution.
            yield name, _Pair(a, b, float(module.scaling[_ADAPTER]))


def _weight(factors: nn.Module) -> nn.Parameter | None:
    """The factor in peft's dict of modules, or of parameters for embeddings; None where there is none."""
    own = dict(factors.named_parameters())
    return own.get(f"{_ADAPTER}.weight", own.get(_ADAPTER))


def _frozen(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """All tensors that aren't trained, by name: parameters, buffers, and those that peft keeps in plain dicts."""
    yield from ((n, x) for n, x in model.named_parameters() if not x.requires_grad)
    yield from model.named_buffers()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            for attribute, value in vars(module).items():
                if isinstance(value, dict) and attribute not in ("_parameters", "_buffers", "_modules"):
                    yield from ((f"{name}.{attribute}.{k}", x) for k, x in value.items() if isinstance(x, Tensor))


def _need_own_memory(live: Mapping[str, nn.Parameter]) -> None:
    seen: dict[int, str] = {}
    for name, x in live.items():
        other = seen.setdefault(x.data_ptr(), name)
        if other != name and x.numel():
            raise ConfigError(f"adapter: {other} and {name} are one tensor trained under two names; leave tying out")


def _shape(spec: Spec, ranks: Mapping[str, int]) -> dict[str, str]:
    layers = {x.name: f"{x.d} x {x.k} of rank {ranks[x.name]} and scale {x.scale!r}" for x in spec.layers}
    return layers | {n: str(shape) for n, shape in spec.dense}


def _need_same(got: Mapping[str, str], want: Mapping[str, str]) -> None:
    for name in sorted(got.keys() | want.keys()):
        if got.get(name) != want.get(name):
            raise ValueError(
                f"{name}: got {got.get(name, 'none')}; want {want.get(name, 'none')}: "
                f"the adapter is for another method, rank or model"
            )


def _copied(x: Tensor) -> NDArray[Any]:
    """A copy in main memory: fp32 for all that floats, the tensor's own type for indices and masks."""
    kind = torch.float32 if x.is_floating_point() else x.dtype
    return np.array(x.detach().to("cpu", kind).numpy())


def _tensor(x: NDArray[Any]) -> Tensor:
    return torch.tensor(x)
