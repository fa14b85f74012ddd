import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.secagg.encoding import digest
from fedpeft.secagg.graph import neighbours, neighbours_of


def ids(n, seed=0):
    return [digest("test", bytes([seed]), i.to_bytes(2, "big")) for i in range(n)]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(3, 40), st.integers(1, 20), st.binary(max_size=8))
def test_every_client_has_k_others_who_have_it_too(n, half, seed):
    found = neighbours(ids(n), 2 * half, seed)
    assert sorted(found) == sorted(ids(n))
    for me, others in found.items():
        assert list(others) == sorted(set(others))
        assert me not in others
        assert len(others) == min(2 * half, n - 1)
        assert all(me in found[other] for other in others)
        assert neighbours_of(me, ids(n), 2 * half, seed) == others


def test_neighbours_are_the_nearest_on_the_ring_of_hashes():
    some, k = ids(11), 4
    ring = sorted(some, key=lambda x: digest("perm", b"seed", x))
    found = neighbours(some, k, b"seed")
    for at, me in enumerate(ring):
        assert found[me] == tuple(sorted(ring[(at + step) % 11] for step in (-2, -1, 1, 2)))


@pytest.mark.parametrize("k", [6, 7, 100])
def test_from_all_others_on_the_graph_is_full(k):
    found = neighbours(ids(7), k, b"seed")
    assert all(found[me] == tuple(sorted(set(ids(7)) - {me})) for me in ids(7))


def test_the_graph_depends_on_the_seed_and_not_on_the_order_of_ids():
    some = ids(30)
    assert neighbours(some, 4, b"a") == neighbours(some[::-1], 4, b"a")
    assert neighbours(some, 4, b"a") != neighbours(some, 4, b"b")


def test_the_graph_stays_connected_without_any_k_minus_1_clients_in_a_row():
    some, k = ids(30), 6
    ring = sorted(some, key=lambda x: digest("perm", b"seed", x))
    found = neighbours(some, k, b"seed")
    for begin in range(30):
        gone = {ring[(begin + i) % 30] for i in range(k // 2 - 1)} | {
            ring[(begin + 12 + i) % 30] for i in range(k // 2)
        }
        left = set(some) - gone
        reached, edge = set(), {next(iter(left))}
        while edge:
            reached |= edge
            edge = {v for u in edge for v in found[u] if v in left} - reached
        assert reached == left


def test_ids_twice_are_refused():
    some = ids(9)
    for call in (
        lambda: neighbours([*some, some[3]], 4, b""),
        lambda: neighbours_of(some[0], [*some, some[3]], 4, b""),
    ):
        with pytest.raises(ValueError, match="an id is there twice"):
            call()


@pytest.mark.parametrize("k", [-2, 0, 1, 3, 7])
def test_a_number_of_neighbours_that_cannot_be_is_refused(k):
    for call in (lambda: neighbours(ids(9), k, b""), lambda: neighbours_of(ids(9)[0], ids(9), k, b"")):
        with pytest.raises(ValueError, match=f"{k} neighbours of 9; want an even number, or all others"):
            call()


@pytest.mark.parametrize("k", [4, 20])
def test_a_stranger_has_no_neighbours(k):
    with pytest.raises(ValueError, match="no id"):
        neighbours_of(b"stranger", ids(9), k, b"")
