"""An adapter in peft's format, loaded again as its user will load it, and compared with the run's model."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from fedpeft.adapters import LowRank
from fedpeft.errors import ConfigError
from fedpeft.training.bases import Base, load_base
from fedpeft.training.bridge import Bridge
from fedpeft.training.devices import Place
from fedpeft.training.export import NO_TAIL, need_near, probe_of, said
from fedpeft.training.hollow import fill
from fedpeft.training.quantised import quantise
from fedpeft.training.settings import Model
from fedpeft.training.tails import beside
from fedpeft.training.values import store


def reload_peft(
    settings: Model, base: Base, bridge: Bridge, place: Place, folder: Path, tail: Mapping[str, LowRank] = NO_TAIL
) -> float:
    """How far off the logits are of the adapter in a folder, on the base loaded anew, as a share of the largest.

    settings, base, bridge, place: the run's, with the adapter that was exported; tail: what it runs beside it. The new
    base is held as the run's is, packed or in its precision, and the adapter is put on it by peft alone.
    ConfigError beyond 1e-4, and where peft can't load the folder.
    """
    with place.arithmetic(), beside(bridge.model, tail, place.device):
        probe = probe_of(bridge, 2, 11)
        want = _said(bridge.model, probe)
    name = bridge.method.name
    plain = load_base(settings, base.task, base.classes, 0, place)
    names = plain.own
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft says of its own loading: the numbers are compared below
            again = PeftModel.from_pretrained(plain.model, str(folder), is_trainable=True)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"adapter.method: peft can't load {name} from {folder} again: {why}") from error
    if plain.source is not None:
        fill(again, names, plain.source.file, place.dtype)
    elif base.quantise != "none":
        quantise(again, base.quantise, names, place.dtype)
    if base.quantise != "none":
        store(again, [n for n, x in again.named_parameters() if id(x) in names and not x.requires_grad], place.dtype)
    with place.arithmetic():
        whose = f"adapter.method: {name}, loaded again from {folder}, gives logits that are"
        return need_near([_said(again, probe)], [want], whose, "export to merged instead")


def _said(model: PeftModel, probe: dict[str, Tensor]) -> Tensor:
    model.eval()
    return said(model, probe)
