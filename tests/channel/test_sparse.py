"""Vectors that are mostly zero are kept and given back as they were."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.channel.sparse import BLOCK, ONES, Sparse
from fedpeft.errors import ProtocolError


def vector(size: int, share: float, seed: int, dtype: type = np.float32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(size) < share, rng.normal(size=size), 0).astype(dtype)


@given(
    size=st.integers(0, 70) | st.integers(BLOCK - 9, BLOCK + 9) | st.integers(2 * BLOCK - 3, 3 * BLOCK),
    share=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 999),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_every_part_of_a_vector_comes_back_to_the_last_bit(size, share, seed, cut):
    x = vector(size, share, seed)
    kept = Sparse.of(x)
    start, stop = sorted(int(c * size) for c in cut)
    np.testing.assert_array_equal(kept.dense(), x)
    np.testing.assert_array_equal(kept.dense(start, stop), x[start:stop])
    assert kept.dense().dtype == x.dtype
    assert kept.size == size


@pytest.mark.parametrize("start", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK])
def test_parts_around_the_counts_are_found(start):
    x = vector(2 * BLOCK + 100, 0.5, 1)
    for stop in (start, start + 1, 2 * BLOCK, 2 * BLOCK + 100):
        np.testing.assert_array_equal(Sparse.of(x).dense(start, stop), x[start:stop])


def test_zeros_take_a_bit_and_others_their_own_bytes():
    x = vector(16 * BLOCK, 0.25, 2, np.float64)
    kept = Sparse.of(x)
    there = np.count_nonzero(x)
    assert BLOCK == 32768
    assert kept.nbytes == 65536 + 8 * there + 8 * 17  # a bit each, the numbers, and a count before each of 16 blocks
    assert Sparse.of(np.zeros(0)).nbytes == 8
    assert Sparse.of(np.zeros(1)).nbytes == 1 + 8 * 2
    assert kept.values.dtype == np.float64
    assert kept.mask[0] == sum(1 << (7 - i) for i in range(8) if x[i])


def test_the_ones_of_each_byte_are_counted():
    assert ONES.tolist() == [f"{byte:b}".count("1") for byte in range(256)]
    assert ONES.dtype == np.uint8
    assert Sparse.of(vector(2 * BLOCK + 5, 1.0, 4)).before.tolist() == [0, BLOCK, 2 * BLOCK, 2 * BLOCK + 5]
    assert Sparse.of(vector(2 * BLOCK, 1.0, 4)).before.dtype == np.int64


def test_a_part_is_ones_own():
    kept = Sparse.of(vector(50, 1.0, 3))
    kept.dense()[:] = 7
    assert not np.any(kept.dense() == 7)


@pytest.mark.parametrize(
    ("size", "mask", "values"),
    [
        (9, [255, 128], 8),
        (9, [255, 192], 9),
        (9, [255, 64], 9),  # as many ones as numbers, but one behind the end
        (15, [255, 129], 10),
        (8, [255, 0], 8),
        (17, [255, 0], 8),
        (8, [], 0),
        (0, [0], 0),
    ],
)
def test_parts_that_are_not_one_vectors_are_refused(size, mask, values):
    with pytest.raises(ProtocolError, match="do not fit"):
        Sparse.restored(size, np.array(mask, np.uint8), np.ones(values, np.float32))
