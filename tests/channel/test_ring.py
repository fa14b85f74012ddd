"""What a client sends into the ring, number by number, and where exactly the bounds lie."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.channel import Grid, RingChannel
from fedpeft.channel import ring as module
from fedpeft.errors import ProtocolError

METRICS = np.array([1.5, 7.0, 2.0, 3.0])
NONE = np.zeros(0)


class Fixed:
    """A generator whose every number is this one, or the next of these."""

    def __init__(self, value):
        self.value = value

    def random(self, size):
        return np.resize(self.value, size).astype(np.float64)


HALF, ZERO, NEARLY_ONE = Fixed(0.5), Fixed(0.0), Fixed(1 - 2.0**-53)


def grid(size=2, sketches=0, largest=1.0, cohort=4, **channel):
    return RingChannel(**channel).over(cohort, size, sketches, largest)


def encoded(g, x, rng=HALF, weight=None, sketches=NONE, metrics=METRICS):
    weight = g.largest_weight if weight is None else weight
    return g.up(np.asarray(x, np.float64), weight, metrics, sketches, rng)


def added(g, *vectors):
    total = np.zeros(g.length, np.uint32)
    for x in vectors:
        total += x
    return total & np.uint32(2**g.modulus - 1)


def test_the_golden_vector():
    g = grid(6, range=0.5, bits=20)
    got = encoded(g, [-0.6, -0.5, -0.1, 0, 0.1, 0.5])
    assert got.dtype == np.uint32
    assert got[:6].tolist() == [4294443009, 4294443009, 4294862439, 0, 104857, 524287]
    assert g.saturated(got) == 1  # −0.6, and not those at the range


@pytest.mark.parametrize(("modulus", "low"), [(16, 2**16 - 128), (24, 2**24 - 128), (32, 2**32 - 128)])
def test_numbers_are_whole_steps_in_twos_complement(modulus, low):
    g = grid(5, modulus=modulus, range=256.0, bits=9)  # 255 steps: one is 256/255
    got = encoded(g, np.array([-128, -1, 0, 1, 128]) * (256 / 255))
    assert got[:5].tolist() == [low, 2**modulus - 1, 0, 1, 128]
    np.testing.assert_allclose(g.down(got)[0], np.array([-128, -1, 0, 1, 128]) * (256 / 255), rtol=1e-12)


def test_a_number_is_rounded_up_where_the_dice_say_so():
    g = grid(4, range=7.0, bits=4)  # steps of 1
    for u, want in ((0.0, [2, -3, 0, -1]), (0.25, [2, -3, 0, -1]), (0.5, [2, -3, 0, -1]), (0.75, [3, -2, 0, -1])):
        np.testing.assert_array_equal(g.down(encoded(g, [2.25, -2.75, 0.0, -1.0], Fixed(u)))[0], want)


def test_every_number_has_its_own_dice():
    g = grid(4, sketches=2, range=7.0, bits=4)
    mean, _, rest = g.down(encoded(g, [2.5] * 4, Fixed([0.4, 0.6, 0.1, 0.9]), sketches=np.array([2.5, 1.0])))
    np.testing.assert_array_equal(mean, [2, 3, 2, 3])
    np.testing.assert_array_equal(rest[4:], [2, 1])


def test_what_travels_beside_the_encoding_is_laid_out_as_limbs():
    g = grid(1, sketches=1, bits=9, range=255.0, largest=10.0)  # base 256: 2 limbs a weight, 5 a count
    assert g.length == 1 + 1 + 2 + 5 * 5
    metrics = np.array([300.5, 2.0**40 - 1, 0.0, 70_000.0])
    got = encoded(g, [510.0], weight=4.0, sketches=np.array([-10.0]), metrics=metrics)
    assert got[0] == 204  # 510 · 0.4
    assert got[1] == 2**32 - 4
    assert got[2:4].tolist() == [0x66, 0x66]  # 0.4 of 65535 is 26214
    loss = 300 * 1024 + 512
    assert got[4:9].tolist() == [loss % 256, loss // 256 % 256, loss // 65536, 0, 0]
    assert got[9:14].tolist() == [255] * 5
    assert got[14:19].tolist() == [0] * 5
    assert got[19:24].tolist() == [70_000 % 256, 70_000 // 256 % 256, 1, 0, 0]
    assert got[24:29].tolist() == [0] * 5
    _, weight, statistics = g.down(got)
    assert weight == pytest.approx(4.0, rel=1e-15)
    np.testing.assert_array_equal(statistics[:4], metrics)
    assert statistics[4] == pytest.approx(-40.0, rel=1e-15)  # times the weight: what compares with the clear


@pytest.mark.parametrize(
    ("bits", "length"), [(2, 16 + 5 * 40), (8, 3 + 5 * 6), (9, 2 + 5 * 5), (17, 1 + 5 * 3), (18, 1 + 5 * 3)]
)
def test_limbs_are_as_few_as_hold_the_number(bits, length):
    g = grid(3, bits=bits)
    assert g.length == 3 + length
    metrics = np.array([2.0**30 - 1 / 1024, 0, 2.0**40 - 1, 1])
    for x in (g.up(np.ones(3), 1.0, metrics, NONE, HALF), g.up(np.ones(3), 1e-9, metrics, NONE, HALF)):
        np.testing.assert_array_equal(g.down(x)[2], metrics)


def test_the_numbers_that_the_channel_is_made_of():
    assert (module.MODULI, module.LARGEST, module.MOST) == ((16, 24, 32), 65535, 2**40 - 1)
    assert module.CHUNK == 65536
    assert RingChannel() == RingChannel(clip=None, range=4.0, modulus=32, bits=None)
    assert RingChannel(2.0, 3.0, 24, 12).over(5, 7, 6, 9.0) == Grid(24, 12, 3.0, 2.0, 5, 7, 6, 9.0)


@pytest.mark.parametrize(
    ("modulus", "cohort", "bits"),
    [(32, 1, 32), (32, 2, 31), (32, 3, 30), (32, 1000, 22), (24, 100, 17), (16, 16, 12), (16, 2**15 - 1, 2)],
)
def test_bits_are_as_many_as_the_cohort_has_room_for(modulus, cohort, bits):
    g = RingChannel(modulus=modulus).over(cohort, 3, 0, 1.0)
    assert (g.bits, g.steps) == (bits, 2 ** (bits - 1) - 1)
    assert cohort * g.steps <= 2 ** (modulus - 1) - 1 < cohort * (2**bits - 1)
    assert replace(g, bits=2).steps == 1
    with pytest.raises(ValueError, match=f"^bits: got {bits + 1}; want at least 2 and at most {bits}, for the sum of "):
        replace(g, bits=bits + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cohort": 0}, "cohort: got 0; want at least 1$"),
        ({"size": 0}, "size: got 0; want at least 1$"),
        ({"sketches": -1}, "sketches: got -1; want at least 0$"),
        ({"largest": 0.0}, "largest_weight: got 0.0; want more than 0 and finite"),
        ({"largest": -1.0}, "largest_weight: got -1.0; want more than 0 and finite"),
        ({"largest": float("inf")}, "largest_weight: got inf; want more than 0 and finite"),
        ({"largest": float("nan")}, "largest_weight: got nan; want more than 0 and finite"),
        ({"cohort": 2**15, "modulus": 16}, "bits: got 1; want at least 2 and at most 1"),
    ],
)
def test_a_grid_that_cannot_work_is_refused_when_built(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        grid(**change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": 0.0}, "clip: got 0.0; want more than 0 and finite, or leave it out"),
        ({"clip": -1.0}, "clip: got -1.0; want more than 0"),
        ({"clip": float("nan")}, "clip: got nan; want more than 0"),
        ({"clip": float("inf")}, "clip: got inf; want more than 0 and finite"),
        ({"range": 0.0}, "range: got 0.0; want more than 0 and finite"),
        ({"range": -2.0}, "range: got -2.0; want more than 0 and finite"),
        ({"range": float("inf")}, "range: got inf; want more than 0 and finite"),
        ({"range": float("nan")}, "range: got nan; want more than 0 and finite"),
        ({"modulus": 20}, "modulus: got 20; want one of 16, 24, 32"),
        ({"bits": 1}, "bits: got 1; want at least 2 and at most the modulus, 32"),
        ({"bits": 25, "modulus": 24}, "bits: got 25; want at least 2 and at most the modulus, 24"),
    ],
)
def test_a_channel_that_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        RingChannel(**settings)


def test_small_bounds_are_good_bounds():
    RingChannel(clip=1e-9, range=1e-9, modulus=16, bits=2)
    RingChannel(bits=24, modulus=24)
    grid(1, 0, 1e-9, cohort=1)


# ---- weights, clips and what is refused


def test_a_weight_is_a_whole_number_of_the_largest():
    g = grid(largest=51.0)  # 65535 is 51 · 1285
    assert [g.share(w) for w in (51.0, 1.0, 17.0, 0.5 / 1285 + 1e-9, 1e-30)] == [65535, 1285, 21845, 1, 1]
    assert [g.share(w) for w in (2.4 / 1285, 2.6 / 1285)] == [2, 3]
    for weight in (51.0, 17.0, 1.0):
        assert g.down(encoded(g, [1.0, 2.0], weight=weight))[1] == pytest.approx(weight, rel=1e-15)


@pytest.mark.parametrize("weight", [0.0, -1.0, 51.000001, float("nan"), float("inf")])
def test_a_weight_out_of_range_is_refused_without_a_word_of_what_it_is(weight):
    with pytest.raises(ValueError, match=r"^weight: want more than 0 and at most 51, the largest agreed on$"):
        encoded(grid(largest=51.0), [1.0, 2.0], weight=weight)


def test_a_vector_is_clipped_before_it_is_weighed_and_keeps_its_direction():
    g = grid(clip=5.0, range=100.0, bits=28, largest=2.0)
    mean = g.down(encoded(g, [30.0, -40.0], weight=0.5))[0]
    np.testing.assert_allclose(mean, [3.0, -4.0], atol=g.error(1, 0.5))
    for inside in ([3.0, -4.0], [0.3, -0.4], [0.0, 0.0]):
        np.testing.assert_allclose(g.down(encoded(g, inside))[0], inside, atol=g.rounding)


def test_sketches_are_weighed_and_not_clipped():
    g = grid(sketches=3, clip=5.0, range=100.0, bits=28, largest=15.0)  # 65535 is 15 · 4369
    got = g.down(encoded(g, [30.0, -40.0], weight=3.0, sketches=np.array([8.0, -16.0, 0.0])))[2][4:]
    np.testing.assert_allclose(got, [24.0, -48.0, 0.0], atol=15 * g.rounding)


@pytest.mark.parametrize("clip", [None, 1e5])
def test_half_precision_neither_overflows_nor_vanishes(clip):
    g = grid(clip=clip, range=1e5, bits=28)
    x = np.array([60_000.0, -60_000.0], np.float16)  # its square and its steps are beyond 65504
    mean = g.down(g.up(x, 1.0, METRICS, NONE, HALF))[0]
    np.testing.assert_allclose(mean, x.astype(np.float64), atol=g.rounding)
    np.testing.assert_array_equal(x, np.array([60_000.0, -60_000.0], np.float16))


def test_numbers_beyond_the_range_are_cut_however_large_and_counted():
    g = grid(5, sketches=2, range=2.0, cohort=3)
    x = [1e307, -2.5, 2.0, -2.0, 1.9]
    with np.errstate(all="raise"):
        one = encoded(g, x, sketches=np.array([3.0, -1.0]))
    assert g.saturated(one) == 3
    mean, _, statistics = g.down(one)
    np.testing.assert_allclose(mean, [2.0, -2.0, 2.0, -2.0, 1.9], atol=g.rounding)
    assert statistics[4] == pytest.approx(2.0)
    assert g.saturated(added(g, one, one, encoded(g, [0.0] * 5, sketches=np.zeros(2)))) == 6


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", ["encoding", "sketches", "metrics"])
def test_a_number_that_is_not_finite_is_refused_wherever_it_is(value, at):
    parts = {"encoding": np.ones(2), "sketches": np.ones(3), "metrics": METRICS.copy()}
    parts[at][1] = value
    with pytest.raises(ValueError, match=f"^{at}: got NaN or infinity; want finite numbers"):
        grid(sketches=3).up(parts["encoding"], 1.0, parts["metrics"], parts["sketches"], HALF)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"x": np.ones(3)}, r"encoding: got shape \(3,\); want \(2,\)"),
        ({"x": np.ones((2, 1))}, r"encoding: got shape \(2, 1\); want \(2,\)"),
        ({"sketches": np.ones(2)}, r"sketches: got shape \(2,\); want \(3,\)"),
        ({"metrics": np.ones(1)}, r"metrics: got shape \(1,\); want \(4,\)"),
    ],
)
def test_parts_of_another_shape_are_refused(parts, message):
    good = {"x": np.ones(2), "weight": 1.0, "metrics": METRICS, "sketches": np.ones(3), "rng": HALF}
    with pytest.raises(ValueError, match=f"^{message}"):
        grid(sketches=3).up(**good | parts)


@pytest.mark.parametrize("metrics", [[-0.001, 1, 1, 1], [2.0**30, 1, 1, 1], [0, 2.0**40, 1, 1], [0, 1, 1, -1]])
def test_counts_that_have_no_place_are_refused_without_a_word_of_what_they_are(metrics):
    with pytest.raises(ValueError, match=r"^metrics: want a loss from 0 to 2\^30, and counts from 0 to 2\^40$"):
        grid().up(np.ones(2), 1.0, np.array(metrics), NONE, HALF)


def test_counts_are_rounded_to_the_nearest_step():
    g = grid()
    got = g.down(g.up(np.ones(2), 1.0, np.array([1.0004, 2.4, 2.6, 0.0], np.float32), NONE, HALF))[2]
    np.testing.assert_array_equal(got, [1.0, 2.0, 3.0, 0.0])


# ---- what a sum may be


def test_rounding_is_one_step_and_grows_as_weights_are_smaller():
    g = grid(range=7.0, bits=4, largest=10.0)
    assert g.rounding == 1.0
    assert g.error(3, 30.0) == 1.0
    assert g.error(3, 7.5) == 4.0


def test_the_largest_number_does_not_wrap_where_the_dice_are_nearly_one():
    for modulus in (16, 24, 32):
        g = grid(cohort=1, modulus=modulus)
        np.testing.assert_allclose(g.down(encoded(g, [9.0, -9.0], NEARLY_ONE))[0], [4.0, -4.0], rtol=1e-4)
    assert encoded(grid(cohort=1), [9.0, -9.0], NEARLY_ONE)[:2].tolist() == [2**31 - 1, 2**31 + 2]


@pytest.mark.parametrize("shape", [(1,), (0,)])
def test_a_sum_of_another_size_is_refused(shape):
    g = grid()
    for call in (g.down, g.saturated):
        with pytest.raises(ValueError, match=rf"^total: got uint32 of shape .*; want uint32 of \({g.length},\)$"):
            call(np.zeros(shape, np.uint32))
        with pytest.raises(ValueError, match=r"^total: got int64 of shape"):
            call(np.zeros(g.length, np.int64))


def spoilt(g, at, value):
    total = added(g, *[encoded(g, [3.0, -3.0])] * 3)
    total[at] = value % 2**g.modulus
    return total


@pytest.mark.parametrize("modulus", [24, 32])
def test_a_sum_that_no_cohort_can_have_is_refused(modulus):
    g = grid(modulus=modulus, bits=16, cohort=3)  # sums to ±98301; a weight has 2 limbs of 15 bits
    most = 3 * 32767
    left = "^the sum holds numbers that no sum of this cohort has: a client left the grid$"
    for at in (0, 1):
        for value in (most, -most):
            g.down(spoilt(g, at, value))
        for value in (most + 1, -most - 1, -(2 ** (modulus - 1)), 2 ** (modulus - 1) - 1):
            with pytest.raises(ProtocolError, match=left):
                g.down(spoilt(g, at, value))
    for at in (4, g.length - 1):
        for value in (0, most):
            g.down(spoilt(g, at, value))
            g.saturated(spoilt(g, at, value))
        for value in (-1, most + 1):
            for call in (g.down, g.saturated):
                with pytest.raises(ProtocolError, match=r"^the sum holds counts that no sum of "):
                    call(spoilt(g, at, value))


def test_a_sum_whose_weight_no_cohort_can_have_is_refused():
    g = grid(bits=18, cohort=3)  # a weight has one limb, which could hold more than 65535
    for value in (1, 3 * 65535):
        assert g.down(spoilt(g, 2, value))[1] == value / 65535
    for value in (0, 3 * 65535 + 1):
        with pytest.raises(ProtocolError, match=f"^the sum has a weight of {value} steps: a client left the grid$"):
            g.down(spoilt(g, 2, value))


def test_a_mean_longer_than_the_clip_is_refused_but_for_the_rounding():
    g = grid(size=4, range=127.0, bits=8, clip=40.0, cohort=4)  # steps of 1; of two clients the error is 4/2 · √4
    left = replace(g, clip=None)  # those who left out the clip
    one, more = encoded(left, [22.0, -22.0, 22.0, -22.0]), encoded(left, [22.0, -22.0, 22.0, -23.0])
    np.testing.assert_array_equal(g.down(added(g, one, one))[0], [22.0, -22.0, 22.0, -22.0])
    with pytest.raises(
        ProtocolError, match=r"^the mean has norm 44\.2\d*; want at most 40 \(channel.clip\): a client "
    ):
        g.down(added(g, one, more))
    left.down(added(g, one, more))


def test_decoding_leaves_the_sum_as_it_is():
    g = grid(modulus=24)
    total = encoded(g, [1.0, -1.0])
    before = total.copy()
    first, second = g.down(total), g.down(total)
    np.testing.assert_array_equal(total, before)
    np.testing.assert_array_equal(first[0], second[0])
    assert type(first[1]) is float


def test_long_vectors_are_rounded_as_short_ones():
    size = 2 * module.CHUNK + 5
    rng = np.random.default_rng(3)
    x = rng.normal(size=size)
    g = grid(size, range=2.0, bits=21)
    got = g.up(x, 1.0, METRICS, NONE, np.random.default_rng(4))
    steps = np.floor(x.clip(-2, 2) * (g.steps / 2.0) + np.random.default_rng(4).random(size))
    np.testing.assert_array_equal(got[:size], steps.astype(np.int64) % 2**32)
    assert g.saturated(got) == np.count_nonzero(np.abs(x) > 2) > 5000


@pytest.mark.parametrize(("modulus", "size"), [(16, 2), (24, 3), (32, 4)])
def test_a_number_travels_in_the_bytes_of_the_ring(modulus, size):
    assert RingChannel(modulus=modulus).number_bytes == size
