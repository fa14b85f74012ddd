"""An order of all clients that is drawn by a seed and takes no memory, however many there are."""

from collections.abc import Sequence
from itertools import accumulate
from math import floor

from fedpeft.rounds.seeds import derive

_TURNS = 6


def place(client: int, clients: int, seed: int) -> int:
    """Where this client is in the order, 0 to ``clients`` - 1: each place is one client's.

    A Feistel network over the numbers of 2h bits, walked along until it comes to one below ``clients``; by fewer than
    four steps in the mean where there are two clients or more.
    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002 (cycle walking, Feistel networks).
    """
    if not 0 <= client < clients:
        raise ValueError(f"client: got {client}; want 0 to {clients - 1}")
    half = max(1, ((clients - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = client >> half, client & mask
        for turn in range(_TURNS):
            left, right = right, left ^ (derive(seed, "order", turn, right) & mask)
        client = left << half | right
        if client < clients:
            return client


def part_of(where: int, shares: Sequence[float], total: int) -> int:
    """Which of the ``whole_parts`` of a total, laid one behind the other, this place is in: its number."""
    return next(i for i, end in enumerate(accumulate(whole_parts(shares, total))) if where < end)


def whole_parts(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the shares that add up to the total: the largest remainders are rounded up."""
    exact = [total * x / sum(shares) for x in shares]
    counts = [floor(x) for x in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
