"""Shamir's secret sharing of 32 bytes: any ``threshold`` shares give the secret, fewer say nothing about it.

Whole numbers of Python modulo a prime just above 2^256, so the time a call takes depends on the secret. That is
acceptable where shares are made once, of fresh randomness, on a machine whose owner already knows the secret.
Source: Shamir, "How to share a secret", CACM 22(11), 1979.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Final

from fedpeft.errors import ProtocolError
from fedpeft.secagg.protocol import Entropy

PRIME: Final = 2**256 + 297
"""The smallest prime above 2^256, so any 32 bytes are a number below it."""

SIZE: Final = 33
"""Bytes of one share."""

LARGEST_POINT: Final = 2**16 - 1
"""Points travel as two bytes."""

_SECRET: Final = 32
_DRAW: Final = 40  # 320 bits modulo a prime of 257: 2^-63 from uniform


def split(secret: bytes, threshold: int, points: Sequence[int], entropy: Entropy) -> list[bytes]:
    """The share of each point, big-endian: the values of a random polynomial of degree ``threshold`` - 1.

    secret: 32 bytes; points: distinct, from 1 to 65,535. The polynomial is fresh for every call.
    ValueError for a secret of another size, or points or a threshold that can't be.
    """
    if len(secret) != _SECRET:
        raise ValueError(f"a secret of {len(secret)} bytes; want {_SECRET}")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"a threshold of {threshold} among {len(points)} holders; want 1 to {len(points)}")
    if len(set(points)) != len(points) or not all(1 <= x <= LARGEST_POINT for x in points):
        raise ValueError(f"points must be distinct and from 1 to {LARGEST_POINT}")
    drawn = entropy(_DRAW * (threshold - 1))
    if len(drawn) != _DRAW * (threshold - 1):
        raise ValueError(f"entropy gave {len(drawn)} bytes; want {_DRAW * (threshold - 1)}")
    coefficients = [int.from_bytes(drawn[i : i + _DRAW], "big") % PRIME for i in range(0, len(drawn), _DRAW)]
    coefficients.reverse()
    constant = int.from_bytes(secret, "big")
    return [_value(coefficients, constant, x).to_bytes(SIZE, "big") for x in points]


def combine(shares: Sequence[tuple[int, bytes]], threshold: int) -> bytes:
    """The secret of which these are shares, from the ``threshold`` of them with the smallest points.

    shares: (point, share). Shares that don't belong together give some other 32 bytes, or ProtocolError: whoever
    combines must check the result against what the dealer committed to.
    ProtocolError for fewer than ``threshold`` distinct points, two shares for one point, or one that is no share.
    """
    if threshold < 1:
        raise ValueError(f"a threshold of {threshold}; want at least 1")
    found: dict[int, bytes] = {}
    for x, share in shares:
        if not 1 <= x <= LARGEST_POINT or len(share) != SIZE or int.from_bytes(share, "big") >= PRIME:
            raise ProtocolError(f"the share for point {x} is out of range; want {SIZE} bytes below the prime")
        if found.setdefault(x, share) != share:
            raise ProtocolError(f"two different shares for point {x}; want one")
    if len(found) < threshold:
        raise ProtocolError(f"shares for {len(found)} points; want at least {threshold}")
    points = tuple(sorted(found)[:threshold])
    secret = sum(c * int.from_bytes(found[x], "big") for c, x in zip(_at_zero(points), points, strict=True)) % PRIME
    if secret >> (8 * _SECRET):
        raise ProtocolError("the shares give a number that is no secret: they don't belong together")
    return secret.to_bytes(_SECRET, "big")


def _value(falling: Sequence[int], constant: int, x: int) -> int:
    """The polynomial at x, by Horner's rule; x is small, so it is brought below the prime every 16 steps only."""
    y = 0
    for begin in range(0, len(falling), 16):
        for coefficient in falling[begin : begin + 16]:
            y = (y + coefficient) * x
        y %= PRIME
    return (y + constant) % PRIME


@lru_cache(maxsize=256)
def _at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's coefficients of a polynomial's value at zero: prod(x_j / (x_j - x_i)) over j other than i.

    All n are inverted at the price of one (Montgomery's trick). Cached: on a full graph, all secrets of a session
    have the same holders.
    """
    whole = prod(points) % PRIME
    below = [x * prod(other - x for other in points if other != x) % PRIME for x in points]
    before = list(accumulate(below, lambda p, q: p * q % PRIME, initial=1))
    inverse = pow(before.pop(), -1, PRIME)
    found = []
    for left, value in zip(reversed(before), reversed(below), strict=True):
        found.append(whole * left * inverse % PRIME)
        inverse = inverse * value % PRIME
    return tuple(reversed(found))
