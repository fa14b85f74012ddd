"""Seeds for every random choice."""

import numpy as np
import pytest

from fedpeft.rounds import derive

PURPOSES = (
    *("select", "train", "split", "start", "partition", "baseline", "device", "evaluate"),
    *("rank", "order", "hostile", "personal", "lost", "code", "runtime"),
)


def test_no_two_places_of_a_run_share_a_seed():
    paths = [(), (0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), (10,), (2**32,), (2**32, 1), (2**40,), (-1,)]
    paths += [(round_, client) for round_ in range(2, 22) for client in range(40)]
    seeds = [0, 1, 2, 3, 10, 2**31, 2**32, 2**32 + 1, 2**63, -1]
    places = [(seed, purpose, *path) for seed in seeds for purpose in PURPOSES for path in paths]
    assert len({derive(*place) for place in places}) == len(places)  # 73080 of 2^63: chance of a collision 1e-10


def test_seeds_have_63_bits_and_use_them_all():
    seeds = [derive(1, "train", r, c) for r in range(20) for c in range(20)]
    assert all(type(x) is int and 0 <= x < 2**63 for x in seeds)
    ones = np.array([[x >> bit & 1 for bit in range(63)] for x in seeds]).mean(axis=0)
    np.testing.assert_allclose(ones, 0.5, atol=5 * 0.5 / 20)  # 5 deviations of 400 coin throws


def test_seeds_stay_the_same_from_version_to_version():
    for place, want in GOLDEN.items():
        assert derive(*place) == want


def test_numbers_of_numpy_give_the_same_seed():
    assert derive(np.int64(3), "split", np.int32(5)) == derive(3, "split", 5)


def test_an_unknown_purpose_is_refused():
    with pytest.raises(ValueError, match="purpose: got 'chance'; want one of select, train, split, start,"):
        derive(1, "chance")


GOLDEN = {
    (0, "select"): 8518288790641780733,
    (1, "select", 0): 3546700373232557155,
    (1, "train", 3, 17): 122602928432204739,
    (1, "split", 5): 3232265439908591922,
    (7, "start"): 7939902590247533198,
    (2**40, "partition", 0): 6463546916760815719,
    (1, "baseline", 2): 8718249414157352871,
}
