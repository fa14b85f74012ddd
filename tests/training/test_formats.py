"""Matrices in 8 or 4 bits are what their formats say, by formulas that share no code with them."""

from statistics import NormalDist

import numpy as np
import pytest

from fedpeft.training.formats import BLOCK, FORMATS, LEVELS, Packed, bits, pack, unpack

FOUR = ("nf4", "int4")
COLUMNS = (1, 2, 24, 63, 64, 65, 127, 130, 192)


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Both signs, rows of very different sizes."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns)) * np.geomspace(0.01, 3, rows)[:, None]).astype(np.float32)


def nibbles(packed: Packed) -> list[list[int]]:
    """The codes of each row, one by one."""
    each = [[half for byte in row for half in (int(byte) % 16, int(byte) // 16)] for row in packed.codes]
    return [row[: packed.columns] for row in each]


def blocks(columns: int) -> list[slice]:
    return [slice(i, min(i + 64, columns)) for i in range(0, columns, 64)]


def test_the_levels_of_nf4_are_the_papers_quantiles_of_a_normal_distribution():
    """Eight positive ones, and seven negative, of equally spaced probabilities up to 1 − (1/32 + 1/30)/2; and zero."""
    edge, ppf = 1 - (1 / 32 + 1 / 30) / 2, NormalDist().inv_cdf
    up = [ppf(x) for x in np.linspace(edge, 0.5, 9)[:-1]]
    down = [-ppf(x) for x in np.linspace(edge, 0.5, 8)[:-1]]
    want = np.array(sorted([*up, *down, 0.0])) / max(up)
    # the published table was made in fp32, and its edge rounded to 0.9677083
    np.testing.assert_allclose(LEVELS["nf4"], want, atol=5e-7)


def test_the_levels_of_int4_are_integers_in_twos_complement():
    assert LEVELS["int4"] == tuple(float(i if i < 8 else i - 16) for i in range(16))


@pytest.mark.parametrize("columns", COLUMNS)
def test_int8_has_a_scale_for_each_row_and_the_nearest_of_255_numbers(columns):
    w = matrix(5, columns)
    p = pack(w, "int8")
    assert (p.codes.dtype, p.codes.shape, p.scales.dtype, p.scales.shape) == (np.int8, w.shape, np.float32, (5,))
    for row, codes, scale in zip(w.astype(np.float64), p.codes, p.scales, strict=True):
        assert scale == pytest.approx(max(abs(row)) / 127, rel=1e-6)
        choices = np.arange(-127, 128) * float(scale)
        best = np.abs(row[:, None] - choices).min(axis=1)
        np.testing.assert_allclose(np.abs(row - codes * float(scale)), best, atol=1e-6 * scale)
        assert 127 in np.abs(codes.astype(int))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("format", FOUR)
def test_four_bits_are_the_nearest_level_times_the_scale_of_a_block_of_64(format, columns):
    w = matrix(5, columns)
    p = pack(w, format)
    count = len(blocks(columns))
    assert (p.codes.dtype, p.codes.shape) == (np.uint8, (5, (columns + 1) // 2))
    assert (p.scales.dtype, p.scales.shape) == (np.float16, (5, count))
    for row, codes, scales in zip(w.astype(np.float64), nibbles(p), p.scales.astype(np.float64), strict=True):
        for part, scale in zip(blocks(columns), scales, strict=True):
            x = row[part]
            top = x[np.argmax(np.abs(x))]
            want = abs(top) if format == "nf4" else top / -8
            assert scale == pytest.approx(want, rel=2**-11)  # fp16 has 11 bits
            choices = np.array(LEVELS[format]) * scale
            got = choices[codes[part]]
            best = np.abs(x[:, None] - choices).min(axis=1)
            np.testing.assert_allclose(np.abs(x - got), best, atol=1e-6 * abs(scale))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("format", FOUR)
def test_unpacking_reads_each_half_of_each_byte_the_low_one_first(format, columns):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, (3, (columns + 1) // 2), dtype=np.uint8)
    scales = rng.standard_normal((3, len(blocks(columns)))).astype(np.float16)
    p = Packed(format, columns, codes, scales)
    want = [[LEVELS[format][c] * float(scales[i, j // 64]) for j, c in enumerate(r)] for i, r in enumerate(nibbles(p))]
    np.testing.assert_allclose(unpack(p), want, rtol=1e-6)
    assert unpack(p).dtype == np.float32


def test_unpacking_int8_is_codes_times_the_scale_of_the_row():
    codes = np.array([[-127, 3], [0, 100], [5, -1]], np.int8)
    p = Packed("int8", 2, codes, np.array([0.5, 2.0, -1.0], np.float32))
    np.testing.assert_array_equal(unpack(p), [[-63.5, 1.5], [0, 200], [-5, 1]])


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_packed_again_stays_as_it_is(format):
    once = unpack(pack(matrix(7, 130), format))
    # nf4's largest level is ±1 and int4's is -8, so that a block's scale is met again, and int8's likewise
    np.testing.assert_allclose(unpack(pack(once, format)), once, rtol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_numbers_too_small_for_a_scale_become_zeros(format):
    w = matrix(4, 130)
    w[1] = 0
    w[2, :64] = 0
    w[3] = 1e-44  # a scale of it has no inverse
    again = unpack(pack(w, format))
    assert np.isfinite(again).all()
    assert not again[1].any()
    assert not again[2, :64].any()
    assert again[2, 64:].any()
    assert not again[3].any()


@pytest.mark.parametrize(("format", "most"), [("int8", 0.008), ("nf4", 0.095), ("int4", 0.1)])
def test_the_error_on_normal_numbers_is_known(format, most):
    w = np.random.default_rng(2).standard_normal((64, 512)).astype(np.float32)
    error = np.linalg.norm(unpack(pack(w, format)) - w) / np.linalg.norm(w)
    assert 0.85 * most < error < most


@pytest.mark.parametrize("format", FORMATS)
def test_parts_of_a_large_matrix_are_packed_as_it_is_whole(format):
    w = matrix(700, 190)  # 133,000 numbers: three parts
    p = pack(w, format)
    for i in (0, 344, 345, 699):
        one = pack(w[i : i + 1], format)
        np.testing.assert_array_equal(p.codes[i : i + 1], one.codes)
        np.testing.assert_array_equal(p.scales[i : i + 1], one.scales)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_the_bits_of_a_number_are_those_of_the_arrays(format, columns):
    p = pack(matrix(6, columns), format)
    assert bits(format, columns) == pytest.approx(8 * p.nbytes / (6 * columns))
    assert BLOCK == 64


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(format, value):
    w = matrix(3, 5)
    w[2, 4] = value
    with pytest.raises(ValueError, match="not all finite"):
        pack(w, format)


@pytest.mark.parametrize("format", FOUR)
def test_numbers_too_large_for_fp16_are_refused_in_four_bits_alone(format):
    w = matrix(3, 5)
    w[1, 1] = -70000
    with pytest.raises(ValueError, match=f"magnitude is 70000; {format} has at most 65504: use int8"):
        pack(w, format)
    assert unpack(pack(w, "int8"))[1, 1] == pytest.approx(-70000)


@pytest.mark.parametrize("shape", [(3,), (0, 4), (4, 0), (2, 2, 2)])
def test_what_is_no_matrix_is_refused(shape):
    with pytest.raises(ValueError, match="want a matrix with rows and columns"):
        pack(np.zeros(shape, np.float32), "int8")
