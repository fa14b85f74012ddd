"""Who shares masks with whom: everyone, or the nearest on a ring that nobody chose."""

from collections.abc import Sequence

from fedpeft.secagg.encoding import digest


def neighbours(ids: Sequence[bytes], k: int, seed: bytes) -> dict[bytes, tuple[bytes, ...]]:
    """The neighbours of each id, ascending; who is mine has me as well.

    k: how many, even; from n - 1 on, all others. seed: the digest of all keys of the session, so that the ring's order
    is fixed once the keys are. Each has k / 2 on either side of it (a Harary graph, whose connectivity is k).
    Source: Bell, Bonawitz, Gascón, Lepoint, Raykova, CCS 2020, section 3. ValueError for ids twice, or an odd k.
    """
    _check(ids, k)
    order = _order(ids, k, seed)
    return {me: _around(order, at, k) for at, me in enumerate(order)}


def neighbours_of(me: bytes, ids: Sequence[bytes], k: int, seed: bytes) -> tuple[bytes, ...]:
    """The neighbours of one id, as ``neighbours`` has them, without making the others'. ValueError where it's no id."""
    _check(ids, k)
    order = _order(ids, k, seed)
    if me not in order:
        raise ValueError(f"{me.hex()} is no id of these {len(ids)}")
    return _around(order, order.index(me), k)


def _check(ids: Sequence[bytes], k: int) -> None:
    if len(set(ids)) != len(ids):
        raise ValueError("an id is there twice; want each once")
    if k < 1 or (k % 2 and k < len(ids) - 1):
        raise ValueError(f"{k} neighbours of {len(ids)}; want an even number, or all others")


def _order(ids: Sequence[bytes], k: int, seed: bytes) -> list[bytes]:
    if k >= len(ids) - 1:
        return sorted(ids)
    return sorted(ids, key=lambda id_: digest("perm", seed, id_))


def _around(order: Sequence[bytes], at: int, k: int) -> tuple[bytes, ...]:
    n = len(order)
    if k >= n - 1:
        return (*order[:at], *order[at + 1 :])
    side = range(1, k // 2 + 1)
    return tuple(sorted([order[at - i] for i in side] + [order[(at + i) % n] for i in side]))
