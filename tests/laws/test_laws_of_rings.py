"""What a channel into a ring owes: sums that can't wrap, no bias, the rounding that it states, and exact counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.channel import RingChannel

METRICS = np.array([1.5, 7.0, 2.0, 3.0])
some = settings(max_examples=60, deadline=None, derandomize=True, database=None)
each_modulus = pytest.mark.parametrize("modulus", [16, 24, 32])
seeds = st.integers(0, 9999)


class Highest:
    """Dice that round everything up as far as they can."""

    def random(self, size):
        return np.full(size, 1 - 2.0**-53)


def grid_of(data, sketches=0, most=40):
    modulus = data.draw(st.sampled_from([16, 24, 32]))
    cohort = data.draw(st.integers(1, most))
    widest = RingChannel(modulus=modulus).over(cohort, 1, 0, 1.0).bits
    bits = data.draw(st.none() | st.integers(2, widest))
    channel = RingChannel(range=data.draw(st.sampled_from([0.3, 1.0, 4.0, 77.7])), modulus=modulus, bits=bits)
    return channel.over(cohort, data.draw(st.integers(1, 9)), sketches, data.draw(st.sampled_from([1.0, 51.0, 0.7])))


def summed(grid, vectors):
    """In the ring: no element is ever below zero or above 2^m − 1."""
    total = np.zeros(grid.length, np.uint32)
    for x in vectors:
        assert int(x.max()) < 2**grid.modulus
        total = (total + x) & np.uint32(2**grid.modulus - 1)
    return total


@given(data=st.data())
@some
def test_no_sum_wraps_where_everybody_sends_the_largest_numbers(data):
    g = grid_of(data, sketches=2)
    sign = data.draw(st.sampled_from([1.0, -1.0]))
    largest = np.array([2.0**30 - 1 / 1024, 2.0**40 - 1, 2.0**40 - 1, 2.0**40 - 1])
    one = g.up(np.full(g.size, sign * 1e6), g.largest_weight, largest, np.full(2, -sign * 1e6), Highest())
    mean, weight, statistics = g.down(summed(g, [one] * g.cohort))
    # −S + U rounds up by one step where U is nearly 1.
    low, high = sorted((sign * g.range, sign * (g.range - (g.rounding if sign < 0 else 0))))
    assert (mean >= low * (1 + 1e-12 if low < 0 else 1 - 1e-12)).all()
    assert (mean <= high * (1 - 1e-12 if high < 0 else 1 + 1e-12)).all()
    assert np.sign(statistics[4:]).tolist() in ([-sign, -sign], [0.0, 0.0])
    assert weight == pytest.approx(g.cohort * g.largest_weight, rel=1e-12)
    np.testing.assert_array_equal(statistics[:4], g.cohort * largest)
    assert g.saturated(summed(g, [one] * g.cohort)) == g.cohort * (g.size + 2)


@each_modulus
@pytest.mark.parametrize("cohort", [1, 2, 3, 7, 100, 1000])
def test_a_grid_on_which_a_sum_could_wrap_is_refused_when_built(modulus, cohort):
    for bits in range(2, modulus + 1):
        channel = RingChannel(modulus=modulus, bits=bits)
        if cohort * (2 ** (bits - 1) - 1) < 2 ** (modulus - 1):
            assert channel.over(cohort, 3, 0, 1.0).bits == bits
        else:
            with pytest.raises(ValueError, match="to stay within Z_2"):
                channel.over(cohort, 3, 0, 1.0)


@given(data=st.data(), seed=seeds)
@some
def test_the_stated_rounding_holds_for_every_number_of_a_mean(data, seed):
    g, rng = grid_of(data, sketches=3), np.random.default_rng(seed)
    clients = data.draw(st.integers(1, g.cohort))
    shares = rng.integers(1, 65536, clients)
    weights = shares / 65535 * g.largest_weight
    xs, sketches = rng.uniform(-1, 1, (clients, g.size)) * g.range, rng.uniform(-1, 1, (clients, 3)) * g.range
    total = summed(
        g, [g.up(*each, METRICS, s, rng) for each, s in zip(zip(xs, weights, strict=True), sketches, strict=True)]
    )
    mean, weight, statistics = g.down(total)
    assert weight == pytest.approx(weights.sum(), rel=1e-12)
    fp64 = 1e-12 * g.range
    bound = g.error(clients, weights.sum())
    assert np.abs(mean - weights @ xs / weights.sum()).max() <= bound * (1 + 1e-9) + fp64
    off = np.abs(statistics[4:] / weight - weights @ sketches / weights.sum())
    assert off.max() <= bound * (1 + 1e-9) + fp64
    assert g.error(clients, clients * g.largest_weight) == pytest.approx(g.rounding, rel=1e-12)
    assert g.saturated(total) == 0


@each_modulus
def test_rounding_is_unbiased(modulus):
    g = RingChannel(range=3.0, modulus=modulus, bits=3).over(1, 6, 2, 5.0)  # three steps of 1
    x, s = np.array([-2.9, -1.5, -0.2, 0.0, 0.3, 2.6]), np.array([-0.7, 1.9])
    rng, draws = np.random.default_rng(0), 4_000
    share = g.share(4.0) / 65535
    seen = [g.down(g.up(x, 4.0, METRICS, s, rng)) for _ in range(draws)]
    # 4 standard errors; one draw is off by at most a step, with a deviation of at most ½ of it
    bound = 4 * 0.5 / np.sqrt(draws)
    np.testing.assert_allclose(np.mean([mean * share for mean, _, _ in seen], axis=0), x * share, atol=bound)
    np.testing.assert_allclose(np.mean([rest[4:] / 5.0 for _, _, rest in seen], axis=0), s * share, atol=bound)
    assert len({tuple(mean) for mean, _, _ in seen}) > 8  # and by chance, not always the same way


@given(data=st.data(), seed=seeds)
@some
def test_weights_and_counts_are_exact_in_every_sum(data, seed):
    g, rng = grid_of(data), np.random.default_rng(seed)
    shares = rng.integers(1, 65536, g.cohort)
    counts = np.column_stack([rng.integers(0, 2**40, g.cohort) / 1024, rng.integers(0, 2**40, (g.cohort, 3))])
    far = rng.integers(0, g.size + 1, g.cohort)  # how many numbers of each are beyond the range
    vectors = [
        g.up(np.where(np.arange(g.size) < n, 1e9, 0.0), w / 65535 * g.largest_weight, m, np.zeros(0), rng)
        for n, w, m in zip(far, shares, counts, strict=True)
    ]
    total = summed(g, vectors)
    _, weight, statistics = g.down(total)
    assert weight == int(shares.sum()) / 65535 * g.largest_weight
    np.testing.assert_array_equal(statistics, counts.sum(axis=0))
    assert g.saturated(total) == far.sum()


@given(data=st.data(), seed=seeds, clip=st.floats(1e-3, 1e3), length=st.floats(0, 1e5))
@some
def test_no_clipped_term_is_longer_than_its_clip(data, seed, clip, length):
    rng = np.random.default_rng(seed)
    size = data.draw(st.integers(1, 300))
    x = rng.normal(size=size)
    x *= length / np.linalg.norm(x)
    g = RingChannel(clip, range=2e3, bits=30).over(1, size, 0, 1.0)
    mean, _, _ = g.down(g.up(x, 1.0, METRICS, np.zeros(0), rng))
    assert np.linalg.norm(mean) <= min(clip, length) * (1 + 1e-12) + g.rounding * np.sqrt(size)


@each_modulus
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", range(9))
def test_a_number_that_is_not_finite_is_refused_wherever_it_is(modulus, value, at):
    g = RingChannel(modulus=modulus).over(3, 3, 2, 1.0)
    parts = np.array([1.0, 2.0, 3.0, *METRICS, 4.0, 5.0])
    parts[at] = value
    with pytest.raises(ValueError, match="got NaN or infinity"):
        g.up(parts[:3], 1.0, parts[3:7], parts[7:], np.random.default_rng(0))
