"""Devices and their schedule, by times worked out by hand."""

from collections import Counter
from math import inf, log

import numpy as np
import pytest

from fedpeft.rounds import PACKAGED, Availability, Device, Errand, Population, populate, trained_rows

# 1,000 bytes at 4 kbit/s: 2 s; 1,000 tokens at 100 a second: 10 s; 500 bytes at 1 kbit/s: 4 s; latency 2 x 0.5 s.
SLOW = Device(tokens_per_second=100, down="4kbit/s", up=1e3, latency=0.5)
ERRAND = Errand(down=1000, tokens=1000, up=500)
TAKES = 2 + 10 + 4 + 1


def one(device, seed=0):
    return populate({"only": device}, 1, 1e6, seed)


def test_an_answer_takes_as_long_as_fetching_training_and_sending():
    visit = one(SLOW).visit(0, 0, ERRAND, asked=3.0, free=0.0, expires=inf)
    assert (visit.began, visit.ended, visit.fate) == (3.0, 3.0 + TAKES, "done")


@pytest.mark.parametrize(
    ("expires", "fate"), [(3 + TAKES, "done"), (3 + TAKES - 0.01, "late"), (3.01, "late"), (3.0, "away")]
)
def test_an_answer_counts_until_its_message_expires(expires, fate):
    assert one(SLOW).visit(0, 0, ERRAND, asked=3.0, free=0.0, expires=expires).fate == fate


def test_a_busy_device_begins_when_it_is_free():
    visit = one(SLOW).visit(0, 0, ERRAND, asked=3.0, free=20.0, expires=inf)
    assert (visit.began, visit.ended) == (20.0, 20.0 + TAKES)


def test_a_device_that_is_away_begins_when_it_is_back_and_loses_all_when_it_goes_away():
    hours = ((1.0, 1.01), (2.0, 3.0))
    device = Device(tokens_per_second=100, down="4kbit/s", up=1e3, latency=0.5, online_hours=hours)
    first = one(device).visit(0, 0, ERRAND, asked=0.0, free=0.0, expires=inf)
    assert (first.began, first.ended, first.fate) == (3600.0, 3600.0 + TAKES, "done")
    # At 3,620 s, 16 s are left of the window, and 17 are needed.
    second = one(device).visit(0, 0, ERRAND, asked=3620.0, free=0.0, expires=inf)
    assert (second.began, second.ended, second.fate) == (3620.0, 3636.0, "lost")
    third = one(device).visit(0, 0, ERRAND, asked=3636.0, free=0.0, expires=7200.0)
    assert (third.began, third.ended, third.fate) == (7200.0, 7200.0, "away")
    never = one(device).visit(0, 0, ERRAND, asked=3 * 3600.0, free=0.0, expires=4 * 3600.0)
    assert never.fate == "away"


def test_what_can_not_be_done_is_said_without_training_or_sending():
    assert one(SLOW).duration(0, 0, Errand(1000, 1000, 500, "out of memory")) == 3.0


def test_each_kind_has_its_share_of_the_clients_and_who_is_which_follows_from_the_seed():
    devices = {"a": Device(share=5, gflops=1), "b": Device(share=3, gflops=1), "c": Device(share=2, gflops=1)}
    people = populate(devices, 200, 1e6, seed=1)
    assert Counter(people.name(c) for c in range(200)) == {"a": 100, "b": 60, "c": 40}
    assert Counter(populate(devices, 7, 1e6, 1).name(c) for c in range(7)) == {"a": 4, "b": 2, "c": 1}  # 3.5, 2.1, 1.4
    assert (people.kinds == populate(devices, 200, 1e6, seed=1).kinds).all()
    assert (people.kinds != populate(devices, 200, 1e6, seed=2).kinds).any()
    assert (people.kinds[:100] != 0).any()  # not in order


def test_jitter_is_drawn_for_each_client_and_round_and_its_logarithm_has_the_stated_spread():
    people = populate({"x": Device(tokens_per_second=100, jitter=0.4, latency=1.0)}, 40, 1e6, seed=5)
    plain = 2.0 + 10.0
    ratios = np.array([[people.duration(c, r, Errand(0, 1000, 0)) / plain for r in range(25)] for c in range(40)])
    again = populate({"x": Device(tokens_per_second=100, jitter=0.4, latency=1.0)}, 40, 1e6, seed=5)
    assert again.duration(3, 7, Errand(0, 1000, 0)) == ratios[3, 7] * plain
    assert len(np.unique(ratios)) == 1000
    # 1,000 draws: the mean is within 4 standard errors, 0.4 / sqrt(1000), of 0; the deviation within 4 of its own.
    assert abs(np.log(ratios).mean()) < 4 * 0.4 / 1000**0.5
    assert abs(np.log(ratios).std() - 0.4) < 4 * 0.4 / 2000**0.5


def test_windows_are_shifted_for_each_client():
    day = Device(gflops=1, online_hours=((0, 8),), period_hours=24, spread_hours=24)
    people = populate({"phone": day}, 300, 1e6, seed=3)
    there = np.array([[people.availability(c).is_open(3600.0 * h) for h in range(24)] for c in range(300)])
    assert (there.sum(axis=1) == 8).all()  # each for eight hours a day
    assert 50 < there.sum(axis=0).min() < there.sum(axis=0).max() < 150  # a third of 300 at any time, 6 deviations of 8


def test_clients_of_a_kind_with_traces_draw_one_each():
    traces = [Availability(((float(i), i + 0.5),)) for i in range(3)]
    people = Population(("x",), (Device(gflops=1),), np.zeros(60, np.int64), (1.0,), 4, {"x": traces})
    drawn = Counter(people.availability(c).window(0)[0] for c in range(60))
    assert set(drawn) == {0.0, 1.0, 2.0}
    assert min(drawn.values()) > 5


def test_tokens_a_second_follow_from_the_model_where_a_device_states_its_arithmetic():
    assert Device(gflops=8).speed(20e6) == pytest.approx(8e9 / (4 * 20e6))
    assert Device(tokens_per_second=70).speed(20e6) == 70


def test_rates_and_sizes_are_read_with_their_units():
    device = Device(gflops=1, up="5Mbit/s", down=2.5e6, memory="1.5GB")
    assert (device.bits_up, device.bits_down, device.bytes_memory) == (5e6, 2.5e6, 1.5e9)
    assert Device(gflops=1).bytes_memory == inf


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "tokens_per_second: want it or gflops, and not both"),
        ({"gflops": 1, "tokens_per_second": 1}, "not both"),
        ({"gflops": 0}, "gflops: got 0"),
        ({"gflops": 1, "up": "5Mb"}, "up: got '5Mb'; want bit/s"),
        ({"gflops": 1, "down": "0bit/s"}, "down"),
        ({"gflops": 1, "down": "1.2.3Mbit/s"}, "down"),
        ({"gflops": 1, "memory": "lots"}, "memory"),
        ({"gflops": 1, "share": 0}, "share"),
        ({"gflops": 1, "latency": -1}, "latency"),
        ({"gflops": 1, "jitter": 3}, "jitter"),
        ({"gflops": 1, "online_hours": ((3.0, 1.0),)}, "online_hours: got"),
        ({"gflops": 1, "online_hours": ((0.0, 1.0),), "trace": "x.csv"}, "trace"),
    ],
)
def test_a_device_that_can_not_be_is_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        Device(**fields)


def test_a_fleet_of_no_kinds_is_refused():
    with pytest.raises(ValueError, match="at least one kind"):
        populate({}, 3, 1.0, 0)


def test_the_packaged_kinds_differ_in_every_respect_that_matters():
    assert set(PACKAGED) == {"phone", "laptop", "board", "edge"}
    speeds = [x.speed(1e7) for x in PACKAGED.values()]
    assert log(max(speeds) / min(speeds)) > 4  # a hundredfold
    assert not PACKAGED["edge"].online_hours
    assert PACKAGED["phone"].online_hours


@pytest.mark.parametrize(
    ("rows", "batch", "accumulate", "epochs", "steps", "want"),
    [
        (10, 4, 1, 3, None, 30),
        (10, 4, 1, 1, 2, 8),  # two batches of four
        (10, 4, 1, 1, 3, 10),  # an epoch
        (10, 4, 1, 1, 7, 24),  # two epochs and a batch
        (10, 4, 2, 1, 1, 8),  # two batches a step
        (10, 4, 2, 1, 3, 18),
        (3, 8, 1, 1, 5, 15),  # each step sees all rows
    ],
)
def test_the_rows_that_training_goes_through(rows, batch, accumulate, epochs, steps, want):
    assert trained_rows(rows, batch, accumulate, epochs, steps) == want
