"""JSON from somebody hostile: one reading, or an error that names the field."""

import pytest

from fedpeft.errors import ProtocolError
from fedpeft.secagg.strict import Fields, hexed, parse, shown, text, whole


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"a":1,"a":1}',
        b'{"a":{"b":1,"b":2}}',
        b'{"a":1.5}',
        b'{"a":1e3}',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b"[" * 200_000,
        b"9" * 5000,
        b"\xff\xfe\xfd",
        b'{"a":1} x',
    ],
)
def test_what_has_no_single_reading_is_refused(data):
    with pytest.raises(ProtocolError, match=r"^it: not the JSON that is wanted: ") as error:
        parse(data, 1 << 20, "it")
    assert len(str(error.value)) < 300


def test_what_is_well_formed_is_read():
    assert parse(b'{"a":[1,-2,"x",null,true]}', 26, "it") == {"a": [1, -2, "x", None, True]}
    assert parse("[]", 2, "it") == []


def test_what_is_too_large_is_not_even_read():
    with pytest.raises(ProtocolError, match=r"^it: got 1,001 bytes; want at most 1,000$"):
        parse(b"[" * 1001, 1000, "it")


@pytest.mark.parametrize("value", [1, 0, 3])
def test_whole_numbers_are_taken_with_both_ends(value):
    assert whole(value, 0, 3, "x") == value


@pytest.mark.parametrize("value", [-1, 4, True, False, "1", None, 1.0, [], {}])
def test_what_is_no_whole_number_in_range_is_refused(value):
    with pytest.raises(ProtocolError, match=r"^x: got .*; want a whole number from 0 to 3$"):
        whole(value, 0, 3, "x")


@pytest.mark.parametrize("value", [None, 1, "four", "a\n", "\ud800", ["a"]])
def test_what_is_no_short_printable_text_is_refused(value):
    with pytest.raises(ProtocolError, match=r"^x: got .*; want printable text of at most 3 characters$"):
        text(value, 3, "x")
    assert text("abc", 3, "x") == "abc"


@pytest.mark.parametrize("value", ["", "0", "00112", "0011g2", "AABB", "0x11", " 011", b"0011", None, "００11"])
def test_what_is_no_lowercase_hex_of_the_size_is_refused(value):
    with pytest.raises(ProtocolError, match=r"^x: got .*; want 4 characters of lowercase hex$"):
        hexed(value, 2, "x")
    assert hexed("0f1a", 2, "x") == "0f1a"


def test_an_object_has_exactly_the_keys_that_are_wanted():
    assert Fields.of({"a": 1, "b": False}, "it", ("a", "b")).flag("b") is False
    for value, message in (
        ([], "it: got a list of 0; want an object"),
        ({"a": 1}, "it.b: is missing; want a, b"),
        ({"a": 1, "b": 2, "c": 3}, "it.'c': no such key; want a, b"),
    ):
        with pytest.raises(ProtocolError) as error:
            Fields.of(value, "it", ("a", "b"))
        assert str(error.value) == message


def test_lists_and_objects_are_bounded_before_they_are_read():
    found = Fields.of({"a": [1, 2, 3], "b": {"x": 1, "y": 2}}, "it", ("a", "b"))
    assert found.array("a", 3, lambda x, name: (x, name)) == ((1, "it.a[0]"), (2, "it.a[1]"), (3, "it.a[2]"))
    assert found.table("b", 2, lambda k, x, name: (k, x, name)) == {
        "x": ("x", 1, "it.b.'x'"),
        "y": ("y", 2, "it.b.'y'"),
    }
    with pytest.raises(ProtocolError, match=r"^it\.a: got 3 entries; want at most 2$"):
        found.array("a", 2, lambda x, name: x)
    with pytest.raises(ProtocolError, match=r"^it\.b: got 2 entries; want at most 1$"):
        found.table("b", 1, lambda k, x, name: x)
    with pytest.raises(ProtocolError, match=r"^it\.b: got an object of 2; want a list$"):
        found.array("b", 2, lambda x, name: x)
    with pytest.raises(ProtocolError, match=r"^it\.a: got a list of 3; want an object$"):
        found.table("a", 3, lambda k, x, name: x)
    with pytest.raises(ProtocolError, match=r"^it\.a: got a list of 3; want true or false$"):
        found.flag("a")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("x" * 100, "'" + "x" * 59 + "…"),
        (1 << 200, "a whole number of 201 bits"),
        (["a"] * 1000, "a list of 1,000"),
        ({"a": 1}, "an object of 1"),
        ("\n\u202e", "'\\n\\u202e'"),
        (None, "None"),
    ],
)
def test_a_wrong_value_is_repeated_briefly_and_on_one_line(value, said):
    assert shown(value) == said
