"""What a session is about: one JSON, and an error for every other."""

import json
import re
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import ProtocolError
from fedpeft.secagg.encoding import canonical, digest
from fedpeft.secagg.identity import Identity
from fedpeft.secagg.params import Params, decimal, hash_models, is_decimal

IDS = tuple(sorted(Identity.of(bytes([1 + i]) * 32).id.hex() for i in range(5)))
MODELS = {"16": "ab" * 32, "4": "cd" * 32}
PARAMS = Params(
    v=1,
    suite="full",
    consistency=True,
    run_id="run-7",
    fl_round=3,
    attempt=0,
    session="0123456789abcdef0123456789abcdef",
    n=5,
    t=4,
    k=4,
    m=32,
    bits=20,
    range="4",
    clip="0.5",
    dims=(120, 33),
    layout_hash="11" * 32,
    model_hash=hash_models(MODELS).hex(),
    models=MODELS,
    base="minilm@ab12",
    weighting="1000",
    cohort=IDS,
    ranks=(4, 16, 4, 16, 16),
    dp={"noise_multiplier": "1.1", "delta_bits": 20},
    deadlines={"keys": 60},
    halvings=((0, 7, 30), (4,)),
)
KEYS = {
    *("v", "suite", "consistency", "run_id", "fl_round", "attempt", "session", "n", "t", "k", "m", "bits", "range"),
    *("clip", "dims", "layout_hash", "model_hash", "models", "base", "weighting", "cohort", "ranks", "dp", "deadlines"),
    "halvings",
}


def test_the_json_has_the_keys_of_the_specification_and_no_others():
    assert {x.name for x in fields(Params)} == KEYS
    assert set(json.loads(PARAMS.to_json())) == KEYS


def test_parameters_read_back_as_they_were():
    assert Params.from_json(PARAMS.to_json()) == PARAMS
    bare = replace(PARAMS, clip="", ranks=(), dp={}, deadlines={}, halvings=())
    assert Params.from_json(bare.to_json()) == bare
    assert PARAMS.to_json() == canonical(json.loads(PARAMS.to_json()))


def test_the_digest_is_of_the_canonical_json():
    assert PARAMS.ctx == digest("ctx", PARAMS.to_json())
    assert replace(PARAMS, attempt=1).ctx != PARAMS.ctx


@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_key_changes_the_digest(key):
    value = json.loads(PARAMS.to_json())
    value[key] = {"x": "y"}
    assert digest("ctx", canonical(value)) != PARAMS.ctx


def test_ids_are_the_cohort_as_bytes_and_ranks_go_along():
    assert PARAMS.ids == tuple(bytes.fromhex(x) for x in IDS)
    assert PARAMS.rank_by_id == dict(zip(PARAMS.ids, (4, 16, 4, 16, 16), strict=True))
    assert replace(PARAMS, ranks=()).rank_by_id == {}


def test_models_are_hashed_in_order_of_their_ranks_as_numbers():
    want = digest("models", bytes([0, 0, 0, 4]) + b"\xcd" * 32, bytes([0, 0, 0, 16]) + b"\xab" * 32)
    assert hash_models(MODELS) == want
    assert hash_models(dict(reversed(MODELS.items()))) == want


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (4.0, "4"),
        (0.5, "0.5"),
        (1e-5, "0.00001"),
        (1e16, "10000000000000000"),
        (0, "0"),
        (1000, "1000"),
        (0.1 + 0.2, "0.30000000000000004"),
        (100.0, "100"),
    ],
)
def test_numbers_are_written_as_the_shortest_decimal_without_an_exponent(value, said):
    assert decimal(value) == said
    assert float(said) == value
    assert is_decimal(said)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), -0.001, 1e40, 1e-80])
def test_numbers_that_parameters_can_not_hold_are_refused(value):
    with pytest.raises(ValueError, match=f"^got {re.escape(str(value))}; want a number that is not negative"):
        decimal(value)


@given(value=st.floats(1e-15, 1e15))
@settings(max_examples=100, deadline=None)
def test_a_decimal_is_read_back_as_the_same_number(value):
    assert float(decimal(value)) == value
    assert is_decimal(decimal(value))


@pytest.mark.parametrize("said", ["", "-1", "+1", "1.", ".5", "01", "1e3", "nan", "inf", " 1", "1 ", "1\n", "٣", "1_0"])
def test_what_can_be_written_otherwise_is_no_decimal(said):
    assert not is_decimal(said)


BIG = 1 << 31


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("v", True, "params.v: got True; want a whole number from 0 to"),
        ("v", "1", "params.v: got '1'"),
        ("v", None, "params.v: got None"),
        ("suite", 5, "params.suite: got 5; want printable text"),
        ("suite", "x" * 513, "params.suite: got"),
        ("suite", "full\n", "params.suite: got 'full\\n'; want printable text"),
        ("consistency", 1, "params.consistency: got 1; want true or false"),
        ("run_id", [], "params.run_id: got a list of 0"),
        ("fl_round", -1, "params.fl_round: got -1; want a whole number from 0"),
        ("fl_round", BIG, f"params.fl_round: got {BIG}"),
        ("attempt", 2**200, "params.attempt: got a whole number of 201 bits"),
        ("session", "00" * 15, "params.session: got '000000000000000000000000000000'; want 32 characters of lowercase"),
        ("session", "AB" * 16, "params.session: got"),
        ("n", 0, "params.n: got 0; want a whole number from 1 to 65535"),
        ("n", 65536, "params.n: got 65536"),
        ("t", 0, "params.t: got 0; want a whole number from 1"),
        ("k", -1, "params.k: got -1; want a whole number from 0"),
        ("m", 33, "params.m: got 33; want a whole number from 1 to 32"),
        ("bits", 1, "params.bits: got 1; want a whole number from 2 to 32"),
        ("bits", 33, "params.bits: got 33"),
        ("range", 4, "params.range: got 4; want a decimal string"),
        ("range", "", "params.range: got ''; want a decimal string"),
        ("range", "4e0", "params.range: got '4e0'"),
        ("clip", None, "params.clip: got None; want a decimal string"),
        ("clip", "-1", "params.clip: got '-1'"),
        ("weighting", "", "params.weighting: got ''"),
        ("weighting", "NaN", "params.weighting: got 'NaN'"),
        ("dims", 5, "params.dims: got 5; want a list"),
        ("dims", [0], "params.dims[0]: got 0; want a whole number from 1"),
        ("dims", [5, BIG], f"params.dims[1]: got {BIG}"),
        ("dims", [1] * 256, "params.dims: got 256 entries; want at most 255"),
        ("layout_hash", "", "params.layout_hash: got ''; want 64 characters of lowercase hex"),
        ("model_hash", "zz" * 32, "params.model_hash: got"),
        ("models", [], "params.models: got a list of 0; want an object"),
        ("models", {"04": "ab" * 32}, "params.models.'04': no rank"),
        ("models", {"-4": "ab" * 32}, "params.models.'-4': no rank"),
        ("models", {str(BIG): "ab" * 32}, f"params.models.'{BIG}': no rank"),
        ("models", {"4": "ab"}, "params.models.'4': got 'ab'; want 64"),
        ("models", {str(i): "ab" * 32 for i in range(1025)}, "params.models: got 1,025 entries; want at most 1,024"),
        ("base", {}, "params.base: got an object of 0"),
        ("cohort", "ab", "params.cohort: got 'ab'; want a list"),
        ("cohort", [*IDS[:-1], IDS[-1].upper()], "params.cohort[4]: got"),
        ("cohort", [*IDS[:-1], 5], "params.cohort[4]: got 5"),
        ("cohort", [[]] * 65536, "params.cohort: got 65,536 entries; want at most 65,535"),
        ("ranks", [4, -1], "params.ranks[1]: got -1"),
        ("ranks", [False], "params.ranks[0]: got False"),
        ("ranks", [1] * 65536, "params.ranks: got 65,536 entries"),
        ("dp", [], "params.dp: got a list of 0"),
        ("dp", {"x": None}, "params.dp.'x': got None; want printable text"),
        ("dp", {"x": -1}, "params.dp.'x': got -1; want a whole number"),
        ("dp", {"x\n": "1"}, "params.dp.'x\\n', the key: got 'x\\n'; want printable text"),
        ("dp", {str(i): "1" for i in range(1025)}, "params.dp: got 1,025 entries"),
        ("deadlines", {"x": "1"}, "params.deadlines.'x': got '1'; want a whole number"),
        ("deadlines", {"\x00": 1}, "the key: got"),
        ("deadlines", {str(i): 1 for i in range(1025)}, "params.deadlines: got 1,025 entries"),
        ("halvings", 3, "params.halvings: got 3; want a list"),
        ("halvings", [3], "params.halvings[0]: got 3; want a list"),
        ("halvings", [[], [4, -1]], "params.halvings[1][1]: got -1; want a whole number from 0 to"),
        ("halvings", [[True]], "params.halvings[0][0]: got True"),
        ("halvings", [[BIG]], f"params.halvings[0][0]: got {BIG}"),
        ("halvings", [[]] * 256, "params.halvings: got 256 entries; want at most 255"),
        ("halvings", [[0] * 65537], "params.halvings[0]: got 65,537 entries; want at most 65,536"),
        ("extra", 1, "params.'extra': no such key; want v, suite,"),
    ],
)
def test_every_value_that_is_not_wanted_is_refused_with_its_key(key, value, message):
    with pytest.raises(ProtocolError, match=r"^params") as error:
        Params.from_json(canonical(json.loads(PARAMS.to_json()) | {key: value}))
    assert message in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_key_must_be_there(key):
    value = json.loads(PARAMS.to_json())
    del value[key]
    with pytest.raises(ProtocolError, match=rf"^params\.{key}: is missing; want v, suite"):
        Params.from_json(canonical(value))


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(json.loads(PARAMS.to_json()), sort_keys=True).encode(),
        json.dumps(dict(sorted(json.loads(PARAMS.to_json()).items(), reverse=True)), separators=(",", ":")).encode(),
        PARAMS.to_json().replace(b'"full"', b'"\\u0066ull"'),
        PARAMS.to_json() + b"\n",
        PARAMS.to_json().decode().encode("utf-16"),
    ],
)
def test_the_same_values_written_otherwise_are_refused_since_their_digest_would_differ(data):
    with pytest.raises(ProtocolError, match="params: the JSON is not canonical; want sorted keys, no spaces and ASCII"):
        Params.from_json(data)


@pytest.mark.parametrize("data", [b"", b"null", b"0", b'""', b"[]", b"{}", b"[" * 100_000, b"\xff", b"{" * 100_000])
def test_what_is_no_object_at_all_is_refused(data):
    with pytest.raises(ProtocolError, match=r"^params"):
        Params.from_json(data)


def test_parameters_of_more_than_16_mb_are_not_read():
    with pytest.raises(ProtocolError, match=r"^params: got 16,777,217 bytes; want at most 16,777,216$"):
        Params.from_json(b" " * ((16 << 20) + 1))


@given(at=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=300, deadline=None)
def test_no_change_of_a_byte_makes_anything_but_parameters_or_a_protocol_error(at, byte, cut):
    data = bytearray(PARAMS.to_json())
    at %= len(data)
    data[at] = byte
    changed = bytes(data[:at] if cut else data)
    try:
        made = Params.from_json(changed)
    except ProtocolError:
        return
    assert made.to_json() == changed
