import itertools
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import ProtocolError
from fedpeft.secagg import shamir
from fedpeft.secagg.shamir import PRIME, SIZE, combine, split

SECRETS = st.binary(min_size=32, max_size=32)


def entropy(seed):
    return random.Random(seed).randbytes


def polynomial(*coefficients):
    """What draws these coefficients."""
    return lambda size: b"".join(c.to_bytes(40, "big") for c in coefficients)


def is_prime(n):
    """Miller and Rabin's test with the first 15 primes: wrong for a composite with a chance below 4^-15."""
    d = n - 1
    twos = (d & -d).bit_length() - 1
    d >>= twos
    for a in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47):
        x = pow(a, d, n)
        powers = [pow(x, 2**i, n) for i in range(twos)]
        if x != 1 and n - 1 not in powers:
            return False
    return True


def test_the_prime_is_the_smallest_above_all_secrets():
    assert next(2**256 + i for i in range(1, 400, 2) if is_prime(2**256 + i)) == PRIME
    assert (PRIME.bit_length() + 7) // 8 == SIZE


def test_shares_have_their_golden_values():
    shares = split(bytes(range(1, 33)), 3, [1, 2, 3], polynomial(7, 11))
    common = "00" + bytes(range(1, 32)).hex()
    assert [x.hex() for x in shares] == [common + "32", common + "5a", common + "98"]


def test_a_share_is_the_polynomials_value():
    degree = 40  # more than two of the blocks that Horner's rule works in
    draw = random.Random(3)
    drawn = [draw.randrange(2**320) for _ in range(degree)]
    secret = draw.randbytes(32)
    points = [1, 2, 255, 256, 65535, *range(1000, 1040)]
    shares = split(secret, degree + 1, points, polynomial(*drawn))
    constant = int.from_bytes(secret, "big")
    for x, share in zip(points, shares, strict=True):
        want = (constant + sum(c * x**power for power, c in enumerate(drawn, 1))) % PRIME
        assert share == want.to_bytes(33, "big")


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(SECRETS, st.data())
def test_any_threshold_shares_give_the_secret(secret, data):
    points = data.draw(st.lists(st.integers(1, 65535), min_size=1, max_size=24, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    shares = split(secret, threshold, points, entropy(data.draw(st.integers(0, 999))))
    assert [len(x) for x in shares] == [33] * len(points)
    some = data.draw(st.permutations(list(zip(points, shares, strict=True))))
    taken = data.draw(st.integers(threshold, len(points)))
    assert combine(some[:taken], threshold) == secret
    with pytest.raises(ProtocolError, match=f"shares for {threshold - 1} points; want at least {threshold}"):
        combine(some[: threshold - 1] * 3, threshold)


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, b"\0" * 31 + b"\1", b"\1" + b"\0" * 31])
def test_extreme_secrets_are_shared(secret):
    shares = split(secret, 3, range(1, 6), entropy(1))
    for chosen in itertools.combinations(enumerate(shares, 1), 3):
        assert combine(chosen, 3) == secret


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(SECRETS, SECRETS, st.integers(0, 999))
def test_shares_below_the_threshold_fit_every_secret(secret, other, seed):
    shares = split(secret, 3, [1, 2, 3], entropy(seed))
    # With 2 of 3 shares, some third share leads to any other secret: the two say nothing about which it was.
    y1, y2 = (int.from_bytes(x, "big") for x in shares[:2])
    wanted = int.from_bytes(other, "big")
    third = (wanted - 3 * y1 + 3 * y2) % PRIME  # f(0) = 3 f(1) - 3 f(2) + f(3) for a polynomial of degree 2
    assert combine([(1, shares[0]), (2, shares[1]), (3, third.to_bytes(33, "big"))], 3) == other


def test_shares_look_uniform_whatever_the_secret():
    draw = entropy(5)
    first = [split(bytes(32), 2, [1, 2], draw)[0] for _ in range(4000)]
    counts = [0] * 256
    for share in first:
        counts[share[1]] += 1  # the top byte of 256 bits
    chi = sum((c - 4000 / 256) ** 2 / (4000 / 256) for c in counts)
    assert chi < 255 + 5 * (2 * 255) ** 0.5  # 5 standard deviations of a chi-square with 255 degrees of freedom


def test_every_call_draws_its_own_polynomial():
    draw = entropy(2)
    assert split(bytes(32), 2, [1, 2], draw) != split(bytes(32), 2, [1, 2], draw)


def test_a_share_of_another_polynomial_does_not_go_unseen():
    shares = dict(enumerate(split(b"s" * 32, 3, range(1, 6), entropy(1)), 1))
    wrong = (int.from_bytes(shares[2], "big") + 1) % PRIME
    try:
        found = combine([(1, shares[1]), (2, wrong.to_bytes(33, "big")), (5, shares[5])], 3)
    except ProtocolError:
        return
    assert found != b"s" * 32


def test_a_result_beyond_all_secrets_is_refused():
    for value in (2**256, PRIME - 1):
        with pytest.raises(ProtocolError, match="no secret"):
            combine([(1, value.to_bytes(33, "big"))], 1)
    assert combine([(1, (2**256 - 1).to_bytes(33, "big"))], 1) == b"\xff" * 32


@pytest.mark.parametrize(
    "bad",
    [
        (0, bytes(33)),
        (-1, bytes(33)),
        (65536, bytes(33)),
        (3, bytes(32)),
        (3, bytes(34)),
        (3, b""),
        (3, PRIME.to_bytes(33, "big")),
        (3, b"\xff" * 33),
    ],
)
def test_a_share_out_of_range_is_refused(bad):
    good = list(enumerate(split(b"s" * 32, 2, [1, 2], entropy(1)), 1))
    with pytest.raises(ProtocolError, match=f"the share for point {bad[0]} is out of range"):
        combine([*good, bad], 2)


def test_the_largest_share_and_the_outermost_points_are_taken():
    points = [1, 65535]
    shares = split(b"s" * 32, 2, points, entropy(1))
    assert combine(list(zip(points, shares, strict=True)), 2) == b"s" * 32
    slope = PRIME - 2  # f(x) = 1 - 2x, so f(1) is the largest number there is
    shares = split(b"\0" * 31 + b"\1", 2, [1, 2], polynomial(slope))
    assert shares[0] == (PRIME - 1).to_bytes(33, "big")
    assert combine([(1, shares[0]), (2, shares[1])], 2) == b"\0" * 31 + b"\1"


def test_one_share_twice_counts_once_and_two_for_one_point_are_refused():
    shares = list(enumerate(split(b"s" * 32, 2, [1, 2], entropy(1)), 1))
    assert combine([shares[0], shares[0], shares[1]], 2) == b"s" * 32
    with pytest.raises(ProtocolError, match="shares for 1 points; want at least 2"):
        combine([shares[0], shares[0]], 2)
    with pytest.raises(ProtocolError, match="two different shares for point 1"):
        combine([*shares, (1, shares[1][1])], 2)


def test_errors_never_show_a_share():
    shares = list(enumerate(split(b"s" * 32, 2, [1, 2], entropy(1)), 1))
    for bad in ([(1, shares[0][1][:-1]), shares[1]], [*shares, (1, shares[1][1])], shares[:1]):
        with pytest.raises(ProtocolError) as raised:
            combine(bad, 2)
        for _, share in shares:
            assert share.hex() not in str(raised.value)
            assert repr(share) not in str(raised.value)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_secret_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match=f"a secret of {size} bytes; want 32"):
        split(bytes(size), 2, [1, 2], entropy(1))


@pytest.mark.parametrize("threshold", [0, -1, 3])
def test_a_threshold_that_cannot_be_is_refused(threshold):
    with pytest.raises(ValueError, match=f"a threshold of {threshold} among 2 holders"):
        split(bytes(32), threshold, [1, 2], entropy(1))


def test_combining_needs_a_threshold_of_one_at_least():
    with pytest.raises(ValueError, match="a threshold of 0"):
        combine([(1, bytes(33))], 0)


@pytest.mark.parametrize("points", [[1, 1], [0, 1], [1, 65536], [-1, 1]])
def test_points_must_be_distinct_and_in_range(points):
    with pytest.raises(ValueError, match="points must be distinct and from 1 to 65535"):
        split(bytes(32), 2, points, entropy(1))


@pytest.mark.parametrize("given", [79, 81])
def test_entropy_that_gives_another_amount_is_refused(given):
    with pytest.raises(ValueError, match=f"entropy gave {given} bytes; want 80"):
        split(bytes(32), 3, [1, 2, 3], lambda size: bytes(given))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 65535), min_size=1, max_size=12, unique=True))
def test_lagranges_coefficients_are_those_of_the_rationals(points):
    want = []
    for x in points:
        c = Fraction(1)
        for other in points:
            if other != x:
                c *= Fraction(other, other - x)
        want.append(c.numerator * pow(c.denominator, -1, PRIME) % PRIME)
    assert list(shamir._at_zero(tuple(points))) == want


def test_coefficients_of_one_holder_set_are_computed_once_and_the_cache_is_bounded():
    shamir._at_zero.cache_clear()
    shares = list(enumerate(split(b"s" * 32, 5, range(1, 10), entropy(1)), 1))
    for _ in range(7):
        combine(shares, 5)
    found = shamir._at_zero.cache_info()
    assert (found.misses, found.hits) == (1, 6)
    assert found.maxsize == 256
