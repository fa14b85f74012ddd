"""What a client sends in the clear, number by number, and where exactly the bounds lie."""

import numpy as np
import pytest

from fedpeft.channel import PlainChannel, Running
from fedpeft.errors import ProtocolError

STATISTICS = np.array([1.5, -2.0, 3.0])
ROUNDING = 1 + 1e-6
GOOD = PlainChannel().up(np.array([3.0, -4.0]), 2.0, STATISTICS)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_clipped_vector_keeps_its_direction(dtype):
    x = np.array([30.0, -40.0], dtype)
    term = PlainChannel(clip=5.0).up(x, 2.0, STATISTICS)
    np.testing.assert_array_equal(term, np.array([3.0, -4.0, 2.0, *STATISTICS], np.float32))


def test_a_vector_within_the_clip_is_left_as_it_is():
    x = np.array([3.0, -4.0])
    for clip in (5.0, 6.0, None):
        np.testing.assert_array_equal(PlainChannel(clip).up(x, 2.0, STATISTICS)[:2], [3.0, -4.0])


def test_an_exact_channel_keeps_every_bit_and_another_one_rounds_to_single_precision():
    x = np.array([1 / 3, -2 / 7])
    for exact, dtype in ((True, np.float64), (False, np.float32)):
        answer = PlainChannel(exact=exact).up(x, 2.0, STATISTICS)
        assert answer.dtype == dtype
        np.testing.assert_array_equal(answer[:2], x.astype(dtype))
    assert PlainChannel().exact is False
    assert (PlainChannel().number_bytes, PlainChannel(exact=True).number_bytes) == (4, 8)


def test_encoding_does_not_change_the_vector_it_is_given():
    x = np.array([3.0, -4.0])
    PlainChannel(clip=1.0).up(x, 2.0, STATISTICS)
    np.testing.assert_array_equal(x, [3.0, -4.0])


def test_down_is_the_weighted_mean_with_the_sums_of_all_else():
    channel, total = PlainChannel(), Running(2 + 1 + 3)
    for x, weight in (([1.0, -2.0], 1.0), ([5.0, 6.0], 3.0)):
        total.add(channel.weigh(channel.up(np.array(x), weight, STATISTICS), 2))
    mean, weight, statistics = channel.down(total.total, 2)
    np.testing.assert_array_equal(mean, [4.0, 4.0])
    assert weight == 4.0
    assert type(weight) is float
    np.testing.assert_array_equal(statistics, 2 * STATISTICS)


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
    "channel", [PlainChannel(largest_norm=5.0), PlainChannel(clip=5.0), PlainChannel(largest_norm=5 / (1 + 5e-7))]
)
def test_a_term_may_be_as_long_as_the_bound_and_a_rounding_more(channel):
    channel.check(GOOD, 2, 2.0)
    assert 5.0 / ROUNDING * ROUNDING == 5.0
    PlainChannel(largest_norm=5.0 / ROUNDING).check(GOOD, 2, 2.0)
    channel.check(PlainChannel().up(np.array([3.0, -4.0]), 0.1, STATISTICS * 1e6), 2, 2.0)


def test_weighing_leaves_the_answer_and_its_last_bit_alone():
    x = np.array([1 / 3, -2 / 7], np.float32)
    answer = PlainChannel().up(x, 3.0, STATISTICS)
    term = PlainChannel().weigh(answer, 2)
    assert term.dtype == np.float64
    np.testing.assert_array_equal(term, [3 * float(x[0]), 3 * float(x[1]), 3.0, *STATISTICS])  # exact: 26 bits of 53
    np.testing.assert_array_equal(answer[:2], x)


def test_a_norm_beyond_single_precision_is_still_measured():
    term = np.array([1e30, 1e30, 1.0, 0.0, 0.0, 0.0], np.float32)  # its squares are beyond 3e38
    with pytest.raises(ProtocolError, match=r"norm 1\.41\d+e\+30;"):
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
