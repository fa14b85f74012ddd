"""Each codec against the same numbers worked out one by one, its error, its mean, and bytes that nobody wrote."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.channel.codecs import BLOCK, CODECS, Bfloat16, Codec, Sign, Steps, TopK
from fedpeft.errors import ProtocolError

EVERY = {**CODECS, "topk": TopK(0.1), "topk of int4": TopK(0.3, Steps(4)), "topk of bf16": TopK(0.5, Bfloat16())}
SIZES = (1, 7, 63, 64, 65, 300)
each = pytest.mark.parametrize("codec", EVERY.values(), ids=EVERY)


def numbers(size: int, seed: int = 1, unit: float = 1e-3) -> np.ndarray:
    """Of both signs, a zero among them, and blocks of very different size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=size) * unit * 10.0 ** rng.integers(-2, 3, size=-(-size // 64)).repeat(64)[:size]
    if size > 1:
        x[size // 2] = 0
    return x.astype(np.float32)


def scale_of(largest: float, top: float) -> float:
    """A block's scale, by hand: the share of the tensor's largest in fp16, rounded up, times that in fp32."""
    share = np.float16(largest / top) if top else np.float16(0)
    if float(share) < largest / top if top else False:
        share = np.frombuffer((share.view(np.uint16) + 1).astype("<u2").tobytes(), np.float16)[0]
    return float(np.float32(share) * np.float32(top))


def blocks(x: np.ndarray) -> list[list[float]]:
    return [[float(v) for v in x[i : i + 64]] for i in range(0, len(x), 64)]


def scales_of(sizes: list[float]) -> list[float]:
    return [scale_of(s, max(sizes)) for s in sizes]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7), (2, 1)])
def test_steps_are_the_nearest_of_their_block_without_chance(bits, most, size):
    x = numbers(size)
    scales = scales_of([max(abs(v) for v in b) for b in blocks(x)])
    want = [round(v / s * most) / most * s for b, s in zip(blocks(x), scales, strict=True) for v in b]
    got = Steps(bits).decode(Steps(bits).encode(x, None), size)
    np.testing.assert_allclose(got, want, rtol=3e-7)  # products of fp32
    assert got.dtype == np.float32
    for b, s, y in zip(blocks(x), scales, np.split(got, range(64, size, 64)), strict=True):
        assert np.abs(np.array(b) - y).max() <= s / most / 2 * (1 + 1e-6)
        assert max(map(abs, b)) <= s * (1 + 1e-6) <= max(map(abs, b)) * (1 + 2**-10 + 1e-6)


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7), (2, 1)])
def test_steps_with_chance_are_one_of_the_two_beside_a_number_and_right_on_average(bits, most):
    x, codec, n = numbers(130, seed=3), Steps(bits), 4000
    scales = np.repeat(scales_of([max(abs(v) for v in b) for b in blocks(x)]), 64)[:130]
    rng = np.random.default_rng(5)
    total, step = np.zeros(130), scales / most
    for _ in range(n):
        y = codec.decode(codec.encode(x, rng), 130).astype(np.float64)
        assert (np.abs(y - x) < step * (1 + 1e-6)).all()
        total += y
    # A rounding has a deviation of at most half a step; 5 of the mean's, for 130 numbers: one run in 10 000 fails.
    assert (np.abs(total / n - x) <= 5 * step / 2 / n**0.5).all()
    # A number that is not on the grid is sometimes rounded up and sometimes down.
    some = {float(codec.decode(codec.encode(x, rng), 130)[5]) for _ in range(200)}
    assert len(some) == 2
    assert codec.encode(x, np.random.default_rng(8)) == codec.encode(x, np.random.default_rng(8))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_bytes_of_steps_are_the_largest_the_shares_and_the_codes_lowest_bits_first(bits):
    most = {8: 127, 4: 7, 2: 1}[bits]
    x = np.zeros(66, np.float32)
    x[0], x[1], x[64], x[65] = 2.0, -2.0, 0.5, -0.5
    codes = [2 * most, 0, *[most] * 62, 2 * most, 0]
    whole = sum(c << bits * i for i, c in enumerate(codes))
    want = struct.pack("<f2e", 2.0, 1.0, 0.25) + whole.to_bytes(-(-66 * bits // 8), "little")
    assert Steps(bits).encode(x, None) == want
    assert len(want) == Steps(bits).length(66)
    np.testing.assert_array_equal(Steps(bits).decode(want, 66), x)
    np.testing.assert_array_equal(Steps(bits).decode(Steps(bits).encode(x, np.random.default_rng(1)), 66), x)


class Drawn:
    """Draws this, again and again."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self, shape):
        return np.full(shape, self.number)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-53])
def test_the_largest_of_a_block_stays_whatever_is_drawn(bits, drawn):
    x = np.random.default_rng(6).normal(size=64 * 500).astype(np.float32)
    largest = np.abs(x).reshape(-1, 64).argmax(axis=1) + 64 * np.arange(500)
    got = Steps(bits).decode(Steps(bits).encode(x, Drawn(drawn)), len(x))
    most = {8: 127, 4: 7, 2: 1}[bits]
    top = np.abs(x).max()
    step = np.float32([scale_of(abs(v), top) for v in x[largest]]) / most
    # It is at the end of its grid, or one step before it where its scale was rounded up and 0 or 1 drawn.
    assert (np.abs(got[largest] - x[largest]) <= step * (1 + 1e-6)).all()
    whole = x[np.abs(x).argmax()]
    assert abs(got[np.abs(x).argmax()] - whole) <= (step.max() if whole < 0 else 0) * (1 + 1e-6)
    only = np.array([1.0, -1.0], np.float32)
    np.testing.assert_array_equal(Steps(bits).decode(Steps(bits).encode(only, Drawn(drawn)), 2)[0], 1)


def test_no_scale_is_smaller_than_its_blocks_largest():
    rng = np.random.default_rng(9)
    for _ in range(200):
        # A number whose share is a little more than what fp16 can tell, and no more than that to fp32.
        top = np.float32(1 + rng.random())
        share = float(np.float16(0.5 + rng.random() / 2))
        largest = np.nextafter(np.float32(share * float(top)), np.float32(9))
        x = np.repeat([top, largest], 64)
        for bits in (8, 4, 2):
            got = Steps(bits).decode(Steps(bits).encode(x, None), 128)
            assert got[64] >= largest
            assert got[0] == top


def test_there_are_steps_in_two_four_and_eight_bits_alone():
    for bits in (0, 1, 3, 5, 6, 7, 9, 16):
        with pytest.raises(ValueError, match=f"bits: got {bits}; want 2, 4 or 8"):
            Steps(bits)


@pytest.mark.parametrize("size", SIZES)
def test_a_sign_stands_for_the_mean_size_of_its_block(size):
    x = numbers(size)
    means = [float(np.float32(sum(map(abs, b)) / len(b))) for b in blocks(x)]
    want = [s if v >= 0 else -s for b, s in zip(blocks(x), scales_of(means), strict=True) for v in b]
    np.testing.assert_allclose(Sign().decode(Sign().encode(x, None), size), want, rtol=3e-7)


def test_the_bytes_of_signs_are_the_largest_mean_the_shares_and_a_bit_each():
    x = np.full(70, -1.0, np.float32)
    x[[0, 9, 65]] = 1.0
    x[64:] *= 0.5
    bits = (1 << 0 | 1 << 9 | 1 << 65).to_bytes(9, "little")
    assert Sign().encode(x, None) == struct.pack("<f2e", 1.0, 1.0, 0.5) + bits
    assert Sign().length(70) == 4 + 4 + 9
    np.testing.assert_array_equal(Sign().decode(Sign().encode(x, None), 70), x)
    zeros = np.zeros(3, np.float32)
    np.testing.assert_array_equal(Sign().decode(Sign().encode(zeros, None), 3), zeros)
    one = Sign().encode(np.array([0.0, -2.0], np.float32), None)  # zero comes back as plus
    np.testing.assert_array_equal(Sign().decode(one, 2), np.array([1, -1], np.float32))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_topk_sends_the_largest_by_size_and_the_rest_is_zero(size, share):
    x = numbers(size)
    codec = TopK(share, Bfloat16())
    count = int(np.ceil(share * size))
    assert codec.count(size) == count
    got = codec.decode(codec.encode(x, None), size)
    there = sorted(range(size), key=lambda i: -abs(x[i]))[:count]
    want = np.zeros(size, np.float32)
    want[there] = Bfloat16().decode(Bfloat16().encode(x[there], None), count)
    np.testing.assert_array_equal(got, want)
    assert len(codec.encode(x, None)) == codec.length(size) == -(-size // 8) + 2 * count


def test_the_bytes_of_topk_are_a_bit_each_and_the_values_in_order():
    x = np.array([1.0, -4.0, 0.5, 3.0, 0, 0, 0, 0, 0, 2.0], np.float32)
    codec = TopK(0.3, Steps(8))
    want = (1 << 1 | 1 << 3 | 1 << 9).to_bytes(2, "little") + Steps(8).encode(np.float32([-4, 3, 2]), None)
    assert codec.encode(x, None) == want
    many = TopK(0.5).encode(numbers(600), np.random.default_rng(2))
    assert many == TopK(0.5).encode(numbers(600), np.random.default_rng(2)) != TopK(0.5).encode(numbers(600), None)


def test_topk_is_a_tenth_in_int8_if_nothing_is_said_and_refuses_what_can_not_be():
    assert (TopK().share, TopK().values) == (0.1, Steps(8))
    assert TopK(1.0).share == 1
    for share in (0.0, -0.1, 1.01):
        with pytest.raises(ValueError, match=f"share: got {share}; want more than 0 and at most 1"):
            TopK(share)
    for values in (Sign(), TopK()):
        with pytest.raises(ValueError, match=r"values: got .*; want a codec that is right in expectation"):
            TopK(0.1, values)


@pytest.mark.parametrize("high", [0x3F80, 0x3F81, 0x3FFF, 0xBF80, 0xC0A5, 0x0000, 0x0001])
@pytest.mark.parametrize("low", [0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFF])
def test_bf16_is_the_nearest_number_whose_last_sixteen_bits_are_zero_ties_to_even(high, low):
    bits = high << 16 | low
    number = float(np.array([bits], np.uint32).view(np.float32)[0])
    below, above = bits >> 16, (bits >> 16) + 1
    rest = bits & 0xFFFF
    want = above if rest > 0x8000 or (rest == 0x8000 and below % 2) else below
    coded = Bfloat16().encode(np.array([number]), None)
    assert coded == struct.pack("<H", want)
    assert Bfloat16().decode(coded, 1).view(np.uint32).tolist() == [want << 16]


def test_bf16_is_off_by_a_256th_of_a_number_at_most():
    x = numbers(300)
    assert (np.abs(Bfloat16().decode(Bfloat16().encode(x, None), 300) - x) <= np.abs(x) / 256).all()
    assert Bfloat16().length(300) == len(Bfloat16().encode(x, None)) == 600


def test_which_codecs_leave_out_what_has_to_be_sent_later():
    assert {name for name, codec in EVERY.items() if codec.is_biased} == {n for n in EVERY if n[:4] in ("sign", "topk")}
    by_name = {"bf16": Bfloat16(), "int4": Steps(4), "int8": Steps(8), "sign": Sign(), "ternary": Steps(2)}
    assert dict(CODECS) == by_name
    assert {type(codec.is_biased) for codec in EVERY.values()} == {bool}
    assert BLOCK == 64
    sizes = {n: c.length(6400) for n, c in CODECS.items()}
    assert sizes == {"bf16": 12800, "int4": 3404, "int8": 6604, "sign": 1004, "ternary": 1804}


@each
@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_no_change_is_too_small_or_too_large(codec, unit):
    x = numbers(300).astype(np.float64) * unit
    at_one, here = (codec.decode(codec.encode(y, None), 300) for y in (numbers(300), x))
    np.testing.assert_allclose(here / unit, at_one, rtol=0.01, atol=1e-2 * np.abs(at_one).max())
    assert here.dtype == np.float32


@each
def test_zeros_stay_zeros_and_what_hardly_is_a_number_does_no_harm(codec):
    for size in SIZES:
        zeros = np.zeros(size, np.float32)
        for rng in (None, np.random.default_rng(1)):
            np.testing.assert_array_equal(np.abs(codec.decode(codec.encode(zeros, rng), size)), zeros)
    tiny = np.full(100, 1e-45, np.float32)
    tiny[:64] *= 3
    assert np.abs(codec.decode(codec.encode(tiny, None), 100)).max() < 1e-44


def test_a_block_beside_a_much_larger_one_keeps_what_fp16_can_tell_of_its_share():
    x = np.ones(192, np.float32)
    x[64:128], x[128:] = 2.0**-24, 2.0**-30  # the smallest share, and less: which is rounded up to it
    got = Steps(8).decode(Steps(8).encode(x, None), 192)
    np.testing.assert_array_equal(got[:128], x[:128])
    assert np.abs(got[128:] - 2.0**-30).max() <= 2.0**-24 / 127


@each
@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_always_as_many_and_others_are_refused(codec, size):
    coded = codec.encode(numbers(size), np.random.default_rng(2))
    assert len(coded) == codec.length(size)
    for wrong in (coded[:-1], coded + b"\0", b""):
        with pytest.raises(ProtocolError, match=f"^{size} numbers came in {len(wrong)} bytes; want {len(coded)}"):
            codec.decode(wrong, size)


@pytest.mark.parametrize("codec", [Steps(8), Steps(4), Steps(2), Sign()], ids=str)
@pytest.mark.parametrize(
    ("top", "share", "is_good"),
    [
        *((1.0, x, True) for x in (0.0, 0.5, 1.0)),
        *((1.0, x, False) for x in (-(2.0**-24), 1 + 2.0**-10, float("inf"), float("nan"))),
        *((x, 1.0, True) for x in (0.0, 3e38)),
        *((x, 1.0, False) for x in (-1e-30, float("inf"), float("nan"))),
    ],
)
def test_scales_that_nobody_writes_are_refused(codec, top, share, is_good):
    coded = codec.encode(np.ones(70, np.float32), None)
    for shares in ((share, 0.5), (0.5, share)):
        bad = struct.pack("<f2e", top, *shares) + coded[8:]
        if is_good:
            assert np.isfinite(codec.decode(bad, 70)).all()
        else:
            with pytest.raises(ProtocolError, match="a block's scale is negative, not finite, or more than the tens"):
                codec.decode(bad, 70)


@pytest.mark.parametrize(("bits", "over"), [(8, 255), (4, 15), (2, 3)])
def test_a_code_beyond_the_most_is_refused(bits, over):
    x = np.ones(64, np.float32)
    coded = bytearray(Steps(bits).encode(x, None))
    coded[20] |= over
    with pytest.raises(ProtocolError, match=f"a number has code {over}; want at most {over - 1} in {bits} bits"):
        Steps(bits).decode(bytes(coded), 64)


def test_bits_behind_the_last_number_and_another_count_are_refused():
    for codec, size in ((Steps(4), 65), (Steps(2), 65), (Sign(), 65), (TopK(0.1), 65)):
        coded = bytearray(codec.encode(numbers(size), None))
        at = 8 if isinstance(codec, TopK) else len(coded) - 1
        coded[at] |= 0x80
        with pytest.raises(ProtocolError, match="something stands behind the last of 65 numbers; want zeros there"):
            codec.decode(bytes(coded), size)
    coded = bytearray(TopK(0.25, Bfloat16()).encode(np.arange(8, dtype=np.float32), None))
    coded[0] |= 1
    with pytest.raises(ProtocolError, match="3 of 8 numbers came; want 2"):
        TopK(0.25, Bfloat16()).decode(bytes(coded), 8)


@given(name=st.sampled_from(sorted(EVERY)), size=st.integers(1, 200), data=st.data())
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_no_bytes_give_anything_but_numbers_or_a_protocol_error(name, size, data):
    codec: Codec = EVERY[name]
    coded = bytearray(codec.encode(numbers(size, data.draw(st.integers(0, 99))), None))
    for _ in range(data.draw(st.integers(1, 3))):
        coded[data.draw(st.integers(0, len(coded) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = codec.decode(bytes(coded), size)
    except ProtocolError:
        return
    assert got.shape == (size,)
    assert got.dtype == np.float32


@pytest.mark.parametrize("codec", [Steps(8), Steps(4), Sign()], ids=repr)
def test_numbers_are_coded_as_the_fp32_that_they_are_nearest_to(codec):
    x = np.concatenate([np.full(BLOCK, 1.0), np.full(BLOCK, 0.5 + 1e-9)])  # a share just above a half of fp16's
    assert codec.encode(x, None) == codec.encode(x.astype(np.float32), None)
