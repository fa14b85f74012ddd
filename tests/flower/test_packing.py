"""The packed wire format: what goes in comes out, and what was tampered with is refused."""

import json
import zlib
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedpeft.adapters import Adapter, LowRank, same
from fedpeft.errors import ProtocolError
from fedpeft.flower.answers import Term, pack_term
from fedpeft.flower.inprocess import InProcessGrid
from fedpeft.flower.packing import Parcel, digest_of, glance, pack, payload_bytes, round_to_bfloat16, unpack
from fedpeft.flower.requests import pack_request, unpack_request
from fedpeft.rules import Broadcast, Task

NAMES = (
    "float64",
    "float32",
    "float16",
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
)


def wire(manifest: Any, buffer: bytes = b"") -> RecordDict:
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    return raw(buffer, zlib.compress(text))


def raw(buffer: bytes, manifest: bytes) -> RecordDict:
    array = Array("uint8", (len(buffer),), "fedpeft", buffer)
    return RecordDict({"buffer": ArrayRecord({"0": array}), "manifest": ConfigRecord({"0": manifest})})


def honest(tensors: list[Any], buffer: bytes, **changed: Any) -> dict[str, Any]:
    digest = sha256(buffer).hexdigest()
    return {"schema": 1, "kind": "k", "facts": {}, "tensors": tensors, "digest": digest} | changed


def parts(content: RecordDict) -> tuple[bytes, bytes]:
    buffer, manifest = content["buffer"], content["manifest"]
    assert isinstance(buffer, ArrayRecord)
    assert isinstance(manifest, ConfigRecord)
    found = manifest["0"]
    assert isinstance(found, bytes)
    return buffer["0"].data, found


@given(
    st.lists(
        st.sampled_from(NAMES).flatmap(
            lambda n: hnp.arrays(np.dtype(n), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
        ),
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_tensors_of_every_dtype_and_shape_come_back_bit_for_bit(arrays: list[np.ndarray]) -> None:
    sent = {f"t{i}/ü": x for i, x in enumerate(arrays)}
    got = unpack(pack(Parcel("k", {"n": [1, "x", None, True, 0.1]}, sent)), "k")
    assert got.facts == {"n": [1, "x", None, True, 0.1]}
    assert list(got.tensors) == list(sent)
    for name, x in sent.items():
        y = got.tensors[name]
        assert (y.dtype, y.shape, y.tobytes()) == (x.dtype, x.shape, x.tobytes())


def test_a_transposed_view_and_big_endian_numbers_are_sent_by_value() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    got = unpack(pack(Parcel("k", {}, {"t": x.T, "e": x.astype(">f4")})), "k").tensors
    np.testing.assert_array_equal(got["t"], x.T)
    np.testing.assert_array_equal(got["e"], x)
    assert got["e"].dtype == np.dtype("<f4")


def test_what_is_received_can_not_be_changed_in_place() -> None:
    x = np.ones(3, np.float32)
    got = unpack(pack(Parcel("k", {}, {"x": x, "n": x}), frozenset({"n"})), "k").tensors
    assert not got["x"].flags.writeable
    assert not got["n"].flags.writeable


def test_narrow_tensors_travel_in_half_the_bytes_and_round_to_the_nearest_bfloat16() -> None:
    x = np.array([1.0, -1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3.5e38 / 1.03, np.inf, np.nan], np.float32)
    want = np.array([1.0, -1.0, 1.0, 1 + 2**-6, 1 + 2**-7, np.inf, np.inf, np.nan], np.float32)
    content = pack(Parcel("k", {}, {"x": x}), frozenset({"x"}))
    assert len(parts(content)[0]) == 16
    np.testing.assert_array_equal(unpack(content, "k").tensors["x"], want)
    assert round_to_bfloat16(np.array([np.nan], np.float32))[0] == 0x7FC0
    with pytest.raises(ValueError, match="only float32"):
        pack(Parcel("k", {}, {"x": np.ones(2)}), frozenset({"x"}))


def test_a_dtype_that_can_not_travel_is_named() -> None:
    with pytest.raises(ValueError, match="c: can't send complex128"):
        pack(Parcel("k", {}, {"c": np.ones(2, complex)}))


def test_the_digest_of_tensors_ignores_their_order_and_nothing_else() -> None:
    x, y = np.ones(4, np.float32), np.zeros(2, np.float32)
    digest = digest_of({"x": x, "y": y})
    assert digest == digest_of({"y": y, "x": x})
    others = [
        {"x": x},
        {"x": y, "y": x},
        {"x": x.reshape(2, 2), "y": y},
        {"x": x, "y": y.astype(np.float16)},
        {"x": x + 1, "y": y},
    ]
    assert digest not in [digest_of(o) for o in others]


@pytest.mark.parametrize(
    ("content", "want"),
    [
        (RecordDict(), r"records \[\]; want"),
        (RecordDict({"buffer": ConfigRecord({}), "manifest": ConfigRecord({})}), "wrong types"),
        (RecordDict({"buffer": MetricRecord({}), "manifest": ConfigRecord({})}), "wrong types"),
        (RecordDict({"buffer": ArrayRecord({}), "manifest": ConfigRecord({})}), "want \\['0'\\] in each"),
        (raw(b"", b"not deflated"), "not deflated JSON"),
        (raw(b"", zlib.compress(b"{}")[:-3]), "cut off"),
        (raw(b"", zlib.compress(bytes((1 << 24) + 1))), "longer than"),
        (wire(b"\xff\xfe"), "not deflated JSON"),
        (wire(b"[" * 100_000), "not deflated JSON"),
        (wire(b"9" * 10_000), "not deflated JSON"),
        (wire(b'{"schema": NaN}'), "NaN is not JSON"),
        (wire([1]), "a list; want an object"),
        (wire({}), "schema 'None'; want 1"),
        (wire(honest([], b"", schema=2)), "schema '2'; want 1"),
        (wire(honest([], b"", schema=True)), "schema 'True'"),
        (wire({"schema": 1}), "has keys"),
        (wire(honest([], b"", kind="other")), "a 'other'; want 'k'"),
        (wire(honest([], b"", facts=[])), "facts are a list"),
        (wire(honest([], b"", digest="0")), "damaged"),
        (wire(honest([], b"") | {"tensors": {}}), "tensors are a dict"),
        (wire(honest([["x", "uint8"]], b"")), "want \\[name, dtype, shape\\]"),
        (wire(honest([[1, "uint8", [0]]], b"")), "name is 1; want a string"),
        (wire(honest([["x", "object", [0]]], b"")), "dtype object"),
        (wire(honest([["x", ["uint8"], [0]]], b"")), "dtype"),
        (wire(honest([["x", "uint8", [-1]]], b"")), "shape"),
        (wire(honest([["x", "uint8", [True]]], b"x"), b"x"), "shape"),
        (wire(honest([["x", "uint8", 3]], b"")), "shape"),
        (wire(honest([["x", "uint8", [1] * 17]], b"x"), b"x"), "at most 16"),
        (wire(honest([["x", "uint8", [2**40]]], b"")), "shape"),
        (wire(honest([["x", "uint8", [2**30, 2**30]]], b"")), "0 bytes; want at least"),
        (wire(honest([["x", "uint8", [0] + [2**30] * 5]], b"")), "can't be"),
        (wire(honest([["x", "uint8", [1]], ["x", "uint8", [1]]], b"xx"), b"xx"), "names 'x' twice"),
        (wire(honest([["x", "float32", [2]]], b"1234"), b"1234"), "want at least 8: it was cut off at 'x'"),
        (wire(honest([["x", "uint8", [2]]], b"1234"), b"1234"), "4 bytes; want 2"),
    ],
)  # fmt: skip
def test_a_hostile_message_is_a_protocol_error_that_says_what_is_wrong(content: RecordDict, want: str) -> None:
    with pytest.raises(ProtocolError, match=want):
        unpack(content, "k")


@given(st.binary(max_size=80), st.binary(max_size=80))
@settings(max_examples=100, deadline=None)
def test_random_bytes_are_nothing_but_a_protocol_error(buffer: bytes, manifest: bytes) -> None:
    for content in (raw(buffer, manifest), raw(buffer, zlib.compress(manifest))):
        for read in (lambda c: unpack(c, "k"), glance, lambda c: unpack_request(c, lambda d: None)):
            with pytest.raises(ProtocolError):
                read(content)


def minilm(rank: int = 8) -> Adapter:
    """MiniLM's shape with LoRA on q and v, and a head of 11 classes, under peft's own long names."""
    rng = np.random.default_rng(0)
    stem = "base_model.model.bert.encoder.layer.{}.attention.self.{}"
    layers = {
        stem.format(i, t): LowRank(
            rng.normal(size=(rank, 384)).astype(np.float32), rng.normal(size=(384, rank)).astype(np.float32), 2.0
        )
        for i in range(6)
        for t in ("query", "value")
    }
    head = rng.normal(size=(11, 384)).astype(np.float32)
    return Adapter(layers, {"base_model.model.classifier.weight": head, "base_model.model.classifier.bias": head[:, 0]})


def test_the_wire_adds_at_most_two_percent_to_a_minilm_adapter_both_ways() -> None:
    from flwr.app import Message

    InProcessGrid(lambda messages, nodes: iter(()), [])  # gives messages an identity
    adapter = minilm()
    settings_text = json.dumps({f"section{i}": {f"key{j}": [i, j, "value"] for j in range(8)} for i in range(9)})
    payload = sum(x.nbytes for x in adapter.tensors().values())
    down = pack_request("train", Broadcast(Task(adapter.spec, 3), adapter, {}), settings_text, "f" * 64)
    vector = np.concatenate([x.ravel() for x in adapter.tensors().values()] + [np.ones(5, np.float32)])
    up = pack_term(Term(3, 0, vector.astype(np.float32)))
    assert payload > 300_000
    for content in (down, up):
        sent = len(message_to_proto(Message(content, 1, "train")).SerializeToString())
        assert payload < sent < 1.02 * payload
        assert 0 <= sent - payload_bytes(content) < 500  # what is counted is what is sent, but for Flower's envelope


def test_a_minilm_adapter_comes_back_bit_for_bit() -> None:
    adapter = minilm()
    content = pack_request("train", Broadcast(Task(adapter.spec, 3), adapter, {}), "{}", "base")
    assert same(unpack_request(content, lambda digest: None).broadcast.adapter, adapter)
