"""Who takes part in a round."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.rounds import Selection, derive


@pytest.mark.parametrize(
    ("selection", "clients", "wanted", "least", "asked"),
    [
        (Selection(), 7, 7, 4, 7),
        (Selection(0.5), 20, 10, 5, 10),
        (Selection(0.1), 3, 1, 1, 1),
        (Selection(0.3), 10, 3, 2, 3),
        (Selection(0.66), 10, 7, 4, 7),
        (Selection(count=3), 10, 3, 2, 3),
        (Selection(0.9, count=3), 10, 3, 2, 3),
        (Selection(count=30), 10, 10, 5, 10),
        (Selection(count=10, over=0.1), 100, 10, 5, 11),
        (Selection(count=20, over=0.1), 100, 20, 10, 22),
        (Selection(count=10, over=0.11), 100, 10, 5, 12),
        (Selection(count=10, over=2.0), 25, 10, 5, 25),
        (Selection(count=20, quorum=0.55), 20, 20, 11, 20),
        (Selection(count=25, quorum=0.28), 25, 25, 7, 25),
        (Selection(count=10, quorum=1.0), 10, 10, 10, 10),
        (Selection(count=10, quorum=0.01), 10, 10, 1, 10),
        (Selection(1e-3), 0, 1, 1, 0),
    ],
    ids=repr,
)
def test_counts_are_exact(selection, clients, wanted, least, asked):
    assert selection.wanted(clients) == wanted
    assert selection.least(clients) == least
    assert len(selection.choose(range(clients), 1, 0)) == asked


@given(
    clients=st.sets(st.integers(0, 10**6), min_size=1, max_size=40),
    seed=st.integers(0, 10**9),
    round_=st.integers(0, 99),
    fraction=st.floats(0.01, 1),
)
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_a_cohort_is_distinct_clients_ascending_whatever_order_they_come_in(clients, seed, round_, fraction):
    selection = Selection(fraction)
    got = selection.choose(sorted(clients), seed, round_)
    assert set(got) <= clients
    assert list(got) == sorted(set(got))
    assert len(got) == selection.wanted(len(clients)) <= len(clients)
    assert selection.choose(sorted(clients, reverse=True), seed, round_) == got
    assert all(type(client) is int for client in got)


def test_each_round_and_each_seed_draws_anew():
    selection = Selection(0.5)
    cohorts = {selection.choose(range(30), seed, round_) for seed in range(5) for round_ in range(5)}
    assert len(cohorts) == 25  # 155 million cohorts are possible


def test_every_client_is_chosen_as_often_as_its_share():
    rounds = 400
    seen = np.bincount([c for r in range(rounds) for c in Selection(0.3).choose(range(10), 7, r)], minlength=10)
    assert seen.sum() == 3 * rounds
    # a client's count has deviation √(400·0.3·0.7) = 9.2; 4 of them over 10 clients fail once in 1500 seeds
    np.testing.assert_allclose(seen, 0.3 * rounds, atol=4 * 9.2)


def test_cohorts_stay_the_same_from_version_to_version():
    assert Selection(0.3).choose(range(20), 1, 0) == (4, 10, 12, 14, 15, 16)
    assert Selection(count=4, over=0.5).choose([3, 1, 4, 15, 9, 2, 6, 5, 35, 8], 2, 7) == (1, 2, 4, 6, 9, 35)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0.0}, "fraction: got 0.0; want more than 0 and at most 1"),
        ({"fraction": 1.01}, "fraction: got 1.01; want more than 0 and at most 1"),
        ({"fraction": float("nan")}, "fraction: got nan"),
        ({"count": 0}, "count: got 0; want at least 1"),
        ({"over": -0.1}, "over: got -0.1; want 0 or more"),
        ({"quorum": 0.0}, "quorum: got 0.0; want more than 0 and at most 1"),
        ({"quorum": 1.1}, "quorum: got 1.1; want more than 0 and at most 1"),
        ({"deadline": 0.0}, "deadline: got 0.0; want more than 0 seconds"),
        ({"rest": -1}, "rest: got -1; want 0 or more rounds"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Selection(**settings)


def test_settings_at_the_edge_are_good():
    Selection(fraction=1.0, count=1, over=0.0, quorum=1.0, deadline=1e-3)


def before(selection, clients, seed, round_):
    """The draw as it was when all clients were laid out in an array."""
    asked = min(len(clients), selection.wanted(len(clients)))
    rng = np.random.default_rng(derive(seed, "select", round_))
    return tuple(sorted(int(x) for x in rng.choice(sorted(clients), size=asked, replace=False)))


@pytest.mark.parametrize("clients", [1, 7, 100, 9_999, 10_001, 60_000])  # numpy's ways of drawing change at 10,000
@pytest.mark.parametrize("count", [1, 40, 150, 1_000, 5_000])  # and at a fiftieth
def test_a_range_gives_the_cohorts_that_an_array_gave(clients, count):
    selection = Selection(count=count)
    for round_ in range(2):
        got = selection.choose(range(clients), 3, round_)
        assert got == selection.choose(list(range(clients)), 3, round_) == before(selection, range(clients), 3, round_)


def test_a_range_that_does_not_begin_at_zero_or_falls_gives_the_same():
    selection = Selection(count=5)
    assert selection.choose(range(10, 40, 3), 1, 2) == before(selection, range(10, 40, 3), 1, 2)
    assert selection.choose(range(40, 10, -3), 1, 2) == before(selection, range(40, 10, -3), 1, 2)


def test_a_cohort_of_a_million_clients_takes_little_memory():
    def peak(clients):
        tracemalloc.start()
        Selection(count=100).choose(range(clients), 1, 0, resting=range(0, clients, clients // 50))
        got = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return got

    peak(1_000)  # what numpy makes at its first use
    assert peak(10**9) < 100_000  # an index array would take 8 GB


@given(
    clients=st.sets(st.integers(0, 60), min_size=2, max_size=30),
    resting=st.sets(st.integers(0, 60), max_size=30),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_who_rests_is_not_asked_and_the_others_are_as_likely_as_without_them(clients, resting, seed):
    others = clients - resting
    got = Selection(count=4).choose(sorted(clients), seed, 5, resting=resting)
    assert set(got) <= others
    assert len(got) == min(4, len(others))
    assert got == Selection(count=4).choose(sorted(others), seed, 5)


def test_a_fraction_is_of_all_clients_and_not_of_those_that_are_there():
    assert len(Selection(0.5).choose(range(8), 1, 0, known=20)) == 8
    assert len(Selection(0.2).choose(range(8), 1, 0, known=20)) == 4
