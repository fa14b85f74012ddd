"""A trained adapter as files that plain transformers and peft load: peft's format, or a merged model."""

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from peft import PeftModel, PrefixTuningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.warning import PeftWarning
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedpeft.adapters import LowRank
from fedpeft.errors import ConfigError
from fedpeft.training.bridge import Bridge
from fedpeft.training.methods import TaskName
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
    finally:
        bridge.model.peft_config["default"] = config
    labels = _labels(bridge)
    if labels:
        (folder / "labels.json").write_text(json.dumps(labels, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(bridge, origin, labels), encoding="utf-8")


def export_merged(
    bridge: Bridge,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tail: Mapping[str, LowRank] = NO_TAIL,
) -> float:
    """Write base and adapter as one plain transformers folder, load it again, and return how far its logits are off.

    tail: low-rank layers that the model runs beside the adapter, which are merged with it.
    The bridge's model isn't changed: merging works on a copy in fp32, which is what is written.
    Raises ConfigError where the method's update is no change of weights, or where the loaded model's
    logits differ by more than 1e-4 of their largest from the adapter's (both of a small fixed batch).
    """
    name = bridge.method.name
    if name in MERGES:
        raise ConfigError(f"adapter.method: {name} can't be merged: {MERGES[name]}; export to peft instead")
    probe = _probe(bridge.task, bridge.model)
    with joined(bridge.model, tail):
        twin = copy.deepcopy(bridge.model).float().eval()
    want = _logits(twin, probe)
    is_tied = _untie(twin)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*tie_word_embeddings", UserWarning)  # That is settled here.
            merged: PreTrainedModel = twin.merge_and_unload()
        _unwrap(merged)
        if is_tied:
            _tie(merged)
        merged.save_pretrained(str(folder))
    except _ERRORS as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"adapter.method: {name} can't be merged here: {why}; export to peft instead") from error
    kind = type(merged)
    del merged, twin
    again: nn.Module = kind.from_pretrained(str(folder), dtype=torch.float32)
    again.to(bridge.model.device).eval()
    off = float((_logits(again, probe) - want).abs().max() / want.abs().max().clamp(min=1e-6))
    if not off <= TOLERANCE:
        raise ConfigError(
            f"adapter.method: the merged model's logits are off by {off:.1e} of their largest; "
            f"want at most {TOLERANCE:.0e}: export to peft instead"
        )
    return off


def _labels(bridge: Bridge) -> list[str]:
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


def _probe(task: TaskName, model: PeftModel) -> dict[str, Tensor]:
    """A small batch, the same each time, to compare two models on."""
    draw = torch.Generator().manual_seed(0)
    config = model.config
    if task == "image":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        pixels = torch.randn(2, config.num_channels, size, size, generator=draw)
        return {"pixel_values": pixels.to(model.device)}
    tokens = torch.randint(3, config.vocab_size, (2, 11), generator=draw).to(model.device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@torch.no_grad()
def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**batch).logits
    return logits.float().cpu()


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
