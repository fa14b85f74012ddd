"""A trained model as an ONNX inference graph, which stock onnxruntime runs without torch or transformers."""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from fedpeft.adapters import LowRank
from fedpeft.errors import ConfigError
from fedpeft.training.bridge import Bridge
from fedpeft.training.export import NO_TAIL, labels_of, longest, merge, need_near, probe_of, probes, resized
from fedpeft.training.pixels import Pixels
from fedpeft.training.whole import whole

FILE = "model.onnx"
_NEEDED = ("onnx", "onnxruntime", "onnxscript")
_LARGE = 1 << 30  # bytes of weights beyond which they are in a file of their own; ONNX's own limit is twice that


class _Text(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


class _Image(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @override
    def forward(self, pixel_values: Tensor) -> Tensor:
        more = resized(self.model, {"pixel_values": pixel_values})
        logits: Tensor = self.model(pixel_values=pixel_values, **more).logits
        return logits


def export_onnx(
    bridge: Bridge,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pixels: Pixels | None = None,
    tail: Mapping[str, LowRank] = NO_TAIL,
) -> float:
    """Write base, adapter and tail as one graph in fp32, model.onnx; return how far its logits are off.

    Any batch and any length up to the model's positions; images of one size. Beside it are the tokenizer's files or
    what images are scaled by, labels.json where there are classes, and a README with inputs, outputs and code.
    The graph is run in onnxruntime on batches of other shapes than the traced one, some with padding: logits must
    be the run's to 1e-4 of their largest. ConfigError if they are not, for a method that can't be merged, for a model
    that can't be traced, and where onnxruntime or onnxscript is missing; then nothing is left in the folder.
    """
    missing = [x for x in _NEEDED if find_spec(x) is None]
    if missing:
        raise ConfigError(f"export to onnx needs {', '.join(missing)}; want `pip install 'fedpeft[onnx]'`")
    side = None if pixels is None else pixels.size
    rows = probes(bridge, side)
    model, want = merge(bridge, tail, rows)
    with whole(folder) as scratch:
        _trace(bridge, model.cpu(), scratch / FILE, side)
        del model
        off = need_near(_run(scratch / FILE, rows), want, "the ONNX graph's logits are", "export to merged instead")
        labels = labels_of(bridge)
        if labels:
            text = json.dumps(labels, ensure_ascii=False, indent=1) + "\n"
            (scratch / "labels.json").write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(scratch))
        (scratch / "README.md").write_text(_readme(bridge, tokenizer, pixels, labels, off), encoding="utf-8")
    return off


def _trace(bridge: Bridge, model: PreTrainedModel, path: Path, side: int | None) -> None:
    """Write the graph of a model, traced on a batch of two rows."""
    model.set_attn_implementation("eager")  # plain products and a softmax, which any runtime has
    model.config.use_cache = False
    example = {n: x.cpu() for n, x in probe_of(bridge, 2, 11, side).items()}
    rows, length = torch.export.Dim("batch"), torch.export.Dim("length", max=longest(model.config))
    shapes = {n: {0: rows} if bridge.task == "image" else {0: rows, 1: length} for n in example}
    graph = (_Image if bridge.task == "image" else _Text)(model).eval()
    kind = type(model).__name__
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                graph,
                tuple(example.values()),
                dynamo=True,
                dynamic_shapes=tuple(shapes.values()),
                input_names=list(example),
                output_names=["logits"],
                verbose=False,
            )
            size = sum(x.numel() * x.element_size() for x in model.parameters())
            program.save(str(path), external_data=size > _LARGE)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        why = " ".join(str(error.__cause__ or error).split())[:200]
        raise ConfigError(f"model.name: {kind} can't be traced for ONNX: {why}; export to merged instead") from error


def _run(path: Path, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """What stock onnxruntime says of each batch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [
        torch.from_numpy(session.run(["logits"], {n: x.cpu().numpy() for n, x in batch.items()})[0])
        for batch in batches
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own warnings off: about torchvision, axis names and torch's deprecations of itself."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _readme(
    bridge: Bridge, tokenizer: PreTrainedTokenizerBase | None, pixels: Pixels | None, labels: list[str], off: float
) -> str:
    config: Any = bridge.model.config
    origin = bridge.model.peft_config["default"].base_model_name_or_path or "BASE"
    most = longest(config)
    many = f"{len(labels)} classes" if labels else f"{config.vocab_size} tokens"
    rows = ["| name | type | shape | what |", "|---|---|---|---|"]
    if bridge.task == "image":
        shape = ", ".join(
            str(x) for x in probe_of(bridge, 1, 1, pixels.size if pixels else None)["pixel_values"].shape[1:]
        )
        scaled = ""
        if pixels is not None:
            scaled = f": (x − mean) / deviation of x in [0, 1], mean {pixels.mean}, deviation {pixels.deviation}"
        rows.append(f"| in: pixel_values | float32 | batch, {shape} | RGB{scaled} |")
    else:
        limit = f", at most {most} long" if most else ""
        rows.append(f"| in: input_ids | int64 | batch, length | tokens{limit}; shorter rows are padded at their end |")
        rows.append("| in: attention_mask | int64 | batch, length | 1 for a token, 0 for padding |")
    out = f"batch, length, {config.vocab_size}" if bridge.task == "lm" else f"batch, {len(labels)}"
    rows.append(f"| out: logits | float32 | {out} | of {many}{', labels.json in order' if labels else ''} |")
    return (
        f"# {origin}, fine-tuned, as an ONNX graph\n\nTrained with fedpeft; the adapter is in the weights. `{FILE}` "
        f"runs in stock onnxruntime, without torch or transformers.\n\n" + "\n".join(rows) + "\n\n"
        f"When it was written its logits were off by {off:.1e} of their largest from the trained model's.\n\n"
        f"```python\n{_code(bridge, tokenizer, bool(labels))}```\n"
    )


def _code(bridge: Bridge, tokenizer: PreTrainedTokenizerBase | None, is_labelled: bool) -> str:
    """A script that runs the graph."""
    start = f'session = onnxruntime.InferenceSession("{FILE}")\n'
    if bridge.task == "image" or tokenizer is None:
        feed = "pixel_values" if bridge.task == "image" else "input_ids"
        return f"import onnxruntime\n\n{start}print([(x.name, x.shape) for x in session.get_inputs()])  # {feed}, ...\n"
    pad = f"pad_id={tokenizer.pad_token_id}, pad_token={json.dumps(tokenizer.pad_token)}"
    last = (
        'labels = json.load(open("labels.json"))\nprint([labels[i] for i in logits.argmax(axis=-1)])\n'
        if is_labelled
        else "ends = feed['attention_mask'].sum(axis=1) - 1\n"
        "print([tokenizer.decode([logits[i, end].argmax()]) for i, end in enumerate(ends)])  # the next token\n"
    )
    return (
        ("import json\n\n" if is_labelled else "")
        + "import numpy as np\nimport onnxruntime\nfrom tokenizers import Tokenizer\n\n"
        + f'{start}tokenizer = Tokenizer.from_file("tokenizer.json")\ntokenizer.enable_padding({pad})\n'
        + 'rows = tokenizer.encode_batch(["a first text", "and a second, longer one"])\n'
        + 'feed = {\n    "input_ids": np.array([x.ids for x in rows]),\n'
        + '    "attention_mask": np.array([x.attention_mask for x in rows]),\n}\n'
        + f'logits = session.run(["logits"], feed)[0]\n{last}'
    )
