"""A range for each tensor: what is on the grid, what is cut, and what the mean may be off by."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.channel import RingChannel
from fedpeft.channel import ring as module
from fedpeft.errors import ProtocolError

METRICS = np.array([1.5, 7.0, 2.0, 3.0])
NONE = np.zeros(0)
LEAVES, HALVINGS = (2, 1, 3, 1), (0, 3, 3, 1)


class Half:
    """Dice that round to the nearest step."""

    def random(self, size):
        return np.full(size, 0.5)


def grid(leaves=LEAVES, halvings=HALVINGS, sketches=0, cohort=4, largest=1.0, **channel):
    channel = {"range": 256.0, "bits": 9} | channel  # 255 steps
    return RingChannel(**channel).over(cohort, sum(leaves), sketches, largest, leaves, halvings)


def encoded(g, x, sketches=NONE, weight=None):
    return g.up(np.asarray(x, np.float64), g.largest_weight if weight is None else weight, METRICS, sketches, Half())


def test_each_tensor_is_rounded_to_steps_of_its_own():
    g, step = grid(), 256 / 255
    x = np.array([10, -20, 10 / 8, -20 / 8, 255 / 8, 0.1, 7 / 2]) * step
    got = encoded(g, x)
    assert got[:7].view(np.int32).tolist() == [10, -20, 10, -20, 255, 1, 7]  # 0.1 is 0.8 of an eighth
    mean, weight, _ = g.down(got)
    np.testing.assert_allclose(mean, np.array([10, -20, 10 / 8, -20 / 8, 255 / 8, 1 / 8, 7 / 2]) * step, rtol=1e-15)
    assert weight == 1.0


def test_numbers_are_cut_at_the_range_of_their_tensor_and_counted():
    g = grid()
    at = np.array([256, -256, 32, -32, 32, 32, 128])
    assert g.saturated(encoded(g, at)) == 0
    cut = encoded(g, at * 1.01)
    np.testing.assert_array_equal(cut, [*encoded(g, at)[:7], *cut[7:]])
    assert g.saturated(cut) == 7
    assert g.saturated(encoded(g, [33, -33, 33, -33, 3, 3, 33])) == 2


def test_sketches_and_what_comes_after_have_the_whole_range():
    g = grid(sketches=2, largest=10.0)
    got = encoded(g, np.zeros(7), np.array([200.0, -100.0]) * (256 / 255), weight=10.0)
    assert got[7:9].view(np.int32).tolist() == [200, -100]
    _, weight, statistics = g.down(got)
    np.testing.assert_array_equal(statistics[:4], METRICS)
    np.testing.assert_allclose(statistics[4:], np.array([2000.0, -1000.0]) * (256 / 255), rtol=1e-15)
    assert weight == 10.0
    np.testing.assert_array_equal(
        got[9:], encoded(grid(halvings=(0,) * 4, sketches=2, largest=10.0), [0] * 7, np.zeros(2))[9:]
    )


def test_weights_and_the_clip_come_before_the_scales():
    g = grid((2, 2), (0, 4), largest=15.0, clip=10.0, range=16.0, bits=28)
    x = np.array([30.0, 0.0, -0.5, 40.0])  # of norm 50: a fifth of it stays
    total = encoded(g, x, weight=3.0)
    np.testing.assert_allclose(g.down(total)[0], [6.0, 0.0, -0.1, 1.0 / 0.2], atol=1e-3)  # 8 · 0.2 is beyond 16 / 2^4
    assert g.saturated(total) == 1


@pytest.mark.parametrize("modulus", [16, 24, 32])
def test_halving_nothing_is_as_if_there_were_no_tensors(modulus):
    bare = RingChannel(range=3.0, modulus=modulus, clip=4.0).over(4, 7, 2, 9.0)
    g = RingChannel(range=3.0, modulus=modulus, clip=4.0).over(4, 7, 2, 9.0, LEAVES)
    assert (g.leaves, g.halvings) == (LEAVES, (0, 0, 0, 0))
    assert (bare.leaves, bare.halvings) == ((), ())
    x, s = np.array([1.3, -5.0, 0.2, 0.0, 2.0, 0.7, -0.4]), np.array([0.5, -9.0])
    one, other = (each.up(x, 4.0, METRICS, s, np.random.default_rng(3)) for each in (bare, g))
    np.testing.assert_array_equal(one, other)
    for a, b in zip(bare.down(one), g.down(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (bare.rounding, bare.length, bare.error(2, 3.0)) == (g.rounding, g.length, g.error(2, 3.0))


def test_tensors_of_one_scale_share_their_dice_with_no_other_and_none_is_used_twice():
    """As with one scale: the dice come in the order of the numbers, whatever the tensors, also beyond a chunk."""
    leaves = (3, module.CHUNK + 5, 0, module.CHUNK - 1, 2)
    x = np.linspace(-0.9, 0.9, sum(leaves))
    g = RingChannel(range=1.0, bits=9).over(1, x.size, 0, 1.0, leaves, (0, 2, 2, 0, 2))
    scale = np.repeat([1.0, 4.0, 4.0, 1.0, 4.0], leaves)
    kept = x.clip(-1 / scale, 1 / scale)
    want = np.floor(kept * scale * 255 + np.random.default_rng(8).random(x.size)).clip(-255, 255)
    got = g.up(x, 1.0, METRICS, NONE, np.random.default_rng(8))
    np.testing.assert_array_equal(got[: x.size].view(np.int32), want)
    np.testing.assert_allclose(g.down(got)[0], want / 255 / scale, rtol=1e-15)
    assert g.saturated(got) == np.count_nonzero(kept != x)


def test_the_error_of_each_tensor_is_that_of_the_whole_range_halved():
    g = grid(largest=8.0)
    assert g.error(3, 6.0) == 4 * 256 / 255
    assert g.errors(3, 6.0) == tuple(4 * 256 / 255 / k for k in (1, 8, 8, 2))
    assert RingChannel().over(4, 3, 0, 1.0).errors(3, 3.0) == ()


@pytest.mark.parametrize("modulus", [16, 24, 32])
def test_no_number_of_a_mean_is_off_by_more_than_its_tensors_error(modulus):
    rng, leaves, halvings = np.random.default_rng(modulus), (50, 1, 70, 30), (2, 0, 11, 30)
    g = RingChannel(range=2.0, modulus=modulus).over(7, sum(leaves), 0, 51.0, leaves, halvings)
    finer = np.repeat(np.ldexp(1.0, np.negative(halvings)), leaves)
    weights = rng.integers(1, 52, 5).astype(float)  # 65535 is 51 · 1285: none is rounded
    xs = rng.uniform(-2, 2, (5, g.size)) * finer
    total = np.zeros(g.length, np.uint32)
    for x, weight in zip(xs, weights, strict=True):
        total = (total + g.up(x, weight, METRICS, NONE, rng)) & np.uint32(2**modulus - 1)
    off = np.abs(g.down(total)[0] - weights @ xs / weights.sum())
    bound = np.repeat(g.errors(5, weights.sum()), leaves)
    assert (off <= bound * (1 + 1e-9)).all()
    assert g.saturated(total) == 0
    if modulus == 16:  # and it is no bound that anything would keep; of one number alone it may be
        shares = [part.max() for part in np.split(off / bound, [50, 51, 121])]
        assert min(shares[0], *shares[2:]) > 0.2


def test_a_mean_may_be_longer_than_the_clip_by_the_rounding_of_its_tensors_alone():
    # Steps of ½ for two numbers and of 1 for six; of two clients with cohort 4, that is 4/2 · √(2/4 + 6) = 5.099.
    g = grid((2, 6), (1, 0), clip=40.0, range=255.0)
    left = replace(g, clip=None)  # those who left out the clip
    good, one, other = (encoded(left, [x, 0, y, 0, 0, 0, 0, 0]) for x, y in ((45.0, 2.0), (45.0, 0.0), (45.5, 0.0)))
    np.testing.assert_array_equal(g.down(good + good)[0], [45, 0, 2, 0, 0, 0, 0, 0])  # of norm 45.044
    with pytest.raises(ProtocolError, match=r"^the mean has norm 45\.25; want at most 40 \(channel.clip\)"):
        g.down(one + other)
    np.testing.assert_array_equal(left.down(one + other)[0], [45.25, 0, 0, 0, 0, 0, 0, 0])


def test_a_sum_that_no_cohort_can_have_is_refused_whatever_its_scale():
    g = grid(modulus=24)
    good = encoded(g, np.full(7, 1e9))
    g.down(good)
    for at in range(7):
        total = good.copy()
        total[at] = 4 * 255 + 1
        with pytest.raises(ProtocolError, match=r"^the sum holds numbers that no sum of this cohort has"):
            g.down(total)


@pytest.mark.parametrize(
    ("leaves", "halvings", "message"),
    [
        ((2, 4), (0, 0), "leaves: got 6 numbers in all; want the size, 7$"),
        ((2, 6), (0, 0), "leaves: got 8 numbers in all; want the size, 7$"),
        ((2, 5), (0,), "halvings: got 1 for 2 leaves; want one for each, from 0 to 30$"),
        ((2, 5), (0, 1, 2), "halvings: got 3 for 2 leaves; want one for each, from 0 to 30$"),
        ((), (3,), "halvings: got 1 for 0 leaves; want one for each, from 0 to 30$"),
        ((2, 5), (3, -1), "halvings: got 2 for 2 leaves; want one for each, from 0 to 30$"),
        ((2, 5), (31, 3), "halvings: got 2 for 2 leaves; want one for each, from 0 to 30$"),
    ],
)
def test_scales_that_are_not_those_of_the_tensors_are_refused(leaves, halvings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        RingChannel().over(4, 7, 0, 1.0, leaves, halvings)


def test_halvings_from_0_to_30_are_taken():
    assert module.MOST_HALVINGS == 30
    g = grid((1, 1), (30, 0), range=1.0)
    np.testing.assert_allclose(g.down(encoded(g, [2.0**-31, 0.5]))[0], [128 / 255 * 2.0**-30, 128 / 255], rtol=1e-15)


def test_a_channel_of_one_scale_has_no_tensors_and_takes_no_halvings():
    one = RingChannel(scales="one")
    assert RingChannel().scales == "tensor"
    assert one.over(4, 7, 2, 1.0, LEAVES) == RingChannel().over(4, 7, 2, 1.0)
    with pytest.raises(ValueError, match=r"^halvings: got 4 for 0 leaves"):
        one.over(4, 7, 2, 1.0, LEAVES, HALVINGS)
