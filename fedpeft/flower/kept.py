"""What a client keeps of itself, as the named tensors of its state: personal ones, and an update between passes."""

from collections.abc import Mapping

import numpy as np

from fedpeft.adapters import Adapter, LowRank, Update
from fedpeft.flower.packing import Tensor
from fedpeft.rounds import Metrics


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without the prefix."""
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


def remember(update: Update, metrics: Metrics) -> dict[str, Tensor]:
    """An update and its metrics as tensors, for the later passes of its round."""
    tensors: dict[str, Tensor] = {"update/metrics": metrics.vector()}
    for name, adapter in (("received", update.received), ("trained", update.trained)):
        tensors |= {f"update/{name}/tensors/{n}": x for n, x in adapter.tensors().items()}
        tensors |= {f"update/{name}/scale/{n}": np.array(x.scale, np.float64) for n, x in adapter.layers.items()}
    return tensors


def recall(state: Mapping[str, Tensor] | None) -> tuple[Update, Metrics] | None:
    """The inverse of ``remember``; None if the state holds no update."""
    if state is None or "update/metrics" not in state:
        return None
    adapters = []
    for name in ("received", "trained"):
        tensors = under(state, f"update/{name}/tensors/")
        scales = under(state, f"update/{name}/scale/")
        layers = {n: LowRank(tensors.pop(f"{n}/a"), tensors.pop(f"{n}/b"), float(x)) for n, x in scales.items()}
        adapters.append(Adapter(layers, tensors))
    return Update(*adapters), Metrics.of(state["update/metrics"])
