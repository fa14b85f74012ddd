"""How much memory training takes, foretold from sizes alone."""

from collections.abc import Mapping
from typing import Protocol

from fedpeft.adapters import Spec
from fedpeft.training.formats import EXPANDED, Format, bits
from fedpeft.training.settings import Quantise, Training

RUNTIME = 390 << 20
"""Bytes that Python, torch, transformers and peft take on a CPU before there is a model."""

LOGITS = 1 << 23
"""Of a language model's logits, how many are in memory at a time: 32 MiB in fp32."""

_TRANSIENT_HEADS = 2  # logits, and a copy of them in fp32 where they are in bf16
_FLOAT = 4


class Config(Protocol):
    """A transformers configuration."""

    def to_dict(self) -> Mapping[str, object]: ...


def estimate(config: Config, base_parameters: int, spec: Spec, training: Training, quantise: Quantise = "none") -> int:
    """Bytes of a training process at its peak, on a CPU: runtime + base + adapter + activations.

    With n trained numbers, t = batch · length tokens in a pass, L layers of width h and inner width i:
    base: 4 bytes a parameter, or 2 in bf16; quantised (``Model.quantise``) 8 or 4 bits and its share of the scales,
    with a vocabulary in 8, and 4 bytes for each number that is expanded at a time. Adapter: 4n · (value, start,
    gradient, and 2 moments of adamw or the momentum of sgd). Activations in fp32: 4t · (L + 1) · (6h + 2.5i), which
    was fitted to MiniLM and SmolLM2 and holds the inputs that adapters, norms, activation functions and attention keep
    for the backward pass, and one layer's gradients; with checkpointing two layers' in all, and 4t · L · h. A language
    model adds twice 4t · vocabulary for the logits of replies, taken as the whole text, but of ``LOGITS`` numbers at
    most, since they are made some at a time (where its head can be run by itself: ``Base.vocabulary``). Images have
    (side / patch)² + 1 tokens; a trainer's own settings (``TorchTrainer.training``) say their side.
    Rough: within 30 % for rank 8 on attention layers; eager attention's square of the length is not in it.
    It reads whether the model is a language model off ``config.problem_type``, which ``load_base`` sets on others.
    """
    sizes = _sizes(config.to_dict())
    trained = spec.factors("ab").size + spec.leaves.size
    moments = 2 if training.optimiser == "adamw" else int(training.momentum > 0)
    adapter = _FLOAT * trained * (3 + moments)
    base = base_parameters * (2 if training.precision == "bf16" else _FLOAT)
    if quantise != "none":
        base = _packed(sizes, base_parameters, quantise)
    return RUNTIME + base + adapter + _activations(sizes, training)


def _packed(sizes: Mapping[str, int], parameters: int, format: Format) -> int:
    width = sizes["width"]
    table = min(parameters, sizes["vocabulary"] * width)
    expanded = _FLOAT * min(EXPANDED, max(table, width * sizes["inner"]))
    return round((table * bits("int8", width) + (parameters - table) * bits(format, width)) / 8) + expanded


def _activations(sizes: Mapping[str, int], training: Training) -> int:
    width, layers = sizes["width"], sizes["layers"]
    length = training.length
    if sizes["patch"]:
        length = ((training.image_size or sizes["side"]) // sizes["patch"]) ** 2 + 1
    layer = 6 * width + 5 * sizes["inner"] // 2
    kept = layer + (layer + layers * width if training.checkpointing else layers * layer)
    tokens = training.batch * length
    return _FLOAT * (tokens * kept + _TRANSIENT_HEADS * min(tokens * sizes["words"], LOGITS))


def _sizes(config: Mapping[str, object]) -> dict[str, int]:
    """width, layers, inner, vocabulary, words that are predicted (0 for a classifier), and side and patch (0 for
    texts), by any family's names."""

    def number(*names: str) -> int:
        for name in names:
            found = config.get(name)
            if isinstance(found, int | float) and found:
                return int(found)
        return 0

    width = number("hidden_size", "n_embd", "d_model", "dim")
    inner = number("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim") or width * (
        number("mlp_ratio") or 4
    )
    return {
        "width": width,
        "layers": number("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        "inner": inner,
        "words": 0 if config.get("problem_type") or not config.get("vocab_size") else number("vocab_size"),
        "vocabulary": number("vocab_size"),
        "side": number("image_size"),
        "patch": number("patch_size"),
    }
