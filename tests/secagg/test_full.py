"""``full`` and ``kregular`` as they are chosen by name: thresholds, degrees, labels."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.secagg import Full, KRegular, Policy, degrees
from fedpeft.secagg.blame import Blame
from tests.secagg.parties import cohort


@pytest.mark.parametrize(
    ("n", "fraction", "t"),
    [
        *[
            (3, 2 / 3, 3),
            (5, 2 / 3, 4),
            (6, 2 / 3, 5),
            (9, 2 / 3, 7),
            (20, 2 / 3, 14),
            (100, 2 / 3, 67),
            (999, 2 / 3, 667),
        ],
        *[(10, 0.5, 6), (11, 0.5, 6), (10, 0.9, 10), (10, 0.7, 8), (30, 0.7, 22)],
    ],
)
def test_more_than_its_fraction_of_a_cohort_is_the_threshold_of_full(n: int, fraction: float, t: int) -> None:
    assert Full(fraction).threshold(n) == t
    assert Full(fraction).degree(n) == n - 1


def test_full_is_safe_from_as_many_as_its_threshold_leaves_room_for() -> None:
    label = Full().label(100)
    assert label.name == "full"
    assert label.corrupt == 33 / 100  # 2 · 67 > 100 + 33
    assert label.dropouts == 1 - 67 / 100
    assert label.trusts[0].startswith("nobody with the server")
    assert "all but 33% of the clients" in label.trusts[1]
    honest = Full(0.5, consistency=False).label(100)
    assert honest.corrupt == 49 / 100  # t - 2: of the 51 who may be all that stay, two must be honest
    assert Full(0.5).label(100).corrupt == 1 / 100  # 2 · 51 > 100 + 1
    assert Full(0.95).label(10).corrupt == 8 / 10
    assert Full().label(3).corrupt == 1 / 3  # of three, two would know the third's from the sum
    assert honest.dropouts == 1 - 51 / 100
    assert honest.trusts[0].startswith("the server, to keep to the protocol")
    assert "sum" in label.hides
    assert any("noise" in x for x in label.misses)


def test_kregular_has_the_degrees_that_its_cohort_needs_and_trusts_its_server() -> None:
    found = KRegular(0.1, 0.2)
    want = degrees.degrees(200, 0.1, 0.2, malicious=True, sigma=40, eta=30)
    assert (found.degree(200), found.threshold(200)) == (want.k, want.largest_threshold) == (96, 59)
    loose = replace(found, consistency=False)
    assert (loose.degree(200), loose.threshold(200)) == (48, 21)
    assert replace(loose, eta=20).degree(200) < 48 or replace(loose, sigma=20).degree(200) < 48
    for each in (found, loose):
        label = each.label(5)
        assert (label.name, label.corrupt, label.dropouts) == ("kregular", 0.1, 0.2)
        assert label.trusts[0].startswith("the server, to keep to the protocol")


def test_a_cohort_that_is_too_small_is_refused() -> None:
    for n in (0, 1, 2):
        with pytest.raises(ValueError, match=f"cohort: got {n} clients; want at least 3"):
            Full().threshold(n)
    for n in (5, 49):
        with pytest.raises(ValueError, match=f"cohort: got {n} clients; kregular wants at least 50.*use full"):
            KRegular().threshold(n)
        with pytest.raises(ValueError, match="use full"):
            KRegular().degree(n)
    assert KRegular().degree(50) == 16


def test_what_can_not_be_is_refused_by_its_key() -> None:
    for fraction in (0.49, 1.0):
        with pytest.raises(ValueError, match=f"fraction: got {fraction}"):
            Full(fraction)
    for key, value in (("corrupt", -0.1), ("corrupt", 1.0), ("dropouts", 1.0), ("sigma", 0), ("eta", 0)):
        with pytest.raises(ValueError, match=f"{key}: got {value}"):
            KRegular(**{key: value})


def test_clients_as_they_come_agree_to_both_as_they_come() -> None:
    policy = Policy()
    for n in (5, 20, 100, 1000):
        assert Full().threshold(n) >= policy.least_threshold(n)
    for n in (50, 100, 200, 1000):
        found = KRegular()
        assert policy.least_threshold(found.degree(n)) <= found.threshold(n) <= found.degree(n) + 1
    run = cohort(50, (3,), suite="kregular", t=KRegular().threshold(50), k=KRegular().degree(50), policy=policy)
    np.testing.assert_array_equal(run.finish(), run.plain(run.ids))


def test_a_server_of_one_suite_does_not_run_another() -> None:
    found = cohort(5)
    with pytest.raises(ValueError, match="suite: got 'full'; want 'kregular'"):
        KRegular().server(found.params, found.roster)
    with pytest.raises(ValueError, match="suite: got 'kregular'; want 'full'"):
        Full().server(replace(found.params, suite="kregular"), found.roster)


def test_whoever_is_in_more_conflicts_is_named_and_what_was_found_out_settles_them() -> None:
    a, b, c, d = b"a", b"b", b"c", b"d"
    found = Blame()
    found.accuse(a, b)
    assert found.culprits == {}
    found.accuse(a, b)
    found.accuse(b, a)
    assert found.culprits == {}  # one conflict, however often
    found.accuse(c, b)
    assert found.culprits == {b: "is in 2 conflicts over what was dealt, the most of those concerned"}
    found.accuse(d, b)
    assert found.culprits.keys() == {b}
    found.find(c, "lied")
    found.find(c, "lied again")
    found.find(d, "lied too")
    assert found.culprits == {c: "lied", d: "lied too"}
    found.find(b, "dealt nonsense")
    assert found.culprits == {b: "dealt nonsense", c: "lied", d: "lied too"}
