"""What a client keeps of itself, as the named tensors of its state: personal ones, and an update between passes."""

from collections.abc import Mapping

import numpy as np

from fedpeft.adapters import Adapter, LowRank, Update
from fedpeft.flower.packing import Tensor
from fedpeft.rounds import Metrics


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without the prefix."""
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


def with_own(adapter: Adapter, kept: Mapping[str, Tensor], names: frozenset[str]) -> Adapter:
    """The adapter with those of these tensors that a client has kept in place of its own.

    Of a layer that was kept at another rank, the directions that both have; the others are the adapter's.
    """
    mine = {n: x for n, x in kept.items() if n in names}
    for name, layer in adapter.layers.items():
        a, b = mine.get(f"{name}/a"), mine.get(f"{name}/b")
        if a is not None:
            mine[f"{name}/a"] = np.concatenate([a[: layer.rank], layer.a[len(a) :]])
        if b is not None:
            mine[f"{name}/b"] = np.concatenate([b[:, : layer.rank], layer.b[:, b.shape[1] :]], axis=1)
    return adapter.put(mine)


def its_own(trained: Adapter, kept: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
    """The inverse of ``with_own``: those of these tensors that a client keeps once it has trained.

    Of a layer that it had kept at a higher rank, the directions that it did not train are as they were.
    """
    all_of_it = trained.tensors()
    mine: dict[str, Tensor] = {n: all_of_it[n] for n in names}
    for name, layer in trained.layers.items():
        for part, axis in (("a", 0), ("b", 1)):
            factor = f"{name}/{part}"
            if factor in names and factor in kept:
                _, rest = np.split(kept[factor], [layer.rank], axis)
                mine[factor] = np.concatenate([mine[factor], rest], axis)
    return mine


def remember(update: Update, metrics: Metrics) -> dict[str, Tensor]:
    """An update and its metrics as tensors, for what is sent of it later in its round; not what is fixed."""
    tensors: dict[str, Tensor] = {"update/metrics": metrics.vector(), "update/travel": np.array(update.travel)}
    if update.moves is not None:
        tensors["update/moves"] = update.moves
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
    travel = float(state.get("update/travel", np.array(1.0)))  # which states from before it was kept do not have
    return Update(adapters[0], adapters[1], travel, state.get("update/moves")), Metrics.of(state["update/metrics"])
