"""A training step by torch and by a graph, on tiny models in any format: shared by the tests of the compiler."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from fedpeft.adapters import Adapter
from fedpeft.training.bases import Base
from fedpeft.training.batches import Batch
from fedpeft.training.bridge import Bridge
from fedpeft.training.head import vocabulary
from fedpeft.training.kept_bases import contents
from fedpeft.training.methods import Method
from fedpeft.training.objectives import predictions, scored
from fedpeft.training.packed_file import read, write
from fedpeft.training.quantised import quantise
from fedpeft.training.step_trace import Traced, own_name
from fedpeft.training.step_weights import Stored
from tests.training.peft_cases import TASKS, build, spread

METHODS = {
    "bert": Method("lora", 4, 7, ("query", "dense"), options={"rank_pattern": {"query": 6}}),
    "llama": Method("lora", 4, 7, ("q_proj", "down_proj"), options={"alpha_pattern": {"q_proj": 3}}),
    "gpt2": Method("lora", 4, 7, ("c_attn", "c_fc")),
}
CLOSE = 1e-5  # of the largest: sums of fp32 in another order, measured at 2e-6


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A base with a trained adapter, and its step as torch's operations."""

    base: Base
    bridge: Bridge
    traced: Traced


def loaded(model: str, method: Method | None = None) -> tuple[Base, Bridge]:
    found = build(model)
    words = vocabulary(found) if TASKS[model] == "lm" else 0
    bridge = Bridge.attach(found, method or METHODS[model], TASKS[model], seed=1)
    bridge.write(spread(bridge.read(), seed=3))
    own = {id(x): own_name(n) for n, x in bridge.model.named_parameters() if id(x) not in map(id, bridge.live.values())}
    classes = () if words else ("a", "b", "c")
    base = Base(found, TASKS[model], classes, "", "", (), None, None, vocabulary=words, own=own)
    return base, bridge


def packed(model: str, format: str, folder: Path) -> tuple[Base, Bridge, Stored]:
    """The same base held in a format, and the file of it."""
    base, bridge = loaded(model)
    if format != "none":
        quantise(bridge.model, format, base.own, torch.float32)
    content, transposed = contents(bridge.model, base.own)
    write(folder / "base.safetensors", content, transposed)
    return base, bridge, Stored(read(folder / "base.safetensors"))


def batch(base: Base, rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Rows of different lengths, padded on the right; for a language model some of the positions, not in order."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(length) < length - 2 * np.arange(rows)[:, None]).astype(np.int64)
    ids = np.where(mask, rng.integers(1, 50, (rows, length)), 0)
    if base.task != "lm":
        return {"input_ids": ids, "attention_mask": mask, "targets": rng.integers(0, 3, rows)}
    there = np.flatnonzero(mask[:, 1:] @ np.eye(length)[1:] @ np.eye(length, k=-1))
    some = np.sort(rng.choice(there, len(there) * 2 // 3, replace=False))
    return {"input_ids": ids, "attention_mask": mask, "targets": ids.ravel()[some + 1], "positions": some}


def of_torch(base: Base, bridge: Bridge, feed: Mapping[str, Any], parts: str = "ab") -> dict[str, np.ndarray]:
    """Losses, hits and gradients of the sum, by torch's own functions on all logits at once."""
    bridge.model.eval()
    where = None
    if base.task == "lm":
        chosen = np.zeros(feed["input_ids"].size, bool)
        chosen[feed["positions"]] = True
        where = torch.from_numpy(chosen.reshape(feed["input_ids"].shape))
    inputs = {n: torch.from_numpy(feed[n]) for n in ("input_ids", "attention_mask")}
    whole = Batch(inputs, torch.from_numpy(feed["targets"]), where)
    live = bridge.trainable(parts)
    losses, hits = scored(predictions(bridge.model, base.head, whole), whole.targets)
    slopes = torch.autograd.grad(losses.sum(), list(live.values()))
    found = {"losses": losses.detach().numpy(), "hits": hits.numpy()}
    return found | {f"grad/{n}": x.numpy() for n, x in zip(live, slopes, strict=True)}


def run(file: Path, feed: Mapping[str, Any], adapter: Adapter) -> dict[str, np.ndarray]:
    """All outputs, in onnxruntime as it comes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    tensors = {n: np.ascontiguousarray(x, np.float32) for n, x in adapter.tensors().items()}
    names = [x.name for x in session.get_outputs()]
    return dict(zip(names, session.run(names, {**feed, **tensors}), strict=True))


def agree(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    np.testing.assert_array_equal(got["hits"], want["hits"])
    assert got["hits"].dtype == bool
    np.testing.assert_allclose(got["losses"], want["losses"], rtol=0, atol=CLOSE * want["losses"].max())
    slopes = {n: x for n, x in want.items() if n.startswith("grad/")}
    for n, x in slopes.items():
        assert got[n].shape == x.shape
        np.testing.assert_allclose(got[n], x, rtol=0, atol=CLOSE * np.abs(x).max(), err_msg=n)


def predictions_of(base: Base, bridge: Bridge, feed: Mapping[str, Any]) -> np.ndarray:
    with torch.no_grad():
        inputs = {n: torch.from_numpy(feed[n]) for n in ("input_ids", "attention_mask")}
        logits = bridge.model.eval()(**inputs).logits
    return logits.reshape(-1, logits.shape[-1])[feed["positions"]].argmax(dim=-1).numpy()
