"""A vector by tensors: what is coded and what isn't, what zeros cost, and streams that nobody wrote."""

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.adapters import Layout
from fedpeft.channel import CODECS, Coded, Coding, TopK
from fedpeft.channel.blocks import LEAST, LEVEL
from fedpeft.channel.codecs import Steps
from fedpeft.errors import ProtocolError

LAYOUT = Layout(
    (("q/a", (8, 40)), ("bias", (255,)), ("q/b", (96, 8)), ("scale", ()), ("head", (3, 12, 11)), ("wide", (256,)))
)
BEHIND = 7
EVERY = {**CODECS, "topk": TopK()}
each = pytest.mark.parametrize("codec", EVERY.values(), ids=EVERY)


def vector(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=LAYOUT.size + BEHIND).astype(np.float32)


def inflated(coded: Coded) -> bytes:
    return zstandard.ZstdDecompressor().decompress(coded.codes)


def deflated(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


@each
def test_large_tensors_are_coded_each_by_itself_and_the_rest_travels_as_it_is(codec):
    x, coding = vector(), Coding(codec, LAYOUT)
    places = {n: (at, int(np.prod(shape))) for n, (at, shape) in LAYOUT.places.items()}
    large = {n: slice(at, at + size) for n, (at, size) in places.items() if n in ("q/a", "q/b", "head", "wide")}
    assert LEAST == 256
    assert coding.places == large
    assert coding.behind == 255 + 1
    coded = coding.encode(x, np.random.default_rng(3))
    got = coding.decode(coded)
    rng = np.random.default_rng(3)
    for where in large.values():
        size = where.stop - where.start
        np.testing.assert_array_equal(got[where], codec.decode(codec.encode(x[where], rng), size))
    small = [slice(at, at + size) for n, (at, size) in places.items() if n not in large]
    rest = np.concatenate([x[small[0]], x[small[1]], x[LAYOUT.size :]])
    np.testing.assert_array_equal(coded.rest, rest)
    np.testing.assert_array_equal(np.concatenate([got[small[0]], got[small[1]], got[LAYOUT.size :]]), rest)
    assert (got.dtype, coded.rest.dtype, got.shape) == (np.float32, np.float32, x.shape)


def test_the_stream_is_rows_and_columns_that_hold_something_and_the_codes():
    layout, codec = Layout((("x", (30, 20)),)), Steps(8)
    x = np.zeros((30, 20), np.float32)
    x[2:9, 3:20] = np.random.default_rng(1).normal(size=(7, 17))
    rows, columns = np.packbits((x != 0).any(1)), np.packbits((x != 0).any(0))
    coded = Coding(codec, layout).encode(x.ravel(), None)
    assert inflated(coded) == rows.tobytes() + columns.tobytes() + codec.encode(x[2:9, 3:20].ravel(), None)
    got = Coding(codec, layout).decode(coded).reshape(30, 20)
    np.testing.assert_array_equal(got[2:9, 3:20].ravel(), codec.decode(codec.encode(x[2:9, 3:20].ravel(), None), 119))
    assert not got[:2].any()
    assert not got[9:].any()
    assert not got[:, :3].any()
    assert Coding(codec, layout).most == 4 + 3 + codec.length(600)
    assert len(inflated(Coding(codec, layout).encode(np.ones(600), None))) == 7 + codec.length(600)


@each
def test_directions_that_are_not_trained_hardly_take_room_and_stay_zero(codec):
    layout = Layout((("q/a", (32, 400)), ("q/b", (300, 32))))
    rng = np.random.default_rng(4)
    a, b = np.zeros((32, 400)), np.zeros((300, 32))
    a[:2], b[:, :2] = rng.normal(size=(2, 400)), rng.normal(size=(300, 2))
    x = layout.flatten({"q/a": a, "q/b": b})
    coding = Coding(codec, layout)
    coded = coding.encode(x, rng)
    assert (x.dtype, coded.rest.dtype) == (np.float64, np.float32)
    got = layout.unflatten(coding.decode(coded))
    assert not got["q/a"][2:].any()
    assert not got["q/b"][:, 2:].any()
    own = Coding(codec, Layout((("q/a", (2, 400)), ("q/b", (300, 2)))))
    alone = own.encode(own.layout.flatten({"q/a": a[:2], "q/b": b[:, :2]}), rng)
    assert len(coded.codes) <= len(alone.codes) + 60
    nothing = coding.encode(np.zeros(layout.size), rng)
    assert len(nothing.codes) < 40
    assert not coding.decode(nothing).any()


def test_a_layout_without_large_tensors_has_nothing_to_code():
    coding = Coding(Steps(4), Layout((("a", (5, 51)), ("b", (0,)))))
    assert (coding.places, coding.behind, coding.most) == ({}, 255, 0)
    x = np.arange(257, dtype=np.float32)
    coded = coding.encode(x, None)
    np.testing.assert_array_equal(coding.decode(coded), x)
    assert inflated(coded) == b""


def test_what_compresses_well_is_compressed_well():
    coding = Coding(Steps(2), Layout((("x", (100, 640)),)))
    x = np.random.default_rng(2).normal(size=64000)
    x[::64] *= 30  # most codes are zero then
    coded = coding.encode(x, np.random.default_rng(1))
    assert len(coded.codes) < 0.5 * coding.most
    assert LEVEL == 10
    assert coded.codes == zstandard.ZstdCompressor(level=10).compress(inflated(coded))


def test_vectors_that_are_too_short_or_not_finite_are_refused():
    coding = Coding(Steps(4), LAYOUT)
    assert len(coding.decode(coding.encode(vector()[: LAYOUT.size], None))) == LAYOUT.size
    with pytest.raises(ValueError, match=f"x: got {LAYOUT.size - 1} numbers; want at least {LAYOUT.size}, none of th"):
        coding.encode(vector()[: LAYOUT.size - 1], None)
    for bad in (np.nan, np.inf):
        x = vector()
        x[5] = bad
        with pytest.raises(ValueError, match=f"x: got {len(x)} numbers; want at least {LAYOUT.size}, none of them NaN"):
            coding.encode(x, None)


def test_numbers_beside_the_codes_may_not_be_too_few():
    coding = Coding(Steps(4), LAYOUT)
    coded = coding.encode(vector()[: LAYOUT.size], None)
    with pytest.raises(ProtocolError, match="255 numbers came beside the codes; want at least 256"):
        coding.decode(Coded(coded.codes, coded.rest[:-1]))


def test_streams_that_nobody_wrote_are_refused():
    coding = Coding(Steps(4), Layout((("x", (30, 20)),)))
    coded = coding.encode(np.ones(600), None)
    content, none = inflated(coded), np.zeros(0, np.float32)
    assert len(content) == coding.most
    for bad, why in (
        (deflated(content[:-1]), "the codes end 1 bytes too soon"),
        (deflated(content[:3]), "the codes end 1 bytes too soon"),
        (deflated(content[:6]), "the codes end 1 bytes too soon"),
        (deflated(content + b"\0"), f"the codes take {coding.most + 1} bytes; want at most {coding.most}"),
        (deflated(b"\0" * 8), "1 bytes stand behind the codes"),
        (
            deflated(b"\1" + b"\0" * 3 + b"\xff" * 2 + b"\xf1" + content[7:]),
            "something stands behind a mask of 20 bits",
        ),
        (deflated(content[:3] + b"\xff" + content[4:]), "something stands behind a mask of 30 bits; want zeros there"),
        (coded.codes[:-1], "the codes are not compressed as they should be"),
        (coded.codes + b"x", "the codes are not compressed as they should be"),
        (coded.codes + coded.codes, "the codes are not compressed as they should be"),
        (b"", "the codes are not compressed as they should be"),
        (b"\0" * 20, "the codes are not compressed as they should be"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(content), "the codes take 18446744073709551615"),
    ):
        with pytest.raises(ProtocolError, match=f"^{why}"):
            coding.decode(Coded(bad, none))


def test_a_small_message_can_not_ask_for_much_memory():
    coding = Coding(Steps(4), Layout((("x", (30, 20)),)))
    bomb = deflated(bytes(1 << 28))
    assert len(bomb) < 1 << 15
    with pytest.raises(ProtocolError, match=f"the codes take {1 << 28} bytes; want at most {coding.most}"):
        coding.decode(Coded(bomb, np.zeros(0, np.float32)))


@given(name=st.sampled_from(sorted(EVERY)), data=st.data())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_no_stream_gives_anything_but_a_vector_or_a_protocol_error(name, data):
    coding = Coding(EVERY[name], LAYOUT)
    coded = coding.encode(vector(), np.random.default_rng(1))
    content = bytearray(coded.codes if (is_outer := data.draw(st.booleans())) else inflated(coded))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3))
    content = content[: len(content) - cut]
    try:
        got = coding.decode(Coded(bytes(content) if is_outer else deflated(bytes(content)), coded.rest))
    except ProtocolError:
        return
    assert got.shape == (LAYOUT.size + BEHIND,)
