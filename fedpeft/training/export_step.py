"""A kit for devices without torch: a trainer's frozen base, its training step as graphs, and what goes with them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fedpeft.adapters import Adapter, drawn
from fedpeft.data import Padded
from fedpeft.errors import ConfigError
from fedpeft.training.bases import Base
from fedpeft.training.batches import Batch
from fedpeft.training.bridge import Bridge
from fedpeft.training.kept_bases import contents
from fedpeft.training.kit import BASE, CONFIG, EVALUATE, OPSET, START, STEP, Facts, write_manifest
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.objectives import outcome
from fedpeft.training.packed_file import PackedFile, read, write
from fedpeft.training.whole import link, whole

TOLERANCE = 1e-4
"""How far losses and gradients may be from torch's, as a share of the largest: rounding, in another order."""

_NEEDED = ("onnx", "onnxruntime")
_CHANGE = 0.01  # of each number of the adapter's start, so that both factors of a product have gradients
_SIZES = ((3, 11, 0), (2, 7, 1))  # rows, length and additional rank of the batches that graphs are checked on

Arrays = Mapping[str, NDArray[Any]]


def export_step(
    trainer: TorchTrainer,
    folder: Path,
    recompute: bool | None = None,
    trains: Literal["ab", "b"] = "ab",
    progress: Callable[[str], None] | None = None,
) -> str:
    """Write a kit into a folder, and give its digest: all of it once it is complete and checked, or nothing.

    recompute: whether the graph computes activations again for the backward half (unset: as the trainer's settings have
    checkpointing); trains: "b" leaves out the gradients of a; progress: told what is going on. Both graphs are run in
    onnxruntime on batches of two shapes and ranks: losses and gradients must be torch's, to 1e-4 of the largest.
    Takes seconds to a minute. ConfigError if they are not, for images, a base in bf16, a tokenizer that runs in Python
    or a model that can't be traced, and where onnx or onnxruntime is missing.
    """
    say = progress or _silent
    _refuse(trainer)
    base, bridge = trainer.frozen, trainer.bridge
    recompute = trainer.training.checkpointing if recompute is None else recompute
    with whole(folder) as scratch:
        say("the frozen base")
        file = _base(base, bridge, scratch / BASE)
        say("the training step as a graph")
        from fedpeft.training.step_compile import compile_step

        compile_step(base, bridge, trains=trains, recompute=recompute, weights=file, folder=scratch)
        say("the graph beside torch")
        checked = _check(trainer, scratch, trains)
        start = trainer.start()
        tensors = start.tensors() | {f"fixed/{n}": x for n, x in drawn(start).items()}
        save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, scratch / START)
        _words(base, scratch)
        facts = _facts(trainer, file, recompute, trains, checked)
        digest = write_manifest(scratch, facts)
    return digest


def _refuse(trainer: TorchTrainer) -> None:
    missing = [x for x in _NEEDED if find_spec(x) is None]
    if missing:
        raise ConfigError(f"export-step needs {', '.join(missing)}; want `pip install 'fedpeft[onnx]'`")
    if trainer.frozen.task == "image":
        raise ConfigError("data.task: got image; kits are for classification and language models of text: use torch")
    if trainer.place.dtype != torch.float32:
        raise ConfigError('training.precision: got bf16; kits are of fp32 arithmetic: want "fp32"')
    if not trainer.frozen.words.is_fast:
        kind = type(trainer.frozen.words).__name__
        raise ConfigError(f"model.name: its {kind} runs in Python; kits want a tokenizer.json: choose another model")
    if trainer.frozen.words.split_special_tokens:
        raise ConfigError(
            "model.name: its tokenizer has split_special_tokens, which a tokenizer.json does not; want it left out of "
            "tokenizer_config.json, or torch"
        )


def _base(base: Base, bridge: Bridge, file: Path) -> PackedFile:
    """The base's file: the very one that is in the cache folder or in the kit where it comes from, or a new one."""
    kept = base.source.file.path if base.source is not None else None
    if kept is None and base.shelf is not None:
        found = base.shelf.find()
        kept = None if found is None else found.file.path
    if kept is None:
        content, transposed = contents(bridge.model, base.own)
        write(file, content, transposed, {"plain": base.plain, "quantise": base.quantise})
    else:
        link(kept, file)
    return read(file, check=False)


def _check(trainer: TorchTrainer, folder: Path, trains: str) -> dict[str, float]:
    """How far the graphs are from torch: "loss" as a share of the largest, "gradient" as 1 − cosine.

    ConfigError beyond ``TOLERANCE``.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_mem_reuse = False  # whose plan takes most of a minute for 30 layers
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    step, evaluate = (
        onnxruntime.InferenceSession(str(folder / n), options, providers=["CPUExecutionProvider"])
        for n in (STEP, EVALUATE)
    )
    rng = np.random.default_rng(0)
    adapter = trainer.start()
    adapter = adapter.moved({n: _CHANGE * rng.standard_normal(x.shape) for n, x in adapter.tensors().items()})
    rank = max((x.rank for x in adapter.layers.values()), default=1)
    far: dict[str, float] = {"loss": 0.0, "gradient": 0.0}
    for rows, length, more in _SIZES:
        batch = probe(trainer.frozen, rows, length, rng)
        losses, slopes = _torch(trainer, adapter, batch, trains)
        wide = replace(adapter, layers={n: x.pad(rank + more) for n, x in adapter.layers.items()})
        fed = _feeds(batch) | {n: np.ascontiguousarray(x, np.float32) for n, x in wide.tensors().items()}
        names = ["losses", *(f"grad/{n}" for n in slopes)]
        of_step, *found = step.run(names, fed)
        (of_evaluation,) = evaluate.run(["losses"], fed)
        got = {n: _cut(x, slopes[n]) for n, x in zip(slopes, found, strict=True)}
        off = max(_share(x, losses) for x in (of_step, of_evaluation))
        top = max(float(np.abs(x).max()) for x in slopes.values())
        worst = max(slopes, key=lambda n: float(np.abs(got[n] - slopes[n]).max()))
        slope_off = float(np.abs(got[worst] - slopes[worst]).max()) / top
        if not (off <= TOLERANCE and slope_off <= TOLERANCE):
            raise ConfigError(
                f"the step's graph is off by {off:.1e} in its losses and {slope_off:.1e} in the gradient of {worst}, "
                f"as shares of the largest; want at most {TOLERANCE:.0e}: use clients with torch"
            )
        far["loss"] = max(far["loss"], off)
        far["gradient"] = max(far["gradient"], 1 - _cosine(got, slopes))
    return far


def probe(base: Base, rows: int, length: int, rng: np.random.Generator) -> Padded:
    """A batch of random tokens for a base: rows of different lengths, and replies that begin at the third token."""
    ids = rng.integers(0, base.model.config.vocab_size - 1, (rows, length))
    ids += ids >= base.pad  # so that none is the token that fills up
    mask = np.arange(length) < length - 2 * np.arange(rows)[:, None]
    ids = np.where(mask, ids, base.pad)
    if base.task != "lm":
        return Padded(ids, mask.astype(np.int64), rng.integers(0, len(base.classes), rows), None)
    where = np.zeros_like(mask)
    where[:, 2:-1] = mask[:, 3:]
    return Padded(ids, mask.astype(np.int64), np.roll(ids, -1, axis=1)[where], where)


def _feeds(batch: Padded) -> dict[str, NDArray[Any]]:
    found = {"input_ids": batch.ids, "attention_mask": batch.mask, "targets": batch.targets}
    return found if batch.where is None else found | {"positions": np.flatnonzero(batch.where)}


def _torch(
    trainer: TorchTrainer, adapter: Adapter, batch: Padded, trains: str
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """What torch says: losses, and the gradients of their sum by each trained tensor."""
    base, bridge, device = trainer.frozen, trainer.bridge, trainer.place.device
    where = None if batch.where is None else torch.from_numpy(batch.where).to(device)
    inputs = {"input_ids": torch.from_numpy(batch.ids).to(device)}
    inputs["attention_mask"] = torch.from_numpy(batch.mask).to(device)
    bridge.write(adapter)
    parameters = bridge.trainable(trains)
    try:
        bridge.model.eval()
        given = Batch({**inputs}, torch.from_numpy(batch.targets).to(device), where)
        each, _ = outcome(bridge.model, base.head, given, base.vocabulary)
        found = torch.autograd.grad(each.sum(), list(parameters.values()), allow_unused=True)
    finally:
        bridge.write(trainer.start())
    slopes = {n: _numbers(x) for n, x in zip(parameters, found, strict=True) if x is not None}
    return _numbers(each), {n: x.reshape(len(x), -1) if n[-2:] in ("/a", "/b") else x for n, x in slopes.items()}


def _numbers(x: torch.Tensor) -> NDArray[np.float32]:
    return np.array(x.detach().cpu().float().numpy())


def _cut(x: NDArray[Any], like: NDArray[Any]) -> NDArray[Any]:
    """A gradient without those of additional directions."""
    return x[tuple(slice(n) for n in like.shape)] if x.ndim == like.ndim else x.reshape(like.shape)


def _share(got: NDArray[Any], want: NDArray[Any]) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def _cosine(got: Arrays, want: Arrays) -> float:
    x, y = (np.concatenate([np.ravel(z[n]).astype(np.float64) for n in want]) for z in (got, want))
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def _words(base: Base, folder: Path) -> None:
    """The tokenizer's files and the configuration."""
    rules: Any = base.words
    rules.backend_tokenizer.no_truncation()  # what the last call left there
    rules.backend_tokenizer.no_padding()
    base.words.save_pretrained(str(folder))
    said = base.model.config.to_dict() | {"_name_or_path": ""}
    said.pop("_name_or_path")
    text = json.dumps(said, indent=1, sort_keys=True, default=str) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf8")


def _facts(
    trainer: TorchTrainer, file: PackedFile, recompute: bool, trains: Literal["ab", "b"], checked: Mapping[str, float]
) -> Facts:
    base, spec, words = trainer.frozen, trainer.start().spec, trainer.frozen.words
    assert base.task != "image"
    most = getattr(base.model.config, "max_position_embeddings", None)
    marks = {n: str(x) for n, x in words.special_tokens_map.items() if isinstance(x, str)}
    return Facts(
        opset=OPSET,
        task=base.task,
        classes=base.classes,
        model=base.name,
        plain=base.plain,
        quantise=base.quantise,
        method=trainer.bridge.method.name,
        spec=spec,
        trains=trains,
        recompute=recompute,
        pad=base.pad,
        bos=str(words.bos_token or ""),
        eos=str(words.eos_token or ""),
        longest=most if isinstance(most, int) and most > 0 else trainer.training.length,
        words=int(base.model.config.vocab_size),
        vocabulary=base.vocabulary,
        packed=tuple((x.name, x.format, x.columns, x.transposed) for x in file.held),
        fresh=base.fresh,
        cuts="left" if words.truncation_side == "left" else "right",
        marks=marks,
        checked=dict(checked),
        seed=base.seed,
    )


def _silent(_: str) -> None:
    return None
