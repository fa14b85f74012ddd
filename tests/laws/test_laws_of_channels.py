"""What every channel owes: the stated bound holds, sums are exact, and what may not be added is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.channel import PlainChannel, Running
from fedpeft.errors import ProtocolError

STATISTICS = np.array([1.5, -2.0, 3.0])
GOOD = PlainChannel().up(np.array([3.0, -4.0]), 2.0, STATISTICS)


@given(seed=st.integers(0, 9999), size=st.integers(1, 300), clip=st.floats(1e-3, 1e3), length=st.floats(0, 1e5))
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_no_clipped_term_is_longer_than_its_clip_and_the_server_takes_it(seed, size, clip, length):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=size)
    x *= length / np.linalg.norm(x)
    weight = float(rng.uniform(0.1, 1e4))
    channel = PlainChannel(clip)
    term = channel.up(x, weight, STATISTICS)
    mean, _, _ = channel.down(channel.weigh(term, size), size)
    assert np.linalg.norm(mean) <= clip * (1 + 3e-7)  # fp32 rounds the weight and each product by at most 6e-8
    channel.check(term, size, weight)


@pytest.mark.parametrize("clip", [None, 1e4])
def test_half_precision_neither_overflows_nor_vanishes(clip):
    x = np.array([60_000.0, -60_000.0], np.float16)  # its square, its sum and its weight are beyond 65504
    channel = PlainChannel(clip, largest_norm=1e6)
    term = channel.up(x, 50.0, STATISTICS)
    want = 6e4 if clip is None else clip / np.sqrt(2)
    np.testing.assert_allclose(channel.weigh(term, 2)[:2], [50 * want, -50 * want], rtol=1e-3)
    np.testing.assert_allclose(term[:2], [want, -want], rtol=1e-3)  # half precision rounds 60000 to 59999.something


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_sums_are_exact_in_double_precision(dtype):
    total = Running(2)
    for _ in range(1000):
        total.add(np.array([60_000, -60_000], dtype))  # the sum of two is more than half precision holds
        total.add(np.array([2**-14, 2**-14], dtype))  # lost beside 6e7 in single precision
    assert total.total.dtype == np.float64
    np.testing.assert_array_equal(total.total, [6e7 + 1000 * 2**-14, -6e7 + 1000 * 2**-14])
    assert total.count == 2000


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
