"""A kit made by hand: two linear layers under a softmax, whose gradients are written out; no size is another's."""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fedpeft.adapters import Adapter, LowRank
from fedpeft.rounds import derive
from fedpeft.training.kit import BASE, EVALUATE, START, STEP, TEMPLATE, TOKENIZER, Facts, Kit, write_manifest

WORDS = ("<pad>", "<s>", "</s>", "<user>", "<bot>", "<unk>", *"abcdefghijkl")
CLASSES = ("red", "green", "blue")
WIDTH, MIDDLE, TOP = 7, 6, 5
SCALE, RANK = 0.5, 4
CHAT = "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }} </s> {% endfor %}"
CHAT += "{% if add_generation_prompt %}<bot> {% endif %}"


def frozen() -> dict[str, np.ndarray]:
    """The base: an embedding and two matrices."""
    rng = np.random.default_rng(1)
    shapes = {"embed": (len(WORDS), WIDTH), "q.weight": (MIDDLE, WIDTH), "v.weight": (TOP, MIDDLE)}
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def start(task: str) -> Adapter:
    """An adapter before training, whose b is not zero, so that both factors have gradients."""
    rng = np.random.default_rng(2)
    outputs = len(CLASSES) if task == "classify" else len(WORDS)

    def draw(*shape: int) -> np.ndarray:
        return 0.4 * rng.standard_normal(shape).astype(np.float32)

    layers = {
        "q": LowRank(draw(RANK, WIDTH), draw(MIDDLE, RANK), SCALE),
        "v": LowRank(draw(RANK, MIDDLE), draw(TOP, RANK), SCALE),
    }
    return Adapter(layers, {"head": draw(outputs, TOP), "bias": draw(outputs)})


def write(folder: Path, task: str = "classify", trains: str = "ab", opset: int = 21, seed: int = 0) -> Kit:
    """Write the kit of a task, as exported from an experiment with this seed."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(frozen(), folder / BASE)
    adapter = start(task)
    save_file(adapter.tensors(), folder / START)
    for name in (STEP, EVALUATE):
        graph = _graph(folder / BASE, task, trains, adapter, steps=name == STEP)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        onnx.save(model, folder / name)
    _tokenizer(task).save(str(folder / TOKENIZER))
    if task == "lm":
        (folder / TEMPLATE).write_text(CHAT)
    facts = Facts(
        opset=opset,
        task=task,
        classes=CLASSES if task == "classify" else (),
        model="by-hand",
        plain="0123",
        quantise="none",
        method="lora",
        spec=adapter.spec,
        trains=trains,
        recompute=False,
        pad=0,
        bos="<s>",
        eos="</s>",
        longest=20,
        words=len(WORDS),
        vocabulary=len(WORDS) if task == "lm" else 0,
        marks={"bos_token": "<s>", "eos_token": "</s>"},
        seed=derive(seed, "start"),
    )
    write_manifest(folder, facts)
    return Kit.open(folder)


def _tokenizer(task: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(WORDS[:6]))
    if task == "classify":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_padding(length=9)  # which the kit's reader must undo
    tokenizer.enable_truncation(2)
    return tokenizer


def _graph(base: Path, task: str, trains: str, adapter: Adapter, steps: bool) -> onnx.GraphProto:
    nodes: list[onnx.NodeProto] = []

    def add(op: str, out: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def product(out: str, x: str, y: str, transpose: str = "") -> str:
        """x @ y, the named one of them transposed first."""
        return add("Gemm", out, x, y, transA=int("x" in transpose), transB=int("y" in transpose))

    def layer(name: str, x: str) -> str:
        plain, inner = product(f"{name}0", x, f"{name}.weight", "y"), product(f"{name}/z", x, f"{name}/a", "y")
        return add("Add", f"{name}1", plain, add("Mul", f"{name}2", product(f"{name}3", inner, f"{name}/b", "y"), "s"))

    def back(name: str, x: str, slope: str) -> str:
        """The gradients of a layer's factors, and that of its input."""
        scaled = add("Mul", f"{name}4", slope, "s")
        inner = product(f"{name}5", scaled, f"{name}/b")
        product(f"grad/{name}/b", scaled, f"{name}/z", "x")
        if trains == "ab":
            product(f"grad/{name}/a", inner, x, "x")
        return add(
            "Add", f"{name}6", product(f"{name}7", slope, f"{name}.weight"), product(f"{name}8", inner, f"{name}/a")
        )

    embedded = add("Gather", "embedded", "embed", "input_ids")
    if task == "classify":
        mask = add("Unsqueeze", "mask", add("Cast", "mask0", "attention_mask", to=TensorProto.FLOAT), "last")
        total = add("ReduceSum", "total", add("Mul", "masked", embedded, mask), "middle", keepdims=0)
        x = add("Div", "x", total, add("ReduceSum", "count", mask, "middle", keepdims=0))
    else:
        x = add("Gather", "x", add("Reshape", "flat", embedded, "flat_shape"), "positions")
    first = layer("q", x)
    second = layer("v", first)
    logits = add("Add", "logits", product("logits0", second, "head", "y"), "bias")
    log = add("LogSoftmax", "log", logits, axis=-1)
    goal = add("Unsqueeze", "goal", "targets", "last_of_two")
    add("Neg", "losses", add("Squeeze", "chosen", add("GatherElements", "chosen0", log, goal, axis=1), "last_of_two"))
    add("Equal", "hits", add("ArgMax", "best", logits, axis=1, keepdims=0), "targets")
    trained = list(adapter.tensors("ab" if trains == "ab" else "b")) if steps else []
    if steps:
        hot = add("OneHot", "hot", "targets", "outputs", "off_on", axis=-1)
        slope = add("Sub", "slope", add("Exp", "p", log), hot)
        product("grad/head", slope, second, "x")
        add("ReduceSum", "grad/bias", slope, "first", keepdims=0)
        back("q", x, back("v", first, product("slope0", slope, "head")))
    outputs = adapter.dense["bias"].shape[0]
    constants = {
        "s": np.array(SCALE, np.float32),
        "first": np.array([0]),
        "middle": np.array([1]),
        "last": np.array([2]),
        "last_of_two": np.array([1]),
        "flat_shape": np.array([-1, WIDTH]),
        "outputs": np.array(outputs),
        "off_on": np.array([0, 1], np.float32),
    }
    used = {i for x in nodes for i in x.input}
    whole = [onnx.numpy_helper.from_array(x, n) for n, x in constants.items() if n in used]
    kinds = {"input_ids": ["rows", "length"], "attention_mask": ["rows", "length"], "targets": ["units"]}
    if task == "lm":
        kinds["positions"] = ["units"]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, s) for n, s in kinds.items()]
    for name, x in adapter.tensors().items():
        part = name.rpartition("/")[2]
        shape: list[object] = list(x.shape)
        if part in "ab":
            shape["ab".index(part)] = "rank"
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    found = [
        helper.make_tensor_value_info("losses", TensorProto.FLOAT, ["units"]),
        helper.make_tensor_value_info("hits", TensorProto.BOOL, ["units"]),
        *(helper.make_tensor_value_info(f"grad/{n}", TensorProto.FLOAT, None) for n in trained),
    ]
    return helper.make_graph(nodes, "step", inputs, found, [*whole, *_outside(base)])


def _outside(base: Path) -> list[onnx.TensorProto]:
    """The base's tensors, whose numbers stay in its file."""
    with base.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    found = []
    for name, said in header.items():
        begin, end = said["data_offsets"]
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=said["shape"])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", base.name), ("offset", 8 + size + begin), ("length", end - begin)):
            tensor.external_data.add(key=key, value=str(value))
        found.append(tensor)
    return found
