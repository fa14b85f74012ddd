"""An order of all clients by a seed: each place once, nothing kept, and no place likelier than another."""

import numpy as np
import pytest

from fedpeft.rounds import place
from fedpeft.rounds.places import whole_parts


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5, 8, 16, 17, 20, 33, 100, 257])
def test_each_place_is_one_clients(clients):
    for seed in (0, 1):
        assert sorted(place(c, clients, seed) for c in range(clients)) == list(range(clients))


def test_a_client_is_equally_likely_in_each_place():
    draws = 2000
    for clients in (3, 5, 8):
        seen = np.bincount([place(1, clients, seed) for seed in range(draws)], minlength=clients)
        spread = np.sqrt(draws * (1 / clients) * (1 - 1 / clients))
        assert np.abs(seen - draws / clients).max() < 4.5 * spread  # 16 counts, each within 4.5 deviations


def test_neighbours_are_not_kept_together():
    gaps = [abs(place(1, 100, seed) - place(0, 100, seed)) for seed in range(500)]
    # Of two random places of 100 the mean gap is 33.7 with a deviation of 23.6: 5 standard errors of 500.
    np.testing.assert_allclose(np.mean(gaps), 101 / 3, atol=5 * 23.6 / np.sqrt(500))


def test_a_million_clients_cost_no_more_than_a_few_hashes():
    places = [place(c, 10**6, 3) for c in (0, 1, 999_999)]
    assert places == [place(c, 10**6, 3) for c in (0, 1, 999_999)]
    assert len(set(places)) == 3
    assert all(0 <= x < 10**6 for x in places)


def test_places_stay_the_same_from_version_to_version():
    assert [place(c, 10, 7) for c in range(10)] == GOLDEN


@pytest.mark.parametrize("client", [-1, 5])
def test_a_client_that_is_none_of_them_is_refused(client):
    with pytest.raises(ValueError, match=f"^client: got {client}; want 0 to 4$"):
        place(client, 5, 0)


@pytest.mark.parametrize(
    ("shares", "total", "counts"),
    [
        ((1, 1, 1), 20, [7, 7, 6]),
        ((1, 2, 2), 9, [2, 4, 3]),
        ((0.5, 0.0, 0.5), 5, [3, 0, 2]),
        ((1, 1), 0, [0, 0]),
        ((3.0,), 7, [7]),
        ((1, 1, 4), 5, [1, 1, 3]),
    ],
)
def test_shares_become_whole_numbers_with_the_largest_remainders_rounded_up(shares, total, counts):
    assert whole_parts(shares, total) == counts


GOLDEN = [3, 5, 8, 9, 7, 1, 4, 2, 0, 6]
