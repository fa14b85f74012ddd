"""Directions that a seed tells, and adapters that are a start and moves along them."""

from dataclasses import asdict, replace
from hashlib import sha256

import numpy as np
import pytest

from fedpeft.adapters import (
    MOVES,
    Adapter,
    LowRank,
    Pool,
    drawn,
    flat,
    lasting,
    places,
    retraced,
    same,
    walk_of,
    walked,
)

POOL = Pool(seed=5, size=6)


def adapter(dtype=np.float32):
    rng = np.random.default_rng(3)
    a, b, head = (rng.normal(size=s).astype(dtype) for s in ((2, 5), (7, 2), (3, 4)))
    return Adapter({"w": LowRank(a, b, 0.5)}, {"head": head, "a gate": rng.normal(size=()).astype(dtype)}, {"p": a})


def bits(seed, number, size):
    """The first bits of PCG64's stream, by another route: whole numbers, from the lowest bit of the lowest byte."""
    key = int.from_bytes(sha256(f"{seed} {number}".encode()).digest()[:8], "little")
    raw = np.random.Generator(np.random.PCG64(key)).bit_generator.random_raw(size // 64 + 1)
    found = []
    for x in raw.tolist():
        for byte in x.to_bytes(8, "little"):
            found += [byte >> i & 1 for i in reversed(range(8))]
    return np.array(found[:size])


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 130])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_direction_is_of_the_bits_of_a_stream_that_its_number_names(number, size):
    found = POOL.direction(number, size)
    np.testing.assert_array_equal(found, np.where(bits(5, number, size), 1.0, -1.0))
    assert found.dtype == np.float64


def test_a_direction_is_the_same_for_all_time():
    """Written down once: who has another version of numpy, or of this, has the same directions."""
    assert "".join("+" if x > 0 else "-" for x in Pool(7, 3).direction(2, 24)) == "++----+--+-++++--+--+++-"


def test_directions_are_even_handed_and_have_little_in_common():
    each = np.stack([Pool(1, 64).direction(i, 4096) for i in range(64)])
    common = each @ each.T / 4096
    np.testing.assert_array_equal(np.diag(common), np.ones(64))
    assert np.abs(common - np.eye(64)).max() < 5 / 64  # of 2016 cosines with a deviation of 1/64 each
    assert abs(each.mean()) < 5 / np.sqrt(64 * 4096)
    assert not np.array_equal(Pool(2, 64).direction(0, 64), Pool(1, 64).direction(0, 64))


def test_numbers_stand_in_the_order_of_their_tensors_names():
    tensors = adapter().tensors()
    assert places(tensors).shapes == (("a gate", ()), ("head", (3, 4)), ("w/a", (2, 5)), ("w/b", (7, 2)))
    whole = flat(tensors)
    np.testing.assert_array_equal(whole[1:13], tensors["head"].ravel().astype(np.float64))
    assert whole.dtype == np.float64
    np.testing.assert_array_equal(whole, flat(dict(reversed(tensors.items()))))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_moves_are_steps_along_directions(dtype):
    tensors, moves = adapter(dtype).tensors(), np.array([0, 0.5, 0, -2, 0, 0.125])
    found = POOL.moved(tensors, moves)
    want = np.concatenate([tensors[n].ravel() for n in sorted(tensors)]).astype(np.float64)
    for i, move in enumerate(moves.tolist()):  # in this order, so that fp64 is rounded alike
        want += move * np.where(bits(5, i, 37), 1.0, -1.0)
    assert list(found) == sorted(tensors)
    assert {n: (x.dtype, x.shape) for n, x in found.items()} == {n: (x.dtype, x.shape) for n, x in tensors.items()}
    got = np.concatenate([x.ravel() for x in found.values()])
    np.testing.assert_array_equal(got, want.astype(dtype))


def test_only_directions_that_are_gone_along_are_drawn():
    asked = []

    class Noted(Pool):
        def direction(self, number, size):
            asked.append((number, size))
            return Pool.direction(self, number, size)

    Noted(5, 6).moved(adapter().tensors(), np.array([0, 0.5, 0, -2, 0, 0]))
    assert asked == [(1, 37), (3, 37)]


def test_many_small_moves_are_not_lost_in_rounding():
    pool, tensors = Pool(4, 999), {"x": np.full(3, 1000, np.float32)}
    moves = np.full(999, 1e-5)
    far = sum(pool.direction(i, 3) for i in range(999)) * 1e-5
    np.testing.assert_array_equal(pool.moved(tensors, moves)["x"], (1000 + far).astype(np.float32))
    assert np.float32(1000) + np.float32(1e-5) == 1000


@pytest.mark.parametrize("shape", [(5,), (7,), (6, 1), ()])
def test_moves_for_another_pool_are_refused(shape):
    with pytest.raises(ValueError, match=r"^moves: got \(.*\); want \(6,\)$"):
        POOL.moved(adapter().tensors(), np.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed: got -1; want 0 or more"),
        ({"size": 0}, "size: got 0; want at least 1 direction, and at most 1048576"),
        ({"size": 1048577}, "size: got 1048577; want at least 1 direction, and at most 1048576"),
        ({"epsilon": 0.0}, "epsilon: got 0.0; want more than 0"),
        ({"epsilon": -1e-3}, "epsilon: got -0.001; want more than 0"),
        ({"epsilon": np.inf}, "epsilon: got inf; want more than 0"),
        ({"epsilon": np.nan}, "epsilon: got nan; want more than 0"),
    ],
)
def test_a_pool_that_can_not_be_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Pool(**{"seed": 3, **options})


def test_the_least_pool_and_what_it_is_if_nothing_is_said():
    assert asdict(Pool(0)) == {"seed": 0, "size": 1024, "epsilon": 1e-3}
    Pool(0, 1, 1e-300)
    Pool(0, 1048576)


def test_an_adapter_keeps_its_start_and_its_moves_add_up():
    first, ways = adapter(), (np.array([0.5, 0, 0, 0, 0, -1]), np.array([0.25, 2, 0, 0, 0, 0]))
    assert walk_of(first) is None
    once = walked(first, POOL, ways[0])
    twice = walked(once, POOL, ways[1])
    for found, moves in ((once, ways[0]), (twice, sum(ways))):
        assert {n: x.tolist() for n, x in found.put(POOL.moved(first.tensors(), moves)).tensors().items()} == {
            n: x.tolist() for n, x in found.tensors().items()
        }
        np.testing.assert_array_equal(walk_of(found), moves.astype(np.float32))
        assert found.fixed[MOVES].dtype == np.float32
        assert found.fixed["walk/seed"].tolist() == [5, 6]
        for n, x in first.tensors().items():
            assert found.fixed[f"walk/start/{n}"] is x
        assert found.fixed["p"] is first.fixed["p"]
        assert found.spec == first.spec
    assert set(first.fixed) == {"p"}
    assert MOVES == "walk/moves"


@pytest.mark.parametrize(
    ("dtype", "want"), [(np.float16, np.float32), (np.float32, np.float32), (np.float64, np.float64)]
)
def test_moves_are_kept_as_finely_as_the_adapter_and_as_fp32_at_least(dtype, want):
    found = walked(adapter(dtype), POOL, np.full(6, 1 / 3))
    assert walk_of(found).dtype == want
    np.testing.assert_array_equal(walk_of(found), np.full(6, 1 / 3).astype(want))
    # and the adapter is what these say, and not what was given, so that who has them has it to the bit
    again = POOL.moved(adapter(dtype).tensors(), walk_of(found))
    assert same(found.put(again), found)


def test_who_has_the_start_and_the_moves_has_the_adapter_to_the_bit():
    found = walked(walked(adapter(), POOL, np.linspace(-1, 1, 6)), POOL, np.linspace(0.3, -0.1, 6))
    fixed = lasting(found)
    assert MOVES not in fixed
    assert set(fixed) == set(found.fixed) - {MOVES}
    shuffled = dict(reversed(fixed.items()))
    tensors = retraced(shuffled, walk_of(found))
    assert same(found.put(tensors), found)
    assert set(tensors) == set(found.tensors())
    with pytest.raises(KeyError, match="walk/seed"):
        retraced({"p": adapter().fixed["p"]}, walk_of(found))


def test_what_a_method_drew_is_told_from_a_walk():
    first = adapter()
    found = walked(first, POOL, np.ones(6))
    assert drawn(found) == {"p": first.fixed["p"]}
    assert same(replace(found, fixed=drawn(found)), first.put(POOL.moved(first.tensors(), np.ones(6))))
