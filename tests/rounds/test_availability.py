"""When a device is there."""

from math import inf

import pytest

from fedpeft.rounds.availability import ALWAYS, every


@pytest.mark.parametrize(
    ("time", "want"),
    [(0, (2, 5)), (2, (2, 5)), (4.9, (2, 5)), (5, (8, 9)), (8.5, (8, 9)), (9, (inf, inf))],
)
def test_the_window_that_is_open_or_comes_next(time, want):
    assert every([(8, 9), (2, 5)]).window(time) == want


@pytest.mark.parametrize(
    ("time", "want"),
    [(0, (3, 7)), (6, (3, 7)), (7, (13, 17)), (1003.5, (1003, 1007)), (1008, (1013, 1017))],
)
def test_windows_come_again_after_their_period_and_later_by_their_shift(time, want):
    assert every([(1, 5)], period=10, shift=2).window(time) == want


def test_a_window_may_reach_over_the_end_of_its_period():
    night = every([(22, 30)], period=24)
    assert night.window(3) == (-2, 6)
    assert night.window(10) == (22, 30)
    assert night.window(26) == (22, 30)
    assert every([(0, 6), (22, 24)], period=24).window(3) == (-2, 6)  # the same, said in two parts


def test_windows_that_touch_are_one_so_that_nobody_goes_away_between_them():
    assert every([(1, 2), (2, 4)]).window(1.5) == (1, 4)
    assert every([(0, 12), (12, 24)], period=24).window(1e6) == (-inf, inf)


def test_a_device_without_windows_is_always_there():
    assert ALWAYS.window(1e9) == (-inf, inf)
    assert ALWAYS.is_open(0)
    assert not every([(8, 9)]).is_open(7.9)


@pytest.mark.parametrize(
    ("windows", "period", "why"),
    [
        ([], None, "no windows"),
        ([(3, 3)], None, "0 <= from < to"),
        ([(-1, 3)], None, "0 <= from < to"),
        ([(1, 2, 3)], None, "pairs"),
        ([(0, inf)], None, "pairs"),
        ([(0, 3), (2, 4)], None, "overlap"),
        ([(0, 25)], 24, "within a period"),
        ([(25, 26)], 24, "within a period"),
        ([(0, 3), (20, 28)], 24, "within a period"),
    ],
)
def test_what_are_no_windows_is_refused(windows, period, why):
    with pytest.raises(ValueError, match=why):
        every(windows, period)
