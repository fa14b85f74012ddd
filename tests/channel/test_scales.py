"""How fine the next round's grid is for each tensor: every bound, and whole runs of it."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.channel import RingChannel, Scales, Seen
from fedpeft.channel import scales as module

NONE = np.zeros(0)
METRICS = np.zeros(4)
LEAVES = (16, 15, 40)


def grid(leaves=LEAVES, cohort=4, sketches=0, largest=1.0, halvings=(), **channel):
    return RingChannel(**{"range": 4.0, "bits": 9, **channel}).over(
        cohort, sum(leaves), sketches, largest, leaves, halvings
    )


def seen(*peaks, cut=0, clients=4, **options):
    return Seen(grid(**options), peaks, clients, cut)


def after(halvings, *peaks, room=0, **options):
    return Scales(halvings, room).after(seen(*peaks, **options)).halvings


def test_the_numbers_that_scales_are_chosen_by():
    assert (module.MARGIN, module.FINEST, module.FASTER, module.FEW) == (4.0, 14, 4, 16)
    assert (module.CUT, module.RELAX) == (1e-4, 2)
    assert Scales((1, 2)).room == 0


def test_peaks_are_the_largest_numbers_of_each_tensors_mean_times_the_mean_share_of_the_largest_weight():
    g = grid((2, 3, 0, 1), largest=50.0)
    mean = np.array([1.0, -3.0, 2.0, 0.5, -1.0, -5.0])
    got = Seen.of(g, mean, 40.0, 4, 7)  # weights of 10 on average, a fifth of the largest
    assert got == Seen(g, got.peaks, 4, 7)
    assert got.peaks == pytest.approx((0.6, 0.4, 0.0, 1.0), rel=1e-15)
    assert Seen.of(g, mean, 50.0, 1, 0).peaks == (3.0, 2.0, 0.0, 5.0)
    assert Seen.of(RingChannel().over(4, 6, 0, 50.0), mean, 40.0, 4, 7).peaks == ()


def test_a_range_has_room_for_four_times_the_root_of_the_cohort():
    # Of 4 clients 8 times the peak: 4 / 2^3 has room for peaks up to 1/16.
    for peak, k in ((1 / 16, 3), (1 / 16 * 1.0001, 2), (1 / 8, 2), (1 / 8 * 1.0001, 1), (1 / 2, 0), (3.0, 0), (9.0, 0)):
        assert after((2, 2, 2), peak, peak, peak) == (k, k, k)
    assert after((2, 2, 2), 1 / 32, 1 / 32, 1 / 32, cohort=16) == (3, 3, 3)
    assert after((2, 2, 2), 1 / 32 * 1.0001, 1 / 16, 1 / 8, cohort=16) == (2, 2, 1)
    assert after((0, 0, 0), 1 / 16, 1 / 8, 1.0, range=8.0) == (4, 1, 0)


def test_the_cohort_counts_and_not_who_is_left_of_it():
    assert after((2, 2, 2), 1 / 16, 1 / 16, 1 / 16, clients=1) == (3, 3, 3)


def test_a_range_comes_down_by_four_halvings_in_a_round_and_of_few_numbers_by_one():
    small = 2.0**-20
    assert after((0, 0, 0), small, small, small) == (4, 1, 4)
    assert after((5, 2, 11), small, small, small) == (9, 3, 15)


def test_a_range_goes_up_at_once():
    assert after((20, 20, 20), 1 / 16, 1 / 8, 3.0) == (3, 2, 0)


def test_steps_are_no_finer_than_a_part_in_2_to_the_14_of_the_peak():
    peak = 2.0**-24
    fine = {"bits": 25, "cohort": 1}  # 2^24 − 1 steps to 4: a little more than 2^-22, and 2^-38 of 16 halvings
    assert after((15, 15, 15), peak, peak, peak, **fine) == (16, 16, 16)
    assert after((16, 16, 30), peak, peak, peak, **fine) == (16, 16, 16)
    assert after((16, 16, 16), peak / 2, peak * 2, peak * 4, **fine) == (17, 15, 14)
    coarse = {"bits": 15, "cohort": 1}  # where it is the room for clients that bounds them, to 4 / 2^22 · 2^-k
    assert after((24, 23, 24), peak, peak, peak, **coarse) == (24, 24, 24)


def test_no_range_is_halved_more_than_30_times():
    assert after((27, 29, 30), 2.0**-40, 2.0**-40, 2.0**-40) == (30, 30, 30)


def test_a_tensor_whose_mean_is_zero_keeps_its_scale():
    assert after((7, 8, 9), 0.0, 1 / 16, 0.0) == (7, 3, 9)
    assert after((7, 8, 9), 0.0, 0.0, 0.0, room=5) == (7, 8, 9)


def test_scales_of_other_tensors_are_refused():
    for halvings in ((1, 2), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match=r"^zip\(\) argument"):
            after(halvings, 1 / 16, 1 / 16, 1 / 16)
    with pytest.raises(ValueError, match=r"^zip\(\) argument"):
        after((1, 2, 3), 1 / 16, 1 / 16)


# ---- where numbers were cut


def test_more_than_one_in_ten_thousand_cut_takes_two_halvings_back_and_leaves_room():
    big = {"leaves": (9_000, 16, 984), "sketches": 2_500}  # 12,500 numbers of each of 4 clients: 5 are the share
    few, many = (seen(2.0**-9, 2.0**-9, 0.0, cut=cut, **big) for cut in (5, 6))
    scales = Scales((5, 1, 2), 3)
    assert scales.after(few) == Scales((5, 5, 2), 3)  # 4 / (8 · 2^-9) is 2^8; 2^5 where 3 are left free
    assert scales.after(many) == Scales((3, 0, 0), 5)
    assert scales.after(replace(many, clients=5)) == Scales((5, 5, 2), 3)  # of more numbers
    assert Scales((1, 2, 3)).after(many) == Scales((0, 0, 1), 2)


def test_what_is_cut_at_the_whole_range_leaves_no_more_room_or_no_later_round_would_be_finer():
    cut = seen(1 / 16, 1 / 16, 1 / 16, cut=284)
    assert Scales((0, 0, 0)).after(cut) == Scales((0, 0, 0), 0)
    assert Scales((0, 0, 0), 3).after(cut) == Scales((0, 0, 0), 3)
    assert Scales((0, 1, 0), 3).after(cut) == Scales((0, 0, 0), 5)
    scales = Scales((0, 0, 0))
    for _ in range(20):
        scales = scales.after(cut)
    assert scales.after(seen(1 / 16, 1 / 16, 1 / 16)) == Scales((3, 1, 3))


def test_room_is_left_free_for_good():
    scales = Scales((4, 4, 4), 2)
    for _ in range(3):
        scales = scales.after(seen(1 / 16, 1 / 32, 1 / 16))
    assert scales == Scales((1, 2, 1), 2)
    assert after((4, 4, 4), 1.0, 1 / 16, 2.0**-4, room=9) == (0, 0, 0)


# ---- rounds of clients on the grid


class Rounds:
    """Rounds of twenty clients who have no more than a little in common, in a ring of 16 bits."""

    def __init__(self, sizes, spreads, seed=0):
        self.rng, self.sizes, self.scales = np.random.default_rng(seed), sizes, None
        self.spreads = np.repeat(spreads, sizes)

    def next(self, times=1.0):
        """By how much each tensor of the mean is off, relative to its largest number; the grid; how many were cut."""
        n, size = 20, sum(self.sizes)
        halvings = () if self.scales is None else self.scales.halvings
        g = RingChannel(modulus=16).over(n, size, 0, 100.0, self.sizes, halvings)
        both = self.rng.normal(size=size)
        xs = self.spreads * times * (0.3 * both + self.rng.normal(size=(n, size)))
        weights = self.rng.integers(5, 60, n).astype(float)
        total = np.zeros(g.length, np.uint32)
        for x, weight in zip(xs, weights, strict=True):
            total = (total + g.up(x, weight, METRICS, NONE, self.rng)) & np.uint32(65535)
        mean, weight, _ = g.down(total)
        cut = g.saturated(total)
        want = weights @ xs / weights.sum()
        ends = np.cumsum(self.sizes)[:-1]
        off = [np.abs(x).max() for x in np.split(mean - want, ends)]
        largest = [np.abs(x).max() for x in np.split(want, ends)]
        self.scales = (self.scales or Scales(g.halvings)).after(Seen.of(g, mean, weight, n, cut))
        # A weight travels as one of 65535 steps of the largest, here of 100: to a part in 6,000 for one of 5.
        bounds = [e + 2e-4 * x for e, x in zip(g.errors(n, weights.sum()), largest, strict=True)]
        return np.array(off), np.array(largest), g, cut, np.array(bounds)


def test_a_tensor_a_thousand_times_smaller_than_another_is_right_to_its_own_step_from_the_second_round_on():
    rounds = Rounds((500, 300), (0.05, 0.00005))
    off, largest, first, cut, _ = rounds.next()
    assert (first.halvings, cut) == ((0, 0), 0)
    assert off[1] > 10 * largest[1]  # lost in the rounding
    alone = off[1]
    off, _, second, cut, bounds = rounds.next()
    assert (second.halvings[1], cut) == (4, 0)
    assert (off <= bounds).all()
    assert bounds[1] < alone  # which the first round was not
    for _ in range(6):
        off, largest, g, cut, bounds = rounds.next()
        assert cut == 0
        assert (off <= bounds).all()
    assert g.halvings[1] - g.halvings[0] in (9, 10, 11)  # a thousand times
    assert off[1] < largest[1] / 10


def test_a_burst_beyond_the_scale_is_cut_and_counted_and_the_scale_relaxes():
    rounds = Rounds((500, 300), (0.05, 0.01))
    for _ in range(5):
        *_, g, cut, _ = rounds.next()
        assert cut == 0
    before = rounds.scales
    *_, cut, _ = rounds.next(times=64)
    assert cut > 1e-4 * 20 * 800
    assert rounds.scales == Scales(tuple(k - 2 for k in before.halvings), 2)
    for _ in range(4):
        *_, g, cut, _ = rounds.next()
        assert cut == 0
    assert all(k <= had - 1 for k, had in zip(g.halvings, before.halvings, strict=True))


def test_a_single_number_is_found_again_where_its_mean_was_zero_by_chance():
    """Its range comes down by one halving at most, and goes up as soon as a mean says so."""
    rounds = Rounds((800, 1), (0.05, 0.01), seed=4)
    cuts = [rounds.next()[3] for _ in range(14)]
    assert sum(cuts) <= 3  # of 280 that clients have sent of it
    assert rounds.scales.halvings[1] >= 5
