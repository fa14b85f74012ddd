"""A graph's weights are the pages of the base's file, of which the process owns none."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from fedpeft.errors import ConfigError
from fedpeft.ondevice.session import Graph
from fedpeft.ondevice.weights import Outside, mapped, outside
from fedpeft.training.kit import EVALUATE, STEP
from tests.ondevice.small_kit import MIDDLE, TOP, WIDTH, WORDS, frozen, write

BLOCK, BLOCKS, ROWS = 32, 3, 5


def tensor(name: str, kind: int, shape: tuple[int, ...], offset: int, length: int, file: str = "b") -> TensorProto:
    made = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        made.external_data.add(key=key, value=str(value))
    return made


def model(*constants: TensorProto, nodes: tuple[onnx.NodeProto, ...] = (), out: str = "y") -> onnx.ModelProto:
    end = helper.make_tensor_value_info(out, TensorProto.FLOAT, None)
    graph = helper.make_graph(list(nodes), "g", [], [end], list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_the_graph_says_which_weights_are_in_other_files():
    inside = onnx.numpy_helper.from_array(np.arange(300.0), "inside")
    content = model(
        tensor("plain", TensorProto.FLOAT, (3, 70000), 1 << 33, 840000, "base.safetensors"),
        inside,
        tensor("codes.0-3", TensorProto.INT4, (3, 64), 64, 96),
        tensor("one", TensorProto.FLOAT16, (), 0, 2),
    ).SerializeToString()
    assert list(outside(content)) == [
        Outside("plain", 1, (3, 70000), "base.safetensors", 1 << 33, 840000),
        Outside("codes.0-3", 22, (3, 64), "b", 64, 96),
        Outside("one", 10, (), "b", 0, 2),
    ]


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content


def test_other_ways_to_write_the_same_are_read_too():
    """Sizes packed into one field, and fields of fixed width, which no graph of ours has."""
    said = [field(1, k) + field(2, v) for k, v in ((b"location", b"b"), (b"offset", b"8"), (b"length", b"1200"))]
    weight = (
        field(1, b"\x03\xac\x02") + b"\x10\x03" + field(8, b"w") + b"".join(field(13, x) for x in said) + b"\x70\x01"
    )
    content = b"\x09" + bytes(8) + b"\x0d" + bytes(4) + field(7, b"\x08\x01" + field(5, weight))
    assert list(outside(content)) == [Outside("w", 3, (3, 300), "b", 8, 1200)]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"\x0b", ValueError),  # a wire type that there is not
        (field(7, b"\x2a\x05a"), ValueError),  # a tensor of five bytes, of which one is there
        (b"\x3a", IndexError),  # no size
        (b"\x38\x01", TypeError),  # a number for the graph
        (b"\x08" + b"\xff" * 10 + b"\x01", ValueError),  # more than 64 bits, which would take ever longer
        (field(7, field(5, b"\x70\x01")), KeyError),  # outside, and not said where
    ],
)
def test_a_damaged_graph_is_an_error(content, error):
    with pytest.raises(error):
        list(outside(content))


def test_weights_are_where_the_file_is_mapped_in_every_type(tmp_path):
    rng = np.random.default_rng(4)
    parts = {
        "f": (TensorProto.FLOAT, rng.standard_normal((2, 3)).astype(np.float32)),
        "h": (TensorProto.FLOAT16, rng.standard_normal(4).astype(np.float16)),
        "u": (TensorProto.UINT8, rng.integers(0, 256, (3, 5), np.uint8)),
        "i": (TensorProto.INT8, rng.integers(-128, 128, (5, 2), np.int8)),
        "n": (TensorProto.INT64, rng.integers(-9, 9, 3)),
    }
    content, constants = b"", []
    for name, (kind, x) in parts.items():
        content += bytes(-len(content) % 64)
        constants.append(tensor(name, kind, x.shape, len(content), x.nbytes))
        content += x.tobytes()
    (tmp_path / "b").write_bytes(content)
    (tmp_path / "g").write_bytes(model(*constants).SerializeToString())
    found = mapped(tmp_path / "g", tmp_path / "b")
    assert list(found) == list(parts)
    for name, (_, x) in parts.items():
        np.testing.assert_array_equal(found[name].numpy(), x, strict=True)
    places = {x.name: x.offset for x in outside((tmp_path / "g").read_bytes())}
    assert {x.data_ptr() - places[n] for n, x in found.items()} == {found["f"].data_ptr()}


def test_codes_of_4_bits_are_expanded_from_the_file(tmp_path):
    rng = np.random.default_rng(5)
    codes = rng.integers(-8, 8, (ROWS, BLOCKS * BLOCK))
    scales = rng.standard_normal((ROWS, BLOCKS)).astype(np.float32)
    low, high = codes[:, ::2] & 15, codes[:, 1::2] & 15
    packed = (low | high << 4).astype(np.uint8).tobytes()  # the last bytes of the file: what numpy is told goes beyond
    (tmp_path / "b").write_bytes(scales.tobytes() + packed)
    constants = (
        tensor("c", TensorProto.INT4, codes.shape, scales.nbytes, len(packed)),
        tensor("s", TensorProto.FLOAT, scales.shape, 0, scales.nbytes),
    )
    node = helper.make_node("DequantizeLinear", ["c", "s"], ["y"], axis=1, block_size=BLOCK)
    (tmp_path / "g").write_bytes(model(*constants, nodes=(node,)).SerializeToString())
    weights, options = mapped(tmp_path / "g", tmp_path / "b"), onnxruntime.SessionOptions()
    for name, x in weights.items():
        options.add_initializer(name, x)
    session = onnxruntime.InferenceSession(str(tmp_path / "g"), options, providers=["CPUExecutionProvider"])
    want = codes.reshape(ROWS, BLOCKS, BLOCK).astype(np.float32) * scales[:, :, None]
    np.testing.assert_array_equal(session.run(["y"], {})[0], want.reshape(ROWS, -1))


@pytest.mark.parametrize(
    "change",
    [
        {"location": "start.safetensors"},
        {"offset": "1000000"},
        {"offset": "-4"},
        {"length": str(4 * MIDDLE * WIDTH - 4)},
        {"offset": "here"},
        {"length": None},
    ],
)
def test_a_graph_that_does_not_fit_the_base_is_refused_by_name(tmp_path, change):
    kit = write(tmp_path)
    graph = onnx.load(tmp_path / STEP, load_external_data=False)
    weight = next(x for x in graph.graph.initializer if x.name == "q.weight")
    said = {x.key: x.value for x in weight.external_data} | change
    del weight.external_data[:]
    for key, value in said.items():
        if value is not None:
            weight.external_data.add(key=key, value=value)
    (tmp_path / STEP).write_bytes(graph.SerializeToString())
    with pytest.raises(ConfigError, match=r"step.onnx can't be run by onnxruntime .*: .*; install the version that"):
        Graph.open(kit, STEP, 1)


def test_a_weight_of_an_unknown_type_is_refused(tmp_path):
    (tmp_path / "b").write_bytes(bytes(8))
    (tmp_path / "g").write_bytes(model(tensor("w", TensorProto.DOUBLE, (1,), 0, 8)).SerializeToString())
    with pytest.raises(KeyError, match="11"):
        mapped(tmp_path / "g", tmp_path / "b")


def test_an_open_graph_has_all_weights_of_the_base_and_can_write_none(tmp_path):
    kit = write(tmp_path)
    graph = Graph.open(kit, EVALUATE, 1)
    shapes = {"embed": (len(WORDS), WIDTH), "q.weight": (MIDDLE, WIDTH), "v.weight": (TOP, MIDDLE)}
    assert {n: tuple(x.shape()) for n, x in graph.weights.items()} == shapes
    for name, x in frozen().items():
        np.testing.assert_array_equal(graph.weights[name].numpy(), x)
    if sys.platform == "linux":
        assert rights(kit.path("base.safetensors")) == ["r--s"]  # once, and shared
        del graph
        assert rights(kit.path("base.safetensors")) == []


def rights(file: Path) -> list[str]:
    """Of this process's maps of a file."""
    lines = (x.split(maxsplit=5) for x in Path("/proc/self/maps").read_text().splitlines())
    return [x[1] for x in lines if len(x) == 6 and x[5] == str(file.resolve())]


CHILD = """
import resource, sys
from pathlib import Path
import onnxruntime
from fedpeft.ondevice import session
from fedpeft.ondevice.weights import mapped

graph, base = Path(sys.argv[1]), Path(sys.argv[2])
lines = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
most = int(lines["VmData"].split()[0]) * 1024 + (32 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
for weights in {}, mapped(graph, base):
    options = session._options(1, frugal=True)
    for name, x in weights.items():
        options.add_initializer(name, x)
    try:
        found = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"]).run(["y"], {})
        print(found[0].tolist())
    except Exception as error:
        print("bad_alloc" in str(error))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is the kernel's")
def test_a_base_larger_than_the_memory_that_is_left_opens(tmp_path):
    """64 MiB of weights where 32 more may be the process's own; the control lets onnxruntime map them itself."""
    size = 64 << 20
    with (tmp_path / "b").open("wb") as file:
        file.truncate(size)  # zeros, which take no room on the disk
    row = onnx.numpy_helper.from_array(np.array([1]), "row")
    node = helper.make_node("Gather", ["w", "row"], ["y"])
    weight = tensor("w", TensorProto.FLOAT, (size // 8, 2), 0, size)
    (tmp_path / "g").write_bytes(model(weight, row, nodes=(node,)).SerializeToString())
    call = [sys.executable, "-c", CHILD, str(tmp_path / "g"), str(tmp_path / "b")]
    found = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
    assert found.stdout == "True\n[[0.0, 0.0]]\n", found.stderr
