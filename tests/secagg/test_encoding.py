import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import ProtocolError
from fedpeft.secagg.encoding import V, canonical, derive_key, digest, lp, parts

LISTS = st.lists(st.binary(max_size=40), max_size=9)


def test_every_hash_and_key_begins_with_the_protocols_version():
    assert V == b"fedpeft-sa/1/"


def test_a_length_is_four_bytes_before_its_part():
    assert lp(b"ab", b"", b"c" * 258) == b"\0\0\0\2ab\0\0\0\0\0\0\1\2" + b"c" * 258
    assert lp() == b""


@settings(deadline=None, derandomize=True, database=None)
@given(LISTS)
def test_parts_are_read_back(some):
    assert parts(lp(*some), len(some)) == some


@settings(deadline=None, derandomize=True, database=None)
@given(LISTS, LISTS)
def test_different_lists_never_have_the_same_bytes(one, other):
    assert (lp(*one) == lp(*other)) == (one == other)


def test_more_parts_than_wanted_are_refused():
    assert parts(lp(b"a", b"b"), 2) == [b"a", b"b"]
    with pytest.raises(ProtocolError, match="more than 1 parts"):
        parts(lp(b"a", b"b"), 1)
    with pytest.raises(ProtocolError, match="more than 0 parts"):
        parts(lp(b""), 0)


def test_a_list_without_end_is_refused_before_it_is_read():
    with pytest.raises(ProtocolError, match="more than 3 parts"):
        parts(bytes(4_000_000), 3)


@settings(deadline=None, derandomize=True, database=None)
@given(LISTS.filter(bool), st.data())
def test_a_cut_message_is_refused_unless_the_cut_is_between_parts(some, data):
    whole = lp(*some)
    cut = data.draw(st.integers(0, len(whole) - 1))
    between = {len(lp(*some[:i])): some[:i] for i in range(len(some))}
    if cut in between:
        assert parts(whole[:cut], len(some)) == between[cut]
    else:
        with pytest.raises(ProtocolError, match=f"of {cut} bytes ends within part"):
            parts(whole[:cut], len(some))


@settings(deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=64))
def test_bytes_of_a_stranger_are_read_or_refused(data):
    try:
        found = parts(data, 100)
    except ProtocolError:
        return
    assert lp(*found) == data


def test_digest_has_its_golden_value():
    want = "569ddf3cb55a5fa9e60a3e55b384de381d974420ee50273cebb4aa31299cef1c"
    assert digest("ctx", b"{}").hex() == want


def test_digest_is_sha256_of_version_label_and_parts():
    whole = b"fedpeft-sa/1/U3\0" + b"\0\0\0\1a" + b"\0\0\0\2bc"
    assert digest("U3", b"a", b"bc") == hashlib.sha256(whole).digest()
    assert digest("U3", b"ab", b"c") != digest("U3", b"a", b"bc")


def test_mask_key_has_its_golden_value():
    shared = X25519PrivateKey.from_private_bytes(b"\1" * 32).exchange(
        X25519PrivateKey.from_private_bytes(b"\2" * 32).public_key()
    )
    assert shared.hex() == "2ed76ab549b1e73c031eb49c9448f0798aea81b698279a0c3dc3e49fbfc4b953"
    key = derive_key(shared, bytes(32), b"mask" + b"\xaa" * 32 + b"\xbb" * 32)
    assert key.hex() == "859cad40d576a789d759f1224987ce1713843461bfecba0fd72842844888ed03"


@settings(deadline=None, derandomize=True, database=None)
@given(st.binary(min_size=1, max_size=64), st.binary(max_size=64), st.binary(max_size=80))
def test_a_key_is_one_block_of_hkdf(secret, salt, info):
    extracted = hmac.digest(salt, secret, "sha256")
    assert derive_key(secret, salt, info) == hmac.digest(extracted, b"fedpeft-sa/1/" + info + b"\1", "sha256")


def test_canonical_json_has_sorted_keys_no_spaces_and_ascii_only():
    value = {"b": [1, -2, None, True, False], "a": {"z": "é", "": ("x", {})}, "B": "1.50"}
    want = b'{"B":"1.50","a":{"":["x",{}],"z":"\\u00e9"},"b":[1,-2,null,true,false]}'
    assert canonical(value) == want


@pytest.mark.parametrize("value", [0.5, float("nan"), {"a": [1, {"b": 1.0}]}, [1.0], b"x", {"a": {1}}, object()])
def test_canonical_json_refuses_fractions_and_what_json_has_not(value):
    with pytest.raises(ValueError, match="write a fraction as a decimal string"):
        canonical(value)


@pytest.mark.parametrize("value", [{1: "a"}, {"a": [{None: 1}]}])
def test_canonical_json_refuses_keys_that_are_no_strings(value):
    with pytest.raises(ValueError, match="canonical JSON takes strings"):
        canonical(value)
