"""Packing a base's matrices under an adapter, and the trial that its gradients are still those of the whole base."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedpeft.data import Federation
from fedpeft.errors import ConfigError
from fedpeft.training.bases import Base
from fedpeft.training.batches import Batch, collate
from fedpeft.training.bridge import Bridge
from fedpeft.training.devices import Place
from fedpeft.training.environment import give_back
from fedpeft.training.hollow import fill, share_file, trains_matrices
from fedpeft.training.kept_bases import Source, contents
from fedpeft.training.objectives import outcome
from fedpeft.training.quantised import compile_nf4, quantise
from fedpeft.training.refusals import packed_refusal
from fedpeft.training.settings import Quantise, Training
from fedpeft.training.tokens import tokenise
from fedpeft.training.values import store

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

    names: ``Base.own``. The adapter's gradients on four rows are taken
    before and after. ConfigError for a method that reads the base's weights by itself, and for one whose
    gradients are no longer what they were: their mean cosine is below ``BOUNDS``. Where there are no rows nothing is
    tried. What has passed is kept in the cache folder, and on a CPU its matrices are mapped from there; a base that has
    a ``source`` has passed before, and is filled from it. At last nf4 is given to bitsandbytes' kernel, where
    the settings say so.
    """
    method = bridge.method.method
    if base.quantise != "none":
        reason = packed_refusal(bridge.method.name, vars(bridge.model.peft_config["default"]))
        if reason:
            raise ConfigError(
                f"model.quantise: got {base.quantise!r}, with which {method} can't train: {reason}; use another "
                f'adapter.method, or model.quantise = "none"'
            )
    if base.source is not None:
        _need_same_layers(base.source, bridge)
        fill(bridge.model, names, base.source.file, place.dtype)
        _store(base, bridge, names, place)
    elif base.quantise != "none":
        _pack(base, names, bridge, _rows(base, federation, training, place), place)
    if base.compiled:
        compile_nf4(bridge.model)


def _pack(base: Base, names: Mapping[int, str], bridge: Bridge, rows: Sequence[Batch], place: Place) -> None:
    assert base.quantise != "none"
    before = _mean(base, bridge, rows, place)
    try:
        quantise(bridge.model, base.quantise, names, place.dtype)
    except ValueError as error:
        raise ConfigError(f"model.quantise: {error}") from error
    content = contents(bridge.model, names) if rows and base.shelf is not None else None
    _store(base, bridge, names, place)
    give_back()
    if not rows:
        return
    found = cosine(before, _mean(base, bridge, rows, place))
    give_back()
    if not found >= BOUNDS[base.quantise]:
        raise ConfigError(
            f"model.quantise: with {base.quantise!r} the gradients of {bridge.method.method} have a mean cosine of "
            f"{found:.3f} with those on the whole base; want at least {BOUNDS[base.quantise]}: use "
            f"{'none' if base.quantise == 'int8' else 'int8'}"
        )
    if base.shelf is not None and content is not None and not trains_matrices(bridge.model, names):
        file = base.shelf.put(*content, base.plain, base.fresh, base.vocabulary, found)
        if file is not None and place.device.type == "cpu":
            share_file(bridge.model, file)
            give_back()


def _store(base: Base, bridge: Bridge, names: Mapping[int, str], place: Place) -> None:
    """What is not packed, and not trained, in the precision that the base runs in."""
    live = bridge.model.named_parameters()
    if base.quantise != "none":
        store(bridge.model, [n for n, x in live if id(x) in names and not x.requires_grad], place.dtype)


def _need_same_layers(source: Source, bridge: Bridge) -> None:
    if source.kit is None:
        return
    got, want = ({x.name for x in spec.layers} for spec in (bridge.spec, source.kit.spec))
    if not got <= want:
        raise ConfigError(
            f"adapter.targets: got {min(got - want)}, which the kit in {source.kit.folder} was not tried with; want "
            f"the layers that it was exported for, or the model itself"
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


def _mean(base: Base, bridge: Bridge, rows: Sequence[Batch], place: Place) -> dict[str, Tensor]:
    """``gradients`` of all rows together, in the memory of one."""
    found: dict[str, Tensor] = {}
    for batch in rows:
        share = batch.units / sum(x.units for x in rows)
        for name, x in gradients(base, bridge, batch, place).items():
            found[name] = found[name] + share * x if name in found else share * x
    return found


def _rows(base: Base, federation: Federation, training: Training, place: Place) -> list[Batch]:
    """Up to four rows that clients train on, not cut before their reply, each by itself."""
    rows = np.sort(federation.used())[:_TRIED]
    if not len(rows):
        return []
    some = tokenise(federation.table, base, training.length, rows).view(rows)
    each = np.arange(min(_ROWS, len(some)))
    return [collate(some, each[i : i + 1], base, training.image_size, place.device) for i in each]
