"""What messages mean: requests and answers round-trip, and impossible ones are refused."""

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.adapters import Adapter, LowRank, same
from fedpeft.errors import ProtocolError
from fedpeft.flower.answers import (
    Capabilities,
    Counts,
    Refusal,
    Term,
    pack_capabilities,
    pack_metrics,
    pack_refusal,
    pack_term,
    unpack_capabilities,
    unpack_metrics,
    unpack_refusal,
    unpack_term,
)
from fedpeft.flower.packing import Parcel, digest_of, glance, pack, payload_bytes, unpack
from fedpeft.flower.requests import (
    ConstantsMissing,
    Query,
    constants_of,
    model_digest,
    pack_query,
    pack_request,
    settings_of,
    unpack_query,
    unpack_request,
)
from fedpeft.rounds import Metrics
from fedpeft.rules import Broadcast, Task
from tests.flower.linear import RANK, D, K, start

TAIL = {"q": LowRank(np.ones((1, K), np.float32), np.ones((D, 1), np.float32), 0.5)}
CAPABLE = Capabilities(2, "b", Counts(5, 6, 7), True, ("d" * 64,), start(), 3)
KINDS = ("train", "evaluate", "query", "capabilities", "term", "metrics", "error")


def nothing_held(digest: str) -> None:
    return None


def request(
    rank: int = RANK, pass_: int = 0, constant: frozenset[str] = frozenset(), in_full: bool = True
) -> RecordDict:
    shared = {"y": np.arange(3.0)} if pass_ else {}
    broadcast = Broadcast(Task(start().spec, 4, pass_, shared), start().cut(rank), TAIL)
    return pack_request("train", broadcast, '{"seed": 1}', "base", constant, in_full)


EVERY: dict[str, tuple[RecordDict, Callable[[RecordDict], Any]]] = {
    "request": (request(rank=2), lambda c: unpack_request(c, nothing_held)),
    "pass 1": (request(pass_=1), lambda c: unpack_request(c, nothing_held)),
    "query": (pack_query(Query("{}", 3)), unpack_query),
    "capabilities": (pack_capabilities(CAPABLE), unpack_capabilities),
    "term": (pack_term(Term(4, 1, np.arange(5, dtype=np.float32))), unpack_term),
    "metrics": (pack_metrics({"test": Metrics(1.0, 4.0, 2.0, 4.0)}), unpack_metrics),
    "refusal": (pack_refusal(Refusal("failed", "why")), unpack_refusal),
}


def change(content: RecordDict, key: str, value: Any) -> RecordDict:
    parcel = unpack(content, *KINDS)
    return pack(replace(parcel, facts=dict(parcel.facts) | {key: value}))


@pytest.mark.parametrize("rank", [1, 2, RANK])
def test_a_request_comes_back_as_it_was_sent(rank: int) -> None:
    got = unpack_request(request(rank), nothing_held)
    assert same(got.broadcast.adapter, start().cut(rank))
    assert same(Adapter(layers=got.broadcast.tail), Adapter(layers=TAIL))
    assert got.broadcast.task.spec == start().spec
    assert (got.broadcast.task.round, got.broadcast.task.pass_, got.parts) == (4, 0, ())
    assert (got.settings, got.base, settings_of(request(rank))) == ('{"seed": 1}', "base", '{"seed": 1}')


def test_a_later_pass_carries_what_is_shared_and_not_the_adapter_again() -> None:
    got = unpack_request(request(pass_=1), nothing_held)
    np.testing.assert_array_equal(got.broadcast.task.shared["y"], np.arange(3.0))
    assert got.broadcast.task.pass_ == 1
    assert same(got.broadcast.adapter, Adapter())
    assert list(unpack(request(pass_=1), "train").tensors) == ["shared/y"]


def test_constants_travel_once_and_then_by_their_digest() -> None:
    constant = frozenset({"q/b"})
    first = unpack_request(request(constant=constant), nothing_held)
    assert first.brought
    assert set(first.constants) == {"constant/q/b", "fixed/fixed"}
    assert first.digest == digest_of(constants_of(start(), constant))
    short = request(constant=constant, in_full=False)
    saved = sum(x.nbytes for x in first.constants.values())
    assert saved == 4 * D * RANK + 8 * 6
    # The manifest's rows for the two tensors go as well, deflated.
    assert saved < payload_bytes(request(constant=constant)) - payload_bytes(short) < saved + 100
    again = unpack_request(short, {first.digest: first.constants}.get)
    assert same(again.broadcast.adapter, start())
    assert not again.brought
    with pytest.raises(ConstantsMissing, match="send them in full"):
        unpack_request(short, nothing_held)


def test_constants_that_are_not_those_of_the_digest_are_refused() -> None:
    bad = change(request(constant=frozenset({"q/b"})), "constants", "0" * 64)
    with pytest.raises(ProtocolError, match="the constants have digest"):
        unpack_request(bad, nothing_held)


def test_capabilities_bring_the_start_adapter_with_its_fixed_tensors() -> None:
    got = unpack_capabilities(pack_capabilities(CAPABLE))
    assert got.start is not None
    assert same(got.start, start())
    assert replace(got, start=None) == replace(CAPABLE, start=None) or (got.client, got.base) == (2, "b")
    assert (got.counts, got.central, got.holds) == (Counts(5, 6, 7), True, ("d" * 64,))
    assert unpack_capabilities(pack_capabilities(replace(CAPABLE, start=None))).start is None


def test_capabilities_bring_a_rank_where_it_is_the_clients_to_say() -> None:
    for rank in (None, 1, 3, 1 << 30):
        assert unpack_capabilities(pack_capabilities(replace(CAPABLE, rank=rank))).rank == rank


def test_capabilities_of_a_client_with_an_identity_tell_it_and_not_what_it_has() -> None:
    got = unpack_capabilities(pack_capabilities(replace(CAPABLE, counts=None, identity="ab" * 32)))
    assert (got.counts, got.identity) == (None, "ab" * 32)
    assert unpack_capabilities(pack_capabilities(CAPABLE)).identity == ""


def test_the_digest_of_a_model_is_that_of_what_arrives_whatever_goes_with_it() -> None:
    constant = frozenset({"q/b"})
    sent = Broadcast(Task(start().spec, 4), start().cut(2), TAIL)
    want = model_digest(sent, constant)
    held = constants_of(sent.adapter, constant)
    for settings_, base, in_full in (("{}", "x", True), ('{"seed": 1}', "y", False)):
        content = pack_request("train", sent, settings_, base, constant, in_full)
        assert unpack_request(content, lambda digest: held).model == want
    moved = start().cut(2).put({"bias": np.full(D, 1e-7, np.float32)})
    scaled = replace(sent.adapter, layers={"q": replace(sent.adapter.layers["q"], scale=2.5)})
    fixed = replace(sent.adapter, fixed={"fixed": np.arange(1, 7)})
    others = [
        replace(sent, adapter=moved),
        replace(sent, adapter=fixed),
        replace(sent, adapter=start()),
        replace(sent, tail={}),
        replace(sent, tail={"q": replace(TAIL["q"], scale=0.25)}),
        replace(sent, task=replace(sent.task, round=5)),
        replace(sent, task=replace(sent.task, spec=scaled.spec), adapter=scaled),
        replace(sent, task=replace(sent.task, shared={"c": np.zeros(1)})),
        replace(sent, task=replace(sent.task, shared={"c": np.ones(1)})),
    ]
    assert len({model_digest(x, constant) for x in others} | {want}) == len(others) + 1


def test_a_train_reply_carries_its_round_its_pass_and_the_vector_alone() -> None:
    parcel = unpack(EVERY["term"][0], "term")
    assert dict(parcel.facts) == {"round": 4, "pass": 1, "size": 5}
    assert list(parcel.tensors) == ["term"]
    got = unpack_term(EVERY["term"][0])
    assert (got.round, got.pass_, got.vector.tolist()) == (4, 1, [0, 1, 2, 3, 4])


def test_metrics_queries_and_refusals_round_trip() -> None:
    metrics = {"central": Metrics(1.5, 4.0, 2.0, 4.0), "test": Metrics()}
    assert unpack_metrics(pack_metrics(metrics)) == metrics
    for query in (Query("s", None), Query("s", 0)):
        got = unpack_query(pack_query(query))
        assert (got.settings, got.start) == (query.settings, query.start)
    assert unpack_refusal(pack_refusal(Refusal("base", "x" * 600))) == Refusal("base", "x" * 500)


@pytest.mark.parametrize(
    ("name", "key", "value", "want"),
    [
        ("request", "round", -1, "round is '-1'; want a whole number"),
        ("request", "round", True, "want a whole number"),
        ("request", "round", 2**60, "want a whole number"),
        ("request", "pass", 1.0, "want a whole number"),
        ("request", "settings", None, "settings is 'None'; want a string"),
        ("refusal", "reason", "half of a \ud83d", "reason is 'half of a .ud83d'; want a string"),
        ("capabilities", "holds", ["\udfff"], "want a list of strings"),
        ("request", "base", 5, "base is '5'; want a string"),
        ("request", "spec", {}, "want \\[layers, dense\\]"),
        ("request", "spec", [[["q", D, K, -1, 2.0]], []], "has the layer"),
        ("request", "spec", [[["q", D, K, 2**31, 2.0]], []], "not giant"),
        ("request", "spec", [[["q", 2**30, 2**30, 2, 2.0]], []], "not giant"),
        ("request", "spec", [[["q", D, K, True, 2.0]], []], "has the layer"),
        ("request", "spec", [[["q", D, K, RANK, 1e300]], []], "has the layer"),
        ("request", "spec", [[["q", D, K, RANK, "2"]], []], "has the layer"),
        ("request", "spec", [[["q", D, K, RANK, 2.0]] * 2, []], "twice"),
        ("request", "spec", [[["q", D, K, RANK, 2.0]], [["bias", [-5]]]], "has the leaf"),
        ("request", "spec", [[["r", D, K, RANK, 2.0]], [["bias", [D]]]], "not those of the round's spec"),
        ("request", "spec", [[["q", D, K, 1, 2.0]], [["bias", [D]]]], "larger rank"),
        ("request", "adapter", [[["q", D, K, 1, 2.0]], [["bias", [D]]]], "'q/a' is float32 \\(2, 4\\); want"),
        ("request", "adapter", None, "'q/a' is float32 \\(2, 4\\); want"),
        ("request", "tail", [[["r", D, K, 1, 2.0]], []], "no tensor 'r/a'"),
        ("request", "tail", [[], []], "not wanted: \\['q/a'"),
        ("request", "parts", ["test"], "want none"),
        ("request", "parts", "test", "want a list of strings"),
        ("request", "constants", 7, "constants is '7'"),
        ("request", "evil", 7, "facts that are not known: \\['evil'\\]"),
        ("query", "start", -2, "start is '-2'"),
        ("query", "settings", [], "settings is"),
        ("capabilities", "client", -1, "client is '-1'"),
        ("capabilities", "examples", "567", "examples is '567'; want three counts, or null"),
        ("capabilities", "examples", [5, 6], "want three counts"),
        ("capabilities", "examples", [5, 6, -1], "examples is '-1'; want a whole number"),
        ("capabilities", "identity", "AB" * 32, "want 64 hex digits, or none"),
        ("capabilities", "identity", "ab" * 31, "want 64 hex digits, or none"),
        ("capabilities", "identity", 7, "identity is '7'; want a string"),
        ("capabilities", "central", 1, "want true or false"),
        ("capabilities", "holds", [1], "want a list of strings"),
        ("capabilities", "rank", 0, "its rank is 0; want 1 to 1073741824"),
        ("capabilities", "rank", (1 << 30) + 1, "its rank is 1073741825; want 1 to 1073741824"),
        ("capabilities", "rank", "4", "rank is '4'"),
        ("capabilities", "start", None, "not wanted: \\['adapter/"),
        ("term", "round", None, "round is 'None'"),
        ("term", "loss", 0.5, "not known: \\['loss'\\]"),
        ("metrics", "parts", ["best"], "want some of train, validation, test, central"),
        ("metrics", "parts", ["test", "central"], "'metrics' is float64 \\(1, 4\\); want"),
        ("refusal", "cause", "mood", "cause is 'mood'; want one of"),
        ("refusal", "reason", 4, "reason is '4'"),
    ],
)  # fmt: skip
def test_an_impossible_fact_is_a_protocol_error_that_names_it(name: str, key: str, value: Any, want: str) -> None:
    content, read = EVERY[name]
    with pytest.raises(ProtocolError, match=want):
        read(change(content, key, value))


@pytest.mark.parametrize("name", EVERY)
def test_a_missing_fact_an_unwanted_tensor_or_another_kind_is_refused(name: str) -> None:
    content, read = EVERY[name]
    kind, facts = glance(content)
    parcel = unpack(content, kind)
    for gone in facts:
        with pytest.raises(ProtocolError, match=f"no {gone}"):
            read(pack(Parcel(kind, {k: v for k, v in facts.items() if k != gone}, parcel.tensors)))
    with pytest.raises(ProtocolError):
        read(pack(replace(parcel, tensors=dict(parcel.tensors) | {"spy": np.ones(2)})))
    for other, (wrong, _) in EVERY.items():
        if glance(wrong)[0] != kind:
            with pytest.raises(ProtocolError):
                read(wrong)
            assert other != name


@pytest.mark.parametrize(
    "rows",
    [[[np.nan, 1, 1, 1]], [[np.inf, 1, 1, 1]], [[1, -1, -2, 1]], [[1, 1, 2, 1]], [[1, 1, 1, -1]], [[1, 1, 1]]],
)
def test_impossible_metrics_are_refused(rows: list[list[float]]) -> None:
    with pytest.raises(ProtocolError):
        unpack_metrics(pack(Parcel("metrics", {"parts": ["test"]}, {"metrics": np.array(rows)})))


@pytest.mark.parametrize("vector", [np.ones(3, np.float16), np.ones((1, 3), np.float32), np.ones(3, np.int32)])
def test_a_term_that_is_no_fp32_or_fp64_vector_is_refused(vector: np.ndarray) -> None:
    with pytest.raises(ProtocolError, match="want one fp32 or fp64 vector"):
        unpack_term(pack(Parcel("term", {"round": 0, "pass": 0, "size": 3}, {"term": vector})))


def sparse(values: int = 100, share: int = 9, dtype: type = np.float32) -> np.ndarray:
    x = np.zeros(values * share, dtype)
    x[share - 1 :: share] = np.arange(1, values + 1)
    return x


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_zeros_of_a_term_hardly_travel(dtype: type) -> None:
    x = sparse(dtype=dtype)
    packed = pack_term(Term(4, 1, x))
    got = unpack_term(packed, len(x))
    assert (got.round, got.pass_, got.vector.dtype) == (4, 1, x.dtype)
    np.testing.assert_array_equal(got.vector, x)
    parcel = unpack(packed, "term")
    assert list(parcel.tensors) == ["mask", "values"]
    np.testing.assert_array_equal(parcel.tensors["values"], x[x != 0])
    assert parcel.tensors["mask"].nbytes < 40  # of 113, for its pattern repeats itself


def with_parts(**changed: object) -> RecordDict:
    parcel = unpack(pack_term(Term(4, 1, sparse())), "term")
    size = changed.pop("size", 900)
    return pack(Parcel("term", {**parcel.facts, "size": size}, {**parcel.tensors, **changed}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 901}, r"has shape \(901,\); want at most \(900,\)"),
        ({"size": 880}, "another length than 110 bytes"),
        ({"size": 899}, "do not fit"),
        ({"mask": np.zeros(7, np.uint8)}, "not deflated"),
        ({"mask": np.frombuffer(zlib.compress(bytes(1 << 20)), np.uint8)}, "another length than 113 bytes"),
        ({"mask": np.frombuffer(zlib.compress(bytes(113)), np.uint8)}, "do not fit"),
        ({"values": np.ones(99, np.float32)}, "do not fit"),
        ({"values": np.ones(100, np.int32)}, "want one fp32 or fp64 vector"),
        ({"values": np.ones((100, 1), np.float32)}, "want one fp32 or fp64 vector"),
        ({"term": np.ones(3, np.float32)}, "want one fp32 or fp64 vector"),
    ],
)
def test_a_sparse_term_whose_parts_do_not_fit_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        unpack_term(with_parts(**changed), 900)


def test_a_dense_term_that_says_another_size_or_is_too_long_is_refused() -> None:
    whole = {"term": np.ones(3, np.float32)}
    with pytest.raises(ProtocolError, match="has 3 numbers, and says 2"):
        unpack_term(pack(Parcel("term", {"round": 0, "pass": 0, "size": 2}, whole)))
    with pytest.raises(ProtocolError, match=r"has shape \(3,\); want at most \(2,\)"):
        unpack_term(pack(Parcel("term", {"round": 0, "pass": 0, "size": 3}, whole)), 2)


def test_shared_and_adapter_tensors_must_be_floating_point() -> None:
    parcel = unpack(request(pass_=1), "train")
    with pytest.raises(ProtocolError, match="'shared/y' is int64"):
        unpack_request(pack(replace(parcel, tensors={"shared/y": np.arange(3)})), nothing_held)
    parcel = unpack(request(), "train")
    whole = dict(parcel.tensors) | {"adapter/bias": np.arange(D)}
    with pytest.raises(ProtocolError, match="'bias' is int64"):
        unpack_request(pack(replace(parcel, tensors=whole)), nothing_held)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda x: st.lists(x, max_size=5) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=8,
)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_json_a_peer_puts_in_place_of_a_fact_is_read_or_a_protocol_error(data: st.DataObject) -> None:
    content, read = EVERY[data.draw(st.sampled_from(sorted(EVERY)))]
    key = data.draw(st.sampled_from(sorted(glance(content)[1])))
    try:
        read(change(content, key, data.draw(JSON)))
    except ProtocolError as error:
        str(error).encode()
