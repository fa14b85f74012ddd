"""A trained adapter as files that plain transformers and peft load: peft's format, or a merged model."""

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.warning import PeftWarning
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from fedpeft.adapters import LowRank
from fedpeft.errors import ConfigError, DataError
from fedpeft.training.bridge import Bridge
from fedpeft.training.quantised import FrozenEmbedding, FrozenLinear
from fedpeft.training.refusals import MERGES
from fedpeft.training.tails import joined

_CLASSES = {
    "classify": "AutoModelForSequenceClassification",
    "lm": "AutoModelForCausalLM",
    "image": "AutoModelForImageClassification",
}
_ERRORS = (ValueError, NotImplementedError, AttributeError, RuntimeError, TypeError)

NO_TAIL: Mapping[str, LowRank] = MappingProxyType({})
TOLERANCE = 1e-4
"""How far a merged model's logits may be off, as a share of the largest: rounding, with room to spare."""


def export_peft(bridge: Bridge, folder: Path, origin: str | None = None, tail: Mapping[str, LowRank] = NO_TAIL) -> None:
    """Write the adapter, a new head with it, in Hugging Face peft format, with a README that says how to load it.

    tail: low-rank layers that the model runs beside the adapter: each is joined with it in one LoRA of both ranks.
    origin: what the base is loaded from by whoever loads the adapter; without it, what it was loaded
    from here. Beside adapter_model.safetensors and adapter_config.json there is labels.json, the
    classes' names in order, where the task has classes.
    The tensors are read back: DataError where they are not what was written. ``reload_peft`` compares logits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = bridge.model.peft_config["default"]
    origin = origin or config.base_model_name_or_path or "BASE"
    saved = copy.deepcopy(config)
    saved.base_model_name_or_path = origin
    if isinstance(saved, PrefixTuningConfig):
        # peft saves the keys and values that the projection gives, and could not load them into a projection.
        saved.prefix_projection = False
    bridge.model.peft_config["default"] = saved
    try:
        with joined(bridge.model, tail), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*invalid shape", PeftWarning)  # It takes lora_bias for a broken shard.
            # No embedding is ever resized here, so none need be saved; peft would ask the hub to be sure.
            bridge.model.save_pretrained(str(folder), save_embedding_layers=False)
            _need_same_tensors(bridge.model, folder)
    finally:
        bridge.model.peft_config["default"] = config
    labels = labels_of(bridge)
    if labels:
        (folder / "labels.json").write_text(json.dumps(labels, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(bridge, origin, labels), encoding="utf-8")


def _need_same_tensors(model: PeftModel, folder: Path) -> None:
    want = get_peft_model_state_dict(model, save_embedding_layers=False)
    try:
        got = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder}: the adapter can't be read back: {error}; is there room?") from error
    odd = [n for n in sorted(want.keys() | got.keys()) if n not in got or n not in want or not _same(got[n], want[n])]
    if odd:
        raise DataError(
            f"{folder}: {len(odd)} of {len(want)} tensors, such as {odd[0]}, are not what was written; is there room?"
        )


def _same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x, y.detach().cpu())


def export_merged(
    bridge: Bridge,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tail: Mapping[str, LowRank] = NO_TAIL,
) -> float:
    """Write base and adapter as one plain transformers folder, load it again, and return how far its logits are off.

    tokenizer: is written with it; tail: low-rank layers that the model runs beside the adapter, merged with it.
    The bridge's model isn't changed: merging works on a copy in fp32, which is what is written.
    Of a packed base the packed weights are written, expanded: the model that was trained and evaluated.
    Raises ConfigError where the method's update is no change of weights, or where the loaded model's
    logits differ by more than 1e-4 of their largest from the adapter's (both of a small fixed batch).
    """
    probe = probe_of(bridge, 2, 11)
    model, (want,) = merge(bridge, tail, [probe])
    folder.mkdir(parents=True, exist_ok=True)
    with _refused(bridge.method.name):
        model.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    kind = type(model)
    del model
    again: nn.Module = kind.from_pretrained(str(folder), dtype=torch.float32)
    again.to(bridge.model.device).eval()
    said_by = "adapter.method: the merged model's logits are"
    return need_near([said(again, probe)], [want], said_by, "export to peft instead")


def merge(
    bridge: Bridge, tail: Mapping[str, LowRank], probes: Sequence[dict[str, Tensor]]
) -> tuple[PreTrainedModel, list[Tensor]]:
    """Base, adapter and tail as one plain model in fp32, and what they said of each probe before they were one.

    The bridge's model isn't changed. Packed matrices of the base are expanded in the copy, where the adapter was
    trained on them. Raises ConfigError where the method's update is no change of weights, or peft can't merge it.
    """
    name = bridge.method.name
    if name in MERGES:
        raise ConfigError(f"adapter.method: {name} can't be merged: {MERGES[name]}; export to peft instead")
    with joined(bridge.model, tail):
        twin = copy.deepcopy(bridge.model)
    _expand(twin)
    twin.float().eval()
    want = [said(twin, probe) for probe in probes]
    is_tied = _untie(twin)
    with _refused(name):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*tie_word_embeddings", UserWarning)  # That is settled here.
            merged: PreTrainedModel = twin.merge_and_unload()
        _unwrap(merged)
        if is_tied:
            _tie(merged)
    return merged, want


@torch.no_grad()
def said(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A model's logits of a batch, in fp32 and in main memory."""
    logits: Tensor = model(**batch, **resized(model, batch)).logits
    return logits.float().cpu()


def resized(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, bool]:
    """What else an image model must be told where images are not of its own size."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if "pixel_values" not in batch or batch["pixel_values"].shape[-1] == _own_side(base.config):
        return {}
    takes = "interpolate_pos_encoding" in signature(type(base).forward).parameters
    return {"interpolate_pos_encoding": True} if takes else {}


def need_near(got: Sequence[Tensor], want: Sequence[Tensor], whose: str, instead: str) -> float:
    """``share_off``, which must be within ``TOLERANCE``: else ConfigError. whose: logits, up to the verb."""
    off = share_off(got, want)
    if not off <= TOLERANCE:
        raise ConfigError(f"{whose} off by {off:.1e} of their largest; want at most {TOLERANCE:.0e}: {instead}")
    return off


def share_off(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest difference between two models' logits, as a share of the second's largest; inf for NaN."""
    off = max(float((x - y).abs().max()) for x, y in zip(got, want, strict=True))
    if not all(bool(x.isfinite().all()) for x in (*got, *want)):
        return float("inf")
    return off / max(1e-6, *(float(y.abs().max()) for y in want))


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """A context in which what peft or transformers can't do is a ConfigError that names the method."""
    try:
        yield
    except _ERRORS as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"adapter.method: {name} can't be merged here: {why}; export to peft instead") from error


def _expand(model: nn.Module) -> None:
    """Put plain layers in place of those whose weights are packed."""
    for parent in list(model.modules()):
        for name, packed in list(parent._modules.items()):
            plain: Any
            if isinstance(packed, FrozenLinear):
                rows, columns = packed.out_features, packed.in_features
                make: Any = Conv1D if packed.transposed else nn.Linear
                with torch.device("meta"):
                    plain = make(rows, columns) if packed.transposed else make(columns, rows)
                plain.bias = packed.bias
            elif isinstance(packed, FrozenEmbedding):
                plain = nn.Embedding(packed.num_embeddings, packed.embedding_dim, packed.padding_idx, device="meta")
            else:
                continue
            plain.weight = nn.Parameter(packed.weight.contiguous(), requires_grad=False)
            parent._modules[name] = plain


def labels_of(bridge: Bridge) -> list[str]:
    """The classes' names, in order; none for a language model."""
    return [] if bridge.task == "lm" else [str(x) for _, x in sorted(bridge.model.config.id2label.items())]


def _readme(bridge: Bridge, origin: str, labels: list[str]) -> str:
    kind = _CLASSES[bridge.task]
    more = ", num_labels=len(labels), id2label=dict(enumerate(labels))" if labels else ""
    read = 'labels = json.load(open("labels.json"))\n' if labels else ""
    front = {"base_model": origin, "library_name": "peft", "tags": ["fedpeft", bridge.method.name]}
    return (
        "---\n"
        + "".join(f"{k}: {json.dumps(v)}\n" for k, v in front.items())
        + f"---\n\n# A {bridge.method.method} adapter of {origin}\n\nTrained with fedpeft. To load it:\n\n```python\n"
        + ("import json\n" if labels else "")
        + f"from peft import PeftModel\nfrom transformers import {kind}\n\n{read}"
        + f"base = {kind}.from_pretrained({json.dumps(origin)}{more})\n"
        + 'model = PeftModel.from_pretrained(base, ".").eval()\n```\n'
    )


def probes(bridge: Bridge, side: int | None = None) -> list[dict[str, Tensor]]:
    """Batches of other shapes than (2, 11): one row, one token, several padded rows; side: of images, in pixels."""
    return [probe_of(bridge, rows, length, side) for rows, length in ((1, 7), (5, 23), (3, 1))]


def probe_of(bridge: Bridge, rows: int, length: int, side: int | None = None) -> dict[str, Tensor]:
    """A small batch, the same each time, to compare two models on. Texts of 5 rows and more are padded, one by half.

    length: of texts, cut to what the model can take; side: of images, in pixels; the model's own if not given.
    """
    model, draw = bridge.model, torch.Generator().manual_seed(rows)
    config: Any = model.config
    if bridge.task == "image":
        side = side or _own_side(config)
        pixels = torch.randn(rows, config.num_channels, side, side, generator=draw)
        return {"pixel_values": pixels.to(model.device)}
    length = min(length, longest(config) or length)
    tokens = torch.randint(3, config.vocab_size, (rows, length), generator=draw)
    mask = torch.ones_like(tokens)
    if rows > 4:
        mask[0, length - length // 2 :] = 0
        mask[3, length - 1 :] = 0
        tokens = torch.where(mask == 1, tokens, config.pad_token_id or 0)
    return {"input_ids": tokens.to(model.device), "attention_mask": mask.to(model.device)}


def _own_side(config: Any) -> int:
    return int(config.image_size if isinstance(config.image_size, int) else config.image_size[0])


def longest(config: Any) -> int | None:
    """How many tokens a model has positions for; None where its configuration doesn't say."""
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if found else None


def _untie(model: PeftModel) -> bool:
    """Give an output layer that is tied to the embedding its own weights; whether it was tied.

    Merging into one of the two would change the other.
    """
    out = model.get_output_embeddings()
    inner = out.get_base_layer() if isinstance(out, BaseTunerLayer) else out
    if not isinstance(inner, nn.Linear) or not getattr(model.config, "tie_word_embeddings", False):
        return False
    inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
    return True


def _unwrap(model: PreTrainedModel) -> None:
    """Put the modules that were trained whole in place of what peft wraps them in; LN tuning's merge leaves them."""
    wrapped = [(n, x) for n, x in model.named_modules() if isinstance(x, ModulesToSaveWrapper)]
    for name, module in wrapped:
        model.set_submodule(name, module.modules_to_save["default"])


def _tie(model: PreTrainedModel) -> None:
    """Tie the output layer to the embedding again if they are still equal, else say in the config that they aren't."""
    out: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers' own
    into = model.get_input_embeddings()
    is_equal = isinstance(out, nn.Linear) and isinstance(into, nn.Embedding) and torch.equal(out.weight, into.weight)
    model.config.tie_word_embeddings = is_equal
    if is_equal:
        model.tie_weights()
