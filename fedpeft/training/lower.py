"""What the frozen layers below the lowest trained one make of a text, kept: it is computed once, whoever trains on it.

The input of the lowest layer with trained tensors depends on the frozen base and the text's tokens alone. It is kept by
these tokens, so that later epochs, rounds and evaluations, of all clients of this process, begin at that layer; the
layers below pass on what they are given. The embedding's lookup, masks and positions are made as always.
A text is computed by itself and unpadded, and what is used is what would be kept: so a result depends neither on what
is there already, nor on which texts share a batch, nor on the room, bit for bit. The first pass over
texts so takes longer than in batches. Padding gets zeros, which no token sees.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from typing_extensions import override

from fedpeft.errors import ConfigError
from fedpeft.training.bridge import Bridge
from fedpeft.training.settings import Training

_KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}

_PLACES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "bert": ("encoder.layer", ("pooler",)),
    "gpt2": ("h", ("ln_f",)),
    "llama": ("layers", ("norm",)),
}
"""By a model's type: where its layers are, and what of the inner model comes after them."""


@dataclass(slots=True, eq=False)
class Kept:
    """What is kept of texts, each (tokens, width) in main memory, by the bytes of its tokens.

    room: bytes that it may take; size: that it takes; anew: how often a text was computed that there is no room for.
    Another process, to which this is sent, begins with nothing.
    """

    room: int
    size: int = 0
    anew: int = 0
    texts: dict[bytes, Tensor] = field(default_factory=dict[bytes, Tensor])

    def put(self, key: bytes, x: Tensor) -> None:
        """Keep it, if there is room; a warning where there is none for the first time."""
        if self.size + x.nbytes <= self.room:
            self.texts[key] = x
            self.size += x.nbytes
            return
        if not self.anew:
            warnings.warn(
                f"training.lower_room: {self.room / 1e6:.3g} MB hold what the lower layers make of {len(self.texts)} "
                f"texts; of others it is computed each time",
                RuntimeWarning,
                2,
            )
        self.anew += 1

    @override
    def __reduce__(self) -> tuple[type["Kept"], tuple[int]]:
        return Kept, (self.room,)


class _ReachedError(Exception):
    """Ends a pass at the lowest trained layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Lower:
    """The frozen part of a model below its lowest trained layer. Make one with ``lower``.

    inner: the transformer without a head; layers: its blocks; lowest: the first with trained tensors; width: of what is
    between them; kind: what it is kept in; beneath: the beginnings of names of modules that are left out of passes.
    """

    inner: nn.Module
    layers: nn.ModuleList
    lowest: int
    width: int
    kind: torch.dtype
    beneath: tuple[str, ...]
    kept: Kept

    @contextmanager
    def feeding(self, inputs: Mapping[str, Tensor | bool]) -> Iterator[None]:
        """A context for one pass on these inputs, in which what is kept of them is put in place.

        What is not there yet is computed before, under the autocast that is on. Texts are padded on the right.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        assert isinstance(ids, Tensor)
        assert isinstance(mask, Tensor)
        given = self.of(ids, mask)

        def giving(x: Tensor, *_: object, **__: object) -> Tensor:
            return given.to(x.dtype)

        below = list(self.layers[: self.lowest])
        try:
            for layer in below[:-1]:
                layer.forward = _passing
            # Not a hook of the layer above, which is gone when checkpointing runs that layer again for its gradients.
            below[-1].forward = giving
            yield
        finally:
            for layer in below:
                vars(layer).pop("forward", None)

    def of(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The lowest trained layer's inputs of these texts, (rows, length, width), with zeros for padding.

        ids, mask: (rows, length), the mask 1 for tokens, which come first, and 0 for padding.
        """
        lengths = mask.sum(dim=1).tolist()
        texts = [x[:n] for x, n in zip(ids.cpu().numpy().astype(np.int32), lengths, strict=True)]
        keys = [x.tobytes() for x in texts]
        have = {key: x for key in keys if (x := self.kept.texts.get(key)) is not None}
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in have and len(text)}
        if missing:
            with _resting(self.inner), torch.inference_mode(False), torch.no_grad():
                for key, text in missing.items():
                    have[key] = self._computed(torch.from_numpy(text.astype(np.int64)).to(ids.device))
                    self.kept.put(key, have[key])
        whole = torch.zeros(*ids.shape, self.width, dtype=self.kind)
        for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            if length:
                whole[row, :length] = have[key]
        return whole.to(ids.device)

    def need_above(self, names: Collection[str]) -> None:
        """Raise ValueError for a frozen path (a tail) that begins below the lowest trained layer."""
        for name in names:
            if name.startswith(self.beneath):
                raise ValueError(
                    f"tail: {name} is below the layers that are trained, where training.lower keeps what the base "
                    f'alone makes of a text; want training.lower = "none"'
                )

    def _computed(self, ids: Tensor) -> Tensor:
        """Of one text (tokens,): (tokens, width), in main memory."""
        seen: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _ReachedError

        hook = self.layers[self.lowest].register_forward_pre_hook(stop)
        try:
            self.inner(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=False)
        except _ReachedError:
            pass
        finally:
            hook.remove()
        return seen[0][0].to("cpu", self.kind)


def lower(bridge: Bridge, training: Training) -> Lower | None:
    """What is below the lowest layer that a bridge's adapter trains, as the settings keep it; None where they don't.

    ConfigError, naming training.lower, for a model whose layers are not known, an adapter with which nothing below
    stays as it is, and dropout below.
    """
    if training.lower == "none":
        return None
    got = f'training.lower: got "{training.lower}"'
    outer: Any = bridge.model.get_base_model()
    kind = str(outer.config.model_type)
    if kind not in _PLACES:
        raise ConfigError(f'{got}, which works for {", ".join(_PLACES)}, and this model is {kind}; want "none"')
    path, after = _PLACES[kind]
    inner: nn.Module = getattr(outer, outer.base_model_prefix)
    layers = inner.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    container = path.split(".")[0]
    first = [x for n, x in inner.named_children() if n not in (container, *after)]
    names = {id(x): n for n, x in bridge.live.items()}
    inside = {id(x) for x in outer.parameters()}
    early = [n for x, n in names.items() if x not in inside] + _trained(first, names)
    if bridge.method.is_prompt or early:
        what = early[0] if early else "a prompt"
        raise ConfigError(
            f'{got}, and {bridge.method.method} trains {what}, which comes before all layers; want "none"'
        )
    lowest = next((i for i, x in enumerate(layers) if _trained([x], names)), len(layers))
    if lowest == len(layers):
        raise ConfigError(f'{got}, and no layer has anything that is trained; want "none"')
    if not lowest:
        raise ConfigError(
            f"{got}, and {_trained([layers[0]], names)[0]} in the lowest layer is trained, so that nothing below it is "
            f'frozen; want adapter.layers, the number of top layers to adapt, or "none"'
        )
    below = [*first, *layers[:lowest]]
    if any(_draws(x) for x in below):
        raise ConfigError(f"{got}, and model.dropout is on, so that no text gives the same twice; want it off")
    where = {id(x): n for n, x in bridge.model.named_modules()}
    beneath = tuple(f"{where[id(x)]}." for x in below)
    room = Kept(training.bytes_lower)
    return Lower(inner, layers, lowest, int(outer.config.hidden_size), _KINDS[training.lower], beneath, room)


def _trained(modules: Collection[nn.Module], names: Mapping[int, str]) -> list[str]:
    """What of these modules is trained, or has a part of the adapter, by name."""
    live = [names[id(x)] for module in modules for x in module.parameters() if id(x) in names]
    return live or [n for module in modules for n, x in module.named_modules() if isinstance(x, BaseTunerLayer)]


def _draws(module: nn.Module) -> bool:
    """Whether it has a rate of dropout above 0."""
    return any(
        (isinstance(x, nn.modules.dropout._DropoutNd) and x.p > 0)
        or any("drop" in n and isinstance(rate, float) and rate > 0 for n, rate in vars(x).items())
        for x in module.modules()
    )


def _passing(x: Tensor, *_: object, **__: object) -> Tensor:
    """A layer that does nothing."""
    return x


@contextmanager
def _resting(module: nn.Module) -> Iterator[None]:
    """A context in which a module and those in it are not in training mode."""
    training = [x for x in module.modules() if x.training]
    for x in training:
        x.training = False
    try:
        yield
    finally:
        for x in training:
            x.training = True
