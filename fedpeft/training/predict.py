"""What a client's training takes of memory, from sizes alone: a formula with a term for each part.

    peak = runtime + base + adapter + activations + kept + max(loss, workspace)

runtime: the interpreter, what it imports, and the code pages that a step touches: measured. base: every number of it,
mapped from a file or not, since a step reads all. adapter: 4 bytes · trained numbers · (value, start, gradient, and the
optimiser's moments). activations: what the backward pass needs of each layer above the lowest that is trained, counted
from the layer's own graph (``FAMILIES``). kept: what the frozen layers below it make of texts (``training.lower``).
loss: logits of some positions at a time, and their hidden states. workspace: what the backward pass of one layer makes
besides, and one expanded weight. The last two are not there at one time.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Literal, Self, TypeAlias

from fedpeft.training.formats import EXPANDED, bits
from fedpeft.training.settings import Quantise, Training

Engine: TypeAlias = Literal["torch", "onnx"]

LOGITS = 1 << 23
"""Of a language model's logits, how many are in memory at a time: 32 MiB in fp32."""

FEW = 1 << 20
"""Logits that the torch client makes all at once, as the model makes them, in three copies: 4 MiB each in fp32."""

ADDED = 1 << 12
"""Words of the largest vocabulary of which it does so: torch's cross entropy adds exponentials of a row one after
another, and where one word is sure it loses up to an eighth of the others. A loss is then off by 1e-5, with 49152
words by 1e-4; SmolLM2's gradients by 3e-5 of the largest, and by 5e-6 with the head by itself."""

RUNTIME: Mapping[Engine, int] = {"torch": 455_000_000, "onnx": 88_000_000}
"""Bytes of a process that trains a model of no size, measured by ``benchmarks/plan.py``.

torch: torch, transformers and peft. onnx: onnxruntime, numpy and tokenizers. A third of it is code that is mapped from
files, and how much of that the system maps around what is touched differs by 40 MB from day to day.
"""

GRAPH = 1_000_000
"""Bytes that onnxruntime takes for a layer of an opened graph, without weights."""

_FLOAT = 4
_ATTENTION = 4  # widths that attention's backward pass makes, beside one gradient of the inner width


@dataclass(frozen=True, slots=True)
class Family:
    """Numbers that a layer keeps for its backward pass, for each token: so many times the width, the width of keys and
    values, and the feed-forward layer's inner width. They are the same for every adapter.

    fed: by the last part of a module's name, what it reads: "attended" is among these numbers already, and each other
    is kept once for all modules that are adapted and read it; back: inner widths that the backward pass makes besides.
    """

    widths: int
    keys: int
    inners: int
    back: int
    fed: Mapping[str, tuple[str, ...]]


_FED_BY_NAME = {"query": ("input",), "key": ("input",), "value": ("input",)}

FAMILIES: Mapping[str, Family] = {
    # the sums before both norms, queries, keys, values, what attention gives; the activation function's input
    "bert": Family(4, 2, 1, 2, _FED_BY_NAME | {"dense": ("attended", "middle", "inner")}),
    # the same, and of gate and up the function's input, its output and the product's other half
    "llama": Family(
        4,
        2,
        3,
        3,
        dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("input",))
        | {"o_proj": ("attended",), "gate_proj": ("middle",), "up_proj": ("middle",), "down_proj": ("inner",)},
    ),
    # the tanh form of gelu, written out: four tensors
    "gpt2": Family(4, 2, 4, 3, {"c_attn": ("input",), "c_fc": ("middle",), "c_proj": ("attended", "inner")}),
    "vit": Family(
        4,
        2,
        1,
        2,
        _FED_BY_NAME
        | dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("input",))
        | {"o_proj": ("attended",), "fc1": ("middle",), "fc2": ("inner",), "dense": ("attended", "middle", "inner")},
    ),
}
_KINDS: Mapping[str, str] = (
    dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet"), "bert")
    | dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "olmo2", "phi3"), "llama")
    | {"gpt2": "gpt2"}
    | dict.fromkeys(("vit", "deit", "dinov2"), "vit")
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model's sizes. inner: width of the feed-forward layers; heads: of attention; keys: width of keys and values;
    words: that it predicts, 0 for a classifier; vocabulary: of its embedding; positions: that are embedded; side,
    patch: of images, else 0; tied: whether its head is the embedding."""

    family: str
    layers: int
    width: int
    inner: int
    heads: int
    keys: int
    words: int
    vocabulary: int
    positions: int
    side: int
    patch: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, object], predicts: bool | None = None) -> Self:
        """Of a transformers configuration as plain values, by any family's names.

        predicts: whether it is a language model; if not given it is one unless ``problem_type`` is set, as it is by
        ``load_base`` on others.
        """

        def number(*names: str) -> int:
            return next((int(x) for n in names if isinstance(x := config.get(n), int | float) and x), 0)

        width = number("hidden_size", "n_embd", "d_model", "dim")
        heads = number("num_attention_heads", "n_head", "n_heads") or 1
        size = number("head_dim") or width // heads
        lm = not config.get("problem_type") if predicts is None else predicts
        kind = str(config.get("model_type", ""))
        inner = number("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim")
        return cls(
            family=_KINDS.get(kind, "vit" if number("patch_size") else "bert" if not lm else "llama"),
            layers=number("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
            width=width,
            inner=inner or width * (number("mlp_ratio") or 4),
            heads=heads,
            keys=size * (number("num_key_value_heads") or heads),
            words=number("vocab_size") if lm else 0,
            vocabulary=number("vocab_size"),
            positions=0 if _KINDS.get(kind) == "llama" else number("max_position_embeddings", "n_positions"),
            side=number("image_size"),
            patch=number("patch_size"),
            tied=bool(config.get("tie_word_embeddings", kind in ("gpt2", "gemma", "gemma2"))),
        )

    @property
    def matrices(self) -> Mapping[str, tuple[tuple[int, int], ...]]:
        """The matrices (out, in) of one layer, by the last parts of their names."""
        h, i, k = self.width, self.inner, self.keys
        if self.family == "llama":
            return {
                "q_proj": ((h, h),),
                "k_proj": ((k, h),),
                "v_proj": ((k, h),),
                "o_proj": ((h, h),),
                "gate_proj": ((i, h),),
                "up_proj": ((i, h),),
                "down_proj": ((h, i),),
            }
        if self.family == "gpt2":
            return {"c_attn": ((3 * h, h),), "c_proj": ((h, h), (h, i)), "c_fc": ((i, h),)}
        return {"query": ((h, h),), "key": ((h, h),), "value": ((h, h),), "dense": ((h, h), (i, h), (h, i))}

    @property
    def in_layers(self) -> int:
        """Numbers of all layers' matrices."""
        return self.layers * sum(d * k for each in self.matrices.values() for d, k in each)

    @property
    def parameters(self) -> int:
        """Numbers of the whole model, but for biases and norms, which are next to nothing."""
        tables = (self.vocabulary + self.positions) * self.width + (0 if self.tied else self.words * self.width)
        return self.in_layers + tables + 3 * self.patch**2 * self.width

    @property
    def usual(self) -> tuple[str, ...]:
        """What is adapted where nothing is said: queries and values."""
        return {"llama": ("q_proj", "v_proj"), "gpt2": ("c_attn",)}.get(self.family, ("query", "value"))

    def trained(self, targets: Collection[str], rank: int, layers: int) -> dict[str, tuple[int, int]]:
        """Numbers of both factors, (a, b), by target, of LoRA on so many layers."""
        named = self.matrices if "all-linear" in targets else targets
        each = {t: self.matrices.get(t, ()) for t in named}
        return {
            t: (layers * rank * sum(k for _, k in x), layers * rank * sum(d for d, _ in x)) for t, x in each.items()
        }


@dataclass(frozen=True, slots=True)
class Load:
    """What one pass of a client's training is. parameters: of the base; trained: numbers; targets: modules' names, or
    "all-linear"; layers: that have gradients, the top ones; rows, length: of one pass; trains_a: whether the factors
    that read the inputs are trained, of which FFA keeps them frozen; moments: numbers that the optimiser keeps of each;
    dropout: of the adapter's; kept: bytes of what the lower layers make of texts, with torch."""

    parameters: int
    trained: int
    targets: tuple[str, ...]
    layers: int
    rows: int
    length: int
    trains_a: bool = True
    moments: int = 2
    dropout: bool = False
    checkpointing: bool = False
    quantise: Quantise = "none"
    half: bool = False
    engine: Engine = "torch"
    kept: int = 0


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes at the peak, by what takes them. work: the larger of the loss and the workspace; kept: of lower layers."""

    runtime: int
    base: int
    adapter: int
    activations: int
    work: int
    kept: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, x.name) for x in fields(self))


def predict(sizes: Sizes, load: Load) -> Parts:
    """The parts of a step's peak, with an allocator that gives back what is freed (``environment.sparing``)."""
    tokens = load.rows * load.length
    layer = kept_by_layer(sizes, load)
    family = FAMILIES[sizes.family]
    kept, again = load.layers * layer, 0
    if load.checkpointing:
        kept, again = load.layers * sizes.width, layer
    loss = _loss(sizes, load)
    attention = sizes.inner + _ATTENTION * sizes.width
    back = _FLOAT * tokens * (again + max(family.back * sizes.inner, attention)) + _expanded(
        sizes, load, sizes.inner * sizes.width
    )
    return Parts(
        runtime=RUNTIME[load.engine] + (GRAPH * sizes.layers if load.engine == "onnx" else 0),
        base=base_bytes(sizes, load.parameters, load.quantise, load.half),
        adapter=_FLOAT * load.trained * (3 + load.moments),
        activations=_FLOAT * tokens * kept,
        work=max(loss, back),
        kept=load.kept if load.engine == "torch" else 0,
    )


def kept_below(sizes: Sizes, training: Training, texts: int | None) -> int:
    """Bytes of what is kept of the lower layers of so many texts, each of the greatest length; all the room if it isn't
    known how many there are."""
    each = training.length * sizes.width * {"none": 0, "fp32": 4, "bf16": 2}[training.lower]
    return training.bytes_lower if texts is None else min(training.bytes_lower, texts * each)


def kept_by_layer(sizes: Sizes, load: Load) -> int:
    """Numbers that one layer keeps for the backward pass, for each token."""
    family = FAMILIES[sizes.family]
    padded = load.rows > 1 and not sizes.patch  # rows of unlike length, which take a mask
    keys = sizes.keys if load.engine == "torch" and not padded else sizes.width  # repeated for all heads
    kept = family.widths * sizes.width + family.keys * keys + family.inners * sizes.inner
    names = family.fed if "all-linear" in load.targets else load.targets
    fed = [family.fed.get(x, ("input",)) for x in names]
    widths = {"input": sizes.width, "middle": sizes.width, "inner": sizes.inner, "attended": 0}
    if load.trains_a:
        kept += sum(widths[x] for x in {x for each in fed for x in each})
    if load.dropout:  # each adapted module has inputs and a mask of its own
        kept += 2 * sum(widths[x] or sizes.width for each in fed for x in each)
    if load.engine == "onnx":  # attention is plain products, whose probabilities are kept
        return kept + sizes.heads * load.length
    return kept + (load.length if padded else 0)


def base_bytes(sizes: Sizes, parameters: int, quantise: Quantise, half: bool = False) -> int:
    """Bytes of a base: of 4 or, in bf16, 2 a number; packed 8 or 4 bits and its share of the scales, with the embedding
    in 8."""
    if quantise == "none":
        return parameters * (2 if half else _FLOAT)
    table = min(parameters, sizes.vocabulary * sizes.width)
    return round((table * bits("int8", sizes.width) + (parameters - table) * bits(quantise, sizes.width)) / 8)


def _loss(sizes: Sizes, load: Load) -> int:
    """With all positions predicted: a chunk of logits, the head's expanded rows, and hidden states thrice."""
    units = load.rows * load.length
    if not sizes.words:
        return 0
    if sizes.words <= ADDED and units * sizes.words <= FEW:
        return 3 * _FLOAT * units * sizes.words
    some = max(1, min(units, LOGITS // sizes.words))
    return _FLOAT * (some * sizes.words + 3 * units * sizes.width) + _expanded(sizes, load, sizes.words * sizes.width)


def _expanded(sizes: Sizes, load: Load, numbers: int) -> int:
    """Bytes of a weight that is expanded, or of the rows of it that are at a time, and of a copy on its way."""
    if load.quantise == "none":
        return 0
    return 2 * (2 if load.half else _FLOAT) * min(EXPANDED, numbers)
