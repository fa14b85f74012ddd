"""A trained LoRA in GGUF, which llama.cpp runs beside a base model of its own."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeft.adapters import LowRank
from fedpeft.errors import ConfigError, DataError
from fedpeft.training.bridge import Bridge
from fedpeft.training.export import NO_TAIL, TOLERANCE, probes, said, share_off
from fedpeft.training.quantised import FrozenLinear
from fedpeft.training.tails import beside
from fedpeft.training.whole import whole

FILE = "adapter.gguf"
ROUNDING = 1e-6
"""How far a layer's ΔW may be off in the file, as a share of its norm: the scale is folded into fp32 factors."""

_MODEL = "base_model.model."  # before a layer's own name, in peft's
_WAY_OUT = "export to merged, which llama.cpp's convert_hf_to_gguf.py takes"


@dataclass(frozen=True, slots=True)
class Family:
    """How llama.cpp names an architecture, and which of its layers hold heads of rotated pairs.

    heads: of each such layer, by the last part of its name, the configuration's key for how many heads it has.
    """

    name: str
    heads: Mapping[str, str]


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}),
    "gpt2": Family("gpt2", {}),
}
"""Of transformers' model types."""


def export_gguf(bridge: Bridge, folder: Path, tail: Mapping[str, LowRank] = NO_TAIL) -> float:
    """Write the adapter, and the tail with it, as llama.cpp's GGUF LoRA; return how far the file's logits are off.

    The file is read back, and its layers are put beside the bare base: the logits of a few rows must be the run's to
    1e-4 of their largest, and each layer's ΔW the run's to 1e-6 of its norm. ConfigError if they are not, and for
    a task, a model, a method or a layer that the format has no place for; then nothing is left in the folder.
    llama.cpp computes alpha / rank · b a with one alpha for all layers and each layer's own rank; where that is
    not a layer's scale (rsLoRA, patterns, a tail) the difference is taken into b.
    """
    layers = _expressible(bridge, tail)
    config: Any = bridge.model.peft_config["default"]
    with whole(folder) as scratch:
        write(scratch / FILE, bridge.model, layers, float(config.lora_alpha))
        again = read(scratch / FILE, bridge.model)
        _compare(again, layers)
        off = _logits_off(bridge, tail, again)
        if not off <= TOLERANCE:
            raise ConfigError(
                f"the GGUF adapter's logits are off by {off:.1e} of their largest; want at most {TOLERANCE:.0e}: "
                f"export to peft instead"
            )
        (scratch / "README.md").write_text(_readme(config.base_model_name_or_path or "BASE"), encoding="utf-8")
    return off


def write(path: Path, model: PeftModel, layers: Mapping[str, LowRank], alpha: float) -> None:
    """Write low-rank layers, by peft's names of the model's layers, as a GGUF LoRA with this alpha.

    Source: llama.cpp, convert_lora_to_gguf.py and llama-adapter.cpp. Shapes are those that the loader asks for:
    lora_a (r, in), lora_b (out, r), for GPT-2 too, whose own matrices are (in, out).
    """
    import gguf

    family, names = _family(model), _names(model)
    scale = float(np.float32(alpha))
    writer = gguf.GGUFWriter(str(path), family.name)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, str(model.peft_config["default"].base_model_name_or_path or ""))
        for layer, x in layers.items():
            x = x.at(scale / x.rank)
            rows = _order(family, model.config, layer, len(x.b))
            writer.add_tensor(f"{names[layer]}.lora_a", np.ascontiguousarray(x.a, np.float32))
            writer.add_tensor(f"{names[layer]}.lora_b", np.ascontiguousarray(x.b[rows], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read(path: Path, model: PeftModel) -> dict[str, LowRank]:
    """The layers of a GGUF LoRA for this model, by peft's names: the inverse of ``write``.

    What llama.cpp's loader refuses is refused: DataError for another architecture or type of file, a tensor that the
    base has not or that has another shape, and a factor without the other.
    """
    import gguf

    try:
        file = gguf.GGUFReader(path)
        kind, adapter, name, alpha = (
            None if field is None else field.contents()
            for field in map(
                file.get_field, ("general.type", "adapter.type", "general.architecture", "adapter.lora.alpha")
            )
        )
        tensors = {x.name: np.array(x.data) for x in file.tensors}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise DataError(f"{path}: not a GGUF file, or damaged: {' '.join(str(error).split())[:200]}") from error
    family = _family(model)
    if (kind, adapter, name) != ("adapter", "lora", family.name):
        raise DataError(f"{path}: got {kind} of type {adapter} for {name}; want adapter of type lora for {family.name}")
    layers: dict[str, LowRank] = {}
    for layer, own in _names(model).items():
        a, b = tensors.pop(f"{own}.lora_a", None), tensors.pop(f"{own}.lora_b", None)
        if a is None and b is None:
            continue
        if a is None or b is None:
            raise DataError(f"{path}: {own} has one factor; want both")
        d, k = _shape(model.get_submodule(layer))
        if a.shape[1:] != (k,) or b.shape != (d, len(a)):
            raise DataError(f"{path}: {own} has factors {a.shape} and {b.shape}; want (r, {k}) and ({d}, r)")
        rows = np.argsort(_order(family, model.config, layer, d))
        layers[layer] = LowRank(a, b[rows], float(alpha) / len(a) if alpha else 1.0)
    if tensors:
        raise DataError(f"{path}: the base has no {next(iter(tensors))}; want an adapter for this model")
    return layers


def _order(family: Family, config: Any, layer: str, rows: int) -> NDArray[np.intp]:
    """Where llama.cpp's rows of a layer's matrix are in transformers'.

    A head's rotation turns pairs of its rows: transformers' are half a head apart, llama.cpp's are neighbours.
    """
    plain = np.arange(rows)
    key = family.heads.get(layer.rpartition(".")[2])
    if key is None:
        return plain
    heads = int(getattr(config, key))
    return plain.reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).ravel()


def _family(model: PeftModel) -> Family:
    kind = str(model.config.model_type)
    if kind not in FAMILIES:
        raise ConfigError(
            f"model.name: {kind} models have no GGUF adapter here; want one of {', '.join(FAMILIES)}: {_WAY_OUT}"
        )
    return FAMILIES[kind]


def _names(model: PeftModel) -> dict[str, str]:
    """llama.cpp's name of each linear layer's weight, by peft's name of the layer."""
    import gguf

    family, config = _family(model), model.config
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == family.name)
    table = gguf.get_tensor_name_map(arch, int(config.num_hidden_layers))
    found: dict[str, str] = {}
    for layer, module in model.named_modules():
        name = table.get_name(layer.removeprefix(_MODEL))
        if name is not None and (isinstance(module, LoraLayer) or _is_linear(module)):
            found[layer] = f"{name}.weight"
    if config.tie_word_embeddings:  # llama.cpp holds the embedding alone
        found = {k: v for k, v in found.items() if v != "output.weight"}
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D | FrozenLinear)


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if isinstance(base, Conv1D):
        return int(base.nf), int(base.nx)
    return int(base.out_features), int(base.in_features)


def _expressible(bridge: Bridge, tail: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The adapter's layers, each joined with its tail. ConfigError for what a GGUF LoRA has no place for."""
    model, method = bridge.model, bridge.method
    if bridge.task != "lm":
        raise ConfigError(f"data.task: got {bridge.task!r}; llama.cpp runs language models: export to onnx or merged")
    _family(model)
    if method.name != "lora":
        raise ConfigError(f"adapter.method: {method.method} is no LoRA, and GGUF holds nothing else: {_WAY_OUT}")
    for why in _surplus(bridge):
        raise ConfigError(f"adapter: {why}, for which GGUF's LoRA has no place: {_WAY_OUT}")
    names, layers = _names(model), bridge.read().layers
    for layer in (*layers, *tail):
        if layer not in names:
            tied = " that is tied to the embedding" if layer.endswith("lm_head") else ""
            raise ConfigError(
                f"adapter.targets: {layer.removeprefix(_MODEL)} is a layer{tied} that llama.cpp's "
                f"{_family(model).name} has not as a matrix of its own: {_WAY_OUT}"
            )
    return {n: x.join(tail[n]) if n in tail else x for n, x in layers.items()}


def _surplus(bridge: Bridge) -> Iterator[str]:
    """What the model has beside scale · b a of linear layers."""
    config: Any = bridge.model.peft_config["default"]
    if config.layer_replication:
        yield "options.layer_replication makes layers that the base has not"
    for name, module in bridge.model.named_modules():
        if isinstance(module, LoraLayer):
            variant = module.lora_variant.get("default")
            if variant is not None:
                yield f"{_named(variant)} changes how {name.removeprefix(_MODEL)} is computed"
            if not _is_linear(module.get_base_layer()):
                yield f"{name.removeprefix(_MODEL)} is no linear layer"
    for name in bridge.read().dense:
        yield f"{name.removeprefix(_MODEL)} is trained too"


def _named(variant: object) -> str:
    """A LoRA variant's name, such as "Dora", from peft's class of it."""
    return type(variant).__name__.partition("Linear")[0]


def _compare(got: Mapping[str, LowRank], want: Mapping[str, LowRank]) -> None:
    """ConfigError unless each layer's ΔW is the same but for rounding."""
    for name, x in want.items():
        off = x.join(replace(got[name], scale=-got[name].scale)).norm if name in got else float("inf")
        if not off <= ROUNDING * x.norm:
            raise ConfigError(
                f"{name.removeprefix(_MODEL)}: its change of weights in the GGUF file is off by {off:.1e}, of a norm "
                f"of {x.norm:.1e}; want at most {ROUNDING:.0e} of it: export to peft instead"
            )


def _logits_off(bridge: Bridge, tail: Mapping[str, LowRank], layers: Mapping[str, LowRank]) -> float:
    """How far the base with these layers beside it is from the run's model, on a few rows, as a share."""
    twin = copy.deepcopy(bridge.model).float().eval()
    rows, device = probes(bridge), bridge.model.device
    with beside(twin, tail, device):
        want = [said(twin, x) for x in rows]
    with warnings.catch_warnings(), twin.disable_adapter(), beside(twin, layers, device):
        got = [said(twin, x) for x in rows]
    return share_off(got, want)


def _readme(origin: str) -> str:
    return (
        f"# A LoRA adapter of {origin} for llama.cpp\n\nTrained with fedpeft. `{FILE}` holds the adapter alone. "
        f"With the base as GGUF, in any quantisation:\n\n"
        f"    python convert_hf_to_gguf.py {origin} --outfile base.gguf\n"
        f"    llama-cli -m base.gguf --lora {FILE}\n\n"
        f"To merge the two: `llama-export-lora -m base.gguf --lora {FILE} -o merged.gguf`.\n"
    )
