from fractions import Fraction
from math import comb

import pytest

from fedpeft.secagg.degrees import Degrees, degrees

# n, corrupt, dropouts, malicious, k, threshold at sigma = 40 and eta = 20: values of Google's federated-compute,
# fcp/secagg/server/graph_parameter_finder_test.cc.
GOLDEN = [
    (100, 0.45, 0.45, False, 92, 46),
    (1000, 0.45, 0.45, False, 822, 417),
    (100, 0.33, 0.33, False, 68, 34),
    (1000, 0.33, 0.33, False, 286, 150),
    (10000, 0.33, 0.33, False, 422, 221),
    (100, 0.3, 0.3, True, 92, 62),
    (1000, 0.3, 0.3, True, 872, 584),
    (100, 0.05, 0.33, False, 28, 6),
    (1000, 0.05, 0.33, False, 72, 24),
    (100, 0.05, 0.33, True, 72, 39),
    (1000, 0.05, 0.33, True, 398, 223),
    (100, 0.33, 0.05, False, 34, 29),
    (1000, 0.33, 0.05, False, 78, 60),
    (100, 0.33, 0.05, True, 42, 37),
    (1000, 0.33, 0.05, True, 132, 109),
    (100, 0.05, 0.05, False, 12, 6),
    (1000, 0.05, 0.05, False, 30, 17),
    (100, 0.05, 0.05, True, 16, 11),
    (1000, 0.05, 0.05, True, 52, 37),
    (10000, 0.05, 0.05, True, 62, 44),
    (1000, 0.33, 0.0, False, 38, 36),
    (1000, 0.0, 0.33, False, 38, 2),
    (1000, 0.0, 0.33, True, 228, 115),
    (10, 0.33, 0.33, False, 8, 4),
    (10, 0.05, 0.33, True, 8, 5),
]

# k / least-largest threshold at sigma = 40 and eta = 30, for n = 50, 100, 200, 500, 1000.
SIZES = (50, 100, 200, 500, 1000)
SEMI_HONEST = {
    (0.05, 0.05): "6/3-4 12/6-7 22/11-12 30/16-17 34/18-19",
    (0.05, 0.10): "8/3 16/6 26/11 36/17 40/19",
    (0.10, 0.10): "12/6-7 22/11-12 36/19-20 46/25 52/28",
    (0.10, 0.20): "16/6 30/11-12 48/21 66/29-30 74/33",
    (0.10, 0.30): "22/6-7 36/11 60/21 88/33 102/39",
    (0.20, 0.20): "22/11-12 42/21-22 68/36 98/51-52 112/59",
    (0.33, 0.10): "22/17 42/32 68/48 98/67 114/78",
}
MALICIOUS = {
    (0.05, 0.05): "8/6 16/11 32/22 52/36 62/43",
    (0.05, 0.10): "14/9 26/16 48/30 76/49 90/58",
    (0.10, 0.10): "16/11 32/22 60/41 94/64 114/78",
    (0.10, 0.20): "26/16 52/32 96/59 174/109 226/142",
    (0.20, 0.20): "32/22 62/42 122/82 240/162 340/229",
}


def cells(table):
    return [(n, *key, cell) for key, row in table.items() for n, cell in zip(SIZES, row.split(), strict=True)]


@pytest.mark.parametrize(("n", "corrupt", "dropouts", "malicious", "k", "threshold"), GOLDEN)
def test_degrees_have_their_golden_values(n, corrupt, dropouts, malicious, k, threshold):
    found = degrees(n, corrupt, dropouts, malicious, sigma=40, eta=20)
    assert (found.k, found.least_threshold) == (k, threshold)


@pytest.mark.parametrize(("n", "corrupt", "dropouts", "cell"), cells(SEMI_HONEST))
def test_degrees_against_a_semi_honest_server(n, corrupt, dropouts, cell):
    found = degrees(n, corrupt, dropouts, malicious=False)
    k, _, thresholds = cell.partition("/")
    least, _, largest = thresholds.partition("-")
    assert found == Degrees(int(k), int(least), int(largest or least))


@pytest.mark.parametrize(("n", "corrupt", "dropouts", "cell"), cells(MALICIOUS))
def test_degrees_against_a_malicious_server(n, corrupt, dropouts, cell):
    found = degrees(n, corrupt, dropouts, malicious=True)
    assert f"{found.k}/{found.least_threshold}" == cell


def at_least(n, marked, k, x):
    """The exact chance of x marked ones or more among k of n."""
    ways = sum(
        comb(marked, i) * comb(n - marked, k - i) for i in range(max(x, 0), min(k, marked) + 1) if k - i <= n - marked
    )
    return Fraction(ways, comb(n, k))


def connected(n, bad, k, sigma):
    if k > bad:
        return True
    split = Fraction(n * (n - k - 1), 2) * Fraction(comb(n - k, bad - k), comb(n, bad))
    return split < Fraction(1, 2 ** (sigma + 1))


def secure(n, bad, k, threshold, sigma, malicious):
    most = 2 * threshold - k if malicious else threshold  # so many corrupt neighbours are too many
    return at_least(n, bad, k, most) <= Fraction(1, 2 ** (sigma + 1) * n)


def finishes(n, stay, k, threshold, eta):
    return 1 - at_least(n, stay, k, threshold) < Fraction(1, 2**eta * n)


@pytest.mark.parametrize("malicious", [False, True])
@pytest.mark.parametrize(("n", "bad", "lost"), [(60, 3, 6), (60, 12, 3), (100, 5, 20), (120, 30, 12)])
@pytest.mark.parametrize(("sigma", "eta"), [(20, 10), (40, 30)])
def test_degrees_are_the_least_that_the_exact_chances_allow(n, bad, lost, sigma, eta, malicious):
    fits = {
        k: [
            t
            for t in range(2, k + 1)
            if connected(n, bad + lost, k, sigma)
            and secure(n, bad, k, t, sigma, malicious)
            and finishes(n, n - lost, k, t, eta)
        ]
        for k in range(2, n - 1, 2)
    }
    wanted = next((k for k, ts in fits.items() if ts), None)
    if wanted is None:
        with pytest.raises(ValueError, match="no number of neighbours"):
            degrees(n, bad / n, lost / n, malicious, sigma, eta)
    else:
        found = degrees(n, bad / n, lost / n, malicious, sigma, eta)
        assert found == Degrees(wanted, fits[wanted][0], fits[wanted][-1])


def test_a_share_that_is_a_whole_number_of_clients_is_taken_as_that():
    # 0.29 * 100 is 28.999999999999996 in binary.
    assert degrees(100, 0.29, 0.29, malicious=False) == degrees(100, 0.295, 0.29, malicious=False)


def test_nobody_corrupt_still_needs_two_shares():
    assert degrees(100, 0.0, 0.0, malicious=False) == Degrees(2, 2, 2)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_a_cohort_that_is_too_small_needs_the_full_graph(n):
    with pytest.raises(ValueError, match=f"no number of neighbours below {n - 1} is enough for {n} clients"):
        degrees(n, 0.3, 0.3, malicious=True)


def test_an_error_says_what_to_do():
    with pytest.raises(ValueError, match="45% are corrupt and 50% are lost; take the full graph, or a larger cohort"):
        degrees(100, 0.45, 0.5, malicious=True)


@pytest.mark.parametrize(
    ("n", "corrupt", "dropouts"), [(1, 0, 0), (100, -0.1, 0.5), (100, 1.0, 0), (100, 0, -0.1), (100, 0, 1)]
)
def test_shares_and_cohorts_that_cannot_be_are_refused(n, corrupt, dropouts):
    with pytest.raises(ValueError, match="want at least 2 clients, and shares that leave some"):
        degrees(n, corrupt, dropouts, malicious=False)
