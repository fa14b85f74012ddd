"""What every channel owes: the stated bound holds, sums are exact, and what may not be added is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.channel import PlainChannel, Running
from fedpeft.errors import ProtocolError

STATISTICS = np.array([1.5, -2.0, 3.0])
ROUNDING = 1 + 1e-6


@given(seed=st.integers(0, 9999), size=st.integers(1, 300), clip=st.floats(1e-3, 1e3), length=st.floats(0, 1e5))
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_no_clipped_term_is_longer_than_its_clip_and_the_server_takes_it(seed, size, clip, length):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=size)
    x *= length / np.linalg.norm(x)
    weight = float(rng.uniform(0.1, 1e4))
    channel = PlainChannel(clip)
    term = channel.up(x, weight, STATISTICS)
    mean, _, _ = channel.down(term.astype(np.float64), size)
    assert np.linalg.norm(mean) <= clip * (1 + 3e-7)  # fp32 rounds the weight and each product by at most 6e-8
    channel.check(term, size, weight)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_clipped_vector_keeps_its_direction(dtype):
    x = np.array([30.0, -40.0], dtype)
    term = PlainChannel(clip=5.0).up(x, 2.0, STATISTICS)
    np.testing.assert_array_equal(term, np.array([6.0, -8.0, 2.0, *STATISTICS], np.float32))


def test_a_vector_within_the_clip_is_left_as_it_is():
    x = np.array([3.0, -4.0])
    for clip in (5.0, 6.0, None):
        np.testing.assert_array_equal(PlainChannel(clip).up(x, 2.0, STATISTICS)[:2], [6.0, -8.0])


@pytest.mark.parametrize("clip", [None, 1e4])
def test_half_precision_neither_overflows_nor_vanishes(clip):
    x = np.array([60_000.0, -60_000.0], np.float16)  # its square, its sum and its weight are beyond 65504
    channel = PlainChannel(clip, largest_norm=1e6)
    term = channel.up(x, 50.0, STATISTICS)
    want = 3e6 if clip is None else 50 * clip / np.sqrt(2)
    np.testing.assert_allclose(term[:2], [want, -want], rtol=1e-3)  # half precision rounds 60000 to 59999.something


def test_encoding_does_not_change_the_vector_it_is_given():
    x = np.array([3.0, -4.0])
    PlainChannel(clip=1.0).up(x, 2.0, STATISTICS)
    np.testing.assert_array_equal(x, [3.0, -4.0])


def test_down_is_the_weighted_mean_with_the_sums_of_all_else():
    channel, total = PlainChannel(), Running(2 + 1 + 3)
    for x, weight in (([1.0, -2.0], 1.0), ([5.0, 6.0], 3.0)):
        total.add(channel.up(np.array(x), weight, STATISTICS))
    mean, weight, statistics = channel.down(total.total, 2)
    np.testing.assert_array_equal(mean, [4.0, 4.0])
    assert weight == 4.0
    assert type(weight) is float
    np.testing.assert_array_equal(statistics, 2 * STATISTICS)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_sums_are_exact_in_double_precision(dtype):
    total = Running(2)
    for _ in range(1000):
        total.add(np.array([60_000, -60_000], dtype))  # the sum of two is more than half precision holds
        total.add(np.array([2**-14, 2**-14], dtype))  # lost beside 6e7 in single precision
    assert total.total.dtype == np.float64
    np.testing.assert_array_equal(total.total, [6e7 + 1000 * 2**-14, -6e7 + 1000 * 2**-14])
    assert total.count == 2000


def test_a_merged_sum_is_the_sum_of_both_and_leaves_the_other_alone():
    x, y = np.array([1.0, -2.0, 4.0]), np.array([8.0, 16.0, -32.0])
    left, right = Running(3).add(x).add(x), Running(3).add(y)
    assert left.merge(right) is left
    np.testing.assert_array_equal(left.total, 2 * x + y)
    assert left.count == 3
    np.testing.assert_array_equal(right.total, y)
    assert right.count == 1
    np.testing.assert_array_equal(left.merge(Running(3)).total, 2 * x + y)


def test_a_sum_leaves_its_terms_alone_and_starts_at_zero():
    x = np.ones(3)
    total = Running(3)
    np.testing.assert_array_equal(total.total, np.zeros(3))
    assert total.count == 0
    assert total.add(x) is total
    total.add(x)
    np.testing.assert_array_equal(x, np.ones(3))


@pytest.mark.parametrize("shape", [(2,), (4,), (1,), (3, 1), ()])
def test_a_sum_refuses_another_shape(shape):
    total = Running(3)
    with pytest.raises(ValueError, match=r"a sum of vectors of shape \(3,\) can't take one of"):
        total.add(np.ones(shape))
    with pytest.raises(ValueError, match="can't take"):
        total.merge(Running(4))
    np.testing.assert_array_equal(total.total, np.zeros(3))
    assert total.count == 0


GOOD = PlainChannel().up(np.array([3.0, -4.0]), 2.0, STATISTICS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", range(6))
def test_a_number_that_is_not_finite_is_refused_wherever_it_is(value, at):
    term = GOOD.copy()
    term[at] = value
    with pytest.raises(ProtocolError, match="the update holds NaN or infinity"):
        PlainChannel().check(term, 2, 10.0)


@pytest.mark.parametrize(("weight", "largest"), [(0.0, 10.0), (-2.0, 10.0), (2.0, 1.99), (2.0, 0.0)])
def test_a_weight_out_of_range_is_refused(weight, largest):
    term = GOOD.copy()
    term[2] = weight
    with pytest.raises(
        ProtocolError, match=f"the update has weight {weight:g}; want more than 0 and at most {largest:g}"
    ):
        PlainChannel().check(term, 2, largest)


def test_a_weight_may_be_the_largest_and_a_rounding_more():
    PlainChannel().check(GOOD, 2, 2.0)
    PlainChannel().check(GOOD, 2, 2.0 / (1 + 5e-7))
    with pytest.raises(ProtocolError, match="weight"):
        PlainChannel().check(GOOD, 2, 2.0 / (1 + 2e-6))
    assert 2.0 / ROUNDING * ROUNDING == 2.0
    PlainChannel().check(GOOD, 2, 2.0 / ROUNDING)
    small = PlainChannel().up(np.array([3.0, -4.0]), 1e-3, STATISTICS)
    PlainChannel().check(small, 2, 1.0)


@pytest.mark.parametrize(
    ("channel", "message"),
    [
        (PlainChannel(largest_norm=4.99), r"norm 5; want at most 4.99 \(channel.largest_norm\)"),
        (PlainChannel(clip=4.99), r"norm 5; want at most 4.99 \(channel.clip\)"),
        (PlainChannel(clip=4.99, largest_norm=6.0), r"norm 5; want at most 4.99 \(channel.clip\)"),
        (PlainChannel(largest_norm=5 / (1 + 2e-6)), "norm 5; want at most"),
    ],
)
def test_a_term_that_is_too_long_is_refused_whatever_its_weight(channel, message):
    for weight in (0.5, 2.0, 900.0):
        term = PlainChannel().up(np.array([3.0, -4.0]), weight, STATISTICS)
        with pytest.raises(ProtocolError, match=message):
            channel.check(term, 2, 1e3)


@pytest.mark.parametrize(
    "channel", [PlainChannel(largest_norm=5.0), PlainChannel(clip=5.0), PlainChannel(largest_norm=5 / (1 + 5e-7))]
)
def test_a_term_may_be_as_long_as_the_bound_and_a_rounding_more(channel):
    channel.check(GOOD, 2, 2.0)
    assert 5.0 / ROUNDING * ROUNDING == 5.0
    PlainChannel(largest_norm=5.0 / ROUNDING).check(GOOD, 2, 2.0)
    channel.check(PlainChannel().up(np.array([3.0, -4.0]), 0.1, STATISTICS * 1e6), 2, 2.0)


@pytest.mark.parametrize(("weight", "power"), [(1.0, 30), (1e-30, 60)])
def test_a_norm_beyond_single_precision_is_still_measured(weight, power):
    term = np.array([1e30, 1e30, weight, 0.0, 0.0, 0.0], np.float32)  # its squares are beyond 3e38
    with pytest.raises(ProtocolError, match=rf"norm 1\.41\d+e\+{power};"):
        PlainChannel().check(term, 2, 1.0)


def test_an_update_is_refused_above_the_default_bound():
    at = [PlainChannel().up(np.array([norm]), 1.0, STATISTICS) for norm in (1e4, -1.001e4)]
    PlainChannel().check(at[0], 1, 1.0)
    with pytest.raises(ProtocolError, match="at most 10000"):
        PlainChannel().check(at[1], 1, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": 0.0}, "clip: got 0.0; want more than 0, or leave it out"),
        ({"clip": -1.0}, "clip: got -1.0; want more than 0"),
        ({"clip": float("nan")}, "clip: got nan; want more than 0"),
        ({"largest_norm": 0.0}, "largest_norm: got 0.0; want more than 0"),
        ({"largest_norm": -3.0}, "largest_norm: got -3.0; want more than 0"),
        ({"largest_norm": float("nan")}, "largest_norm: got nan; want more than 0"),
        ({"clip": 3.0, "largest_norm": 2.0}, "clip: got 3.0; want at most largest_norm, 2.0"),
    ],
)
def test_a_channel_that_cannot_work_is_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        PlainChannel(**settings)


def test_small_bounds_are_good_bounds():
    assert PlainChannel(clip=0.5, largest_norm=0.5) == PlainChannel(0.5, 0.5)
