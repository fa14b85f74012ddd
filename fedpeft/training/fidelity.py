"""Packing a base's matrices under an adapter, and the trial that its gradients are still those of the whole base."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedpeft.data import Federation
from fedpeft.errors import ConfigError
from fedpeft.training.bases import Base, store
from fedpeft.training.batches import Batch, collate
from fedpeft.training.bridge import Bridge
from fedpeft.training.devices import Place
from fedpeft.training.environment import give_back
from fedpeft.training.objectives import outcome
from fedpeft.training.quantised import quantise
from fedpeft.training.refusals import packed_refusal
from fedpeft.training.settings import Quantise, Training
from fedpeft.training.tokens import tokenise

BOUNDS: Mapping[Quantise, float] = {"int8": 0.97, "nf4": 0.4, "int4": 0.4}
"""The least mean cosine, over an adapter's tensors, of a gradient on the packed base with that on the whole one.

Measured with LoRA of rank 8 on attention, on four rows: MiniLM 0.999 (int8), 0.95 (nf4), 0.92 (int4); SmolLM2 0.995,
0.61 and 0.63. What is silently wrong was at 0.3 and below.
"""

_ROWS, _TRIED = 4, 32
_SMALL = 1e-3  # of the largest tensor's gradient
_CHANGE = 0.01  # of each number of the adapter's start, so that both factors of a product have gradients


def pack_base(
    base: Base,
    names: Mapping[int, str],
    bridge: Bridge,
    federation: Federation,
    training: Training,
    place: Place,
) -> None:
    """Pack the frozen matrices of a base that has an adapter on it, in place, if its settings say so.

    names: of the base's own parameters, by their identity. The adapter's gradients on one batch of four rows are taken
    before and after. ConfigError for a method that reads the base's weights by itself, and for one whose gradients are
    no longer what they were: their mean cosine is below ``BOUNDS``. Where there are no rows nothing is tried.
    """
    if base.quantise == "none":
        return
    method = bridge.method.method
    reason = packed_refusal(bridge.method.name, vars(bridge.model.peft_config["default"]))
    if reason:
        raise ConfigError(
            f"model.quantise: got {base.quantise!r}, with which {method} can't train: {reason}; use another "
            f'adapter.method, or model.quantise = "none"'
        )
    batch = _batch(base, federation, training, place)
    before = {} if batch is None else gradients(base, bridge, batch, place)
    try:
        quantise(bridge.model, base.quantise, names, place.dtype)
    except ValueError as error:
        raise ConfigError(f"model.quantise: {error}") from error
    live = bridge.model.named_parameters()
    store(bridge.model, [n for n, x in live if id(x) in names and not x.requires_grad], place.dtype)
    give_back()
    if batch is None:
        return
    found = cosine(before, gradients(base, bridge, batch, place))
    give_back()
    if not found >= BOUNDS[base.quantise]:
        raise ConfigError(
            f"model.quantise: with {base.quantise!r} the gradients of {method} have a mean cosine of {found:.3f} with "
            f"those on the whole base; want at least {BOUNDS[base.quantise]}: use "
            f"{'none' if base.quantise == 'int8' else 'int8'}"
        )


def gradients(base: Base, bridge: Bridge, batch: Batch, place: Place) -> dict[str, Tensor]:
    """The gradient of the mean loss by each trained tensor, near the bridge's adapter, which stays as it is."""
    start, rng = bridge.read(), np.random.default_rng(0)
    bridge.write(start.moved({n: _CHANGE * rng.standard_normal(x.shape) for n, x in start.tensors().items()}))
    parameters = bridge.trainable("ab")
    try:
        with place.seeded(0):
            bridge.model.eval()  # without dropout
            with place.arithmetic():
                each, _ = outcome(bridge.model, base.head, batch, base.vocabulary)
            found = torch.autograd.grad(each.mean(), list(parameters.values()), allow_unused=True)
    finally:
        bridge.write(start)
    return {n: x.float() for n, x in zip(parameters, found, strict=True) if x is not None}


def cosine(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """The mean over tensors of the cosine of two gradients, without those that are next to nothing to begin with."""
    norms = {n: float(x.norm()) for n, x in before.items()}
    least = _SMALL * max(norms.values(), default=0.0)
    some = [n for n, x in norms.items() if x > least]
    each = [float(functional.cosine_similarity(before[n].flatten(), after[n].flatten(), dim=0)) for n in some]
    return float(np.mean(each)) if each else 1.0


def _batch(base: Base, federation: Federation, training: Training, place: Place) -> Batch | None:
    """Up to four rows that clients train on, not cut before their reply; None if there are none."""
    rows = np.sort(federation.used())[:_TRIED]
    if not len(rows):
        return None
    some = tokenise(federation.table, base, training.length, rows).view(rows)
    if not len(some):
        return None
    return collate(some, np.arange(min(_ROWS, len(some))), base, training.image_size, place.device)
