import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import ProtocolError
from fedpeft.secagg.ring import MODULI, add_packed, pack, reduce, unpack

PIECE = 2**15
each_ring = pytest.mark.parametrize("m", MODULI)


def numbers(seed, size):
    return np.random.default_rng(seed).integers(0, 2**32, size, np.uint32)


def test_there_are_three_rings():
    assert MODULI == (16, 24, 32)


@pytest.mark.parametrize(
    ("m", "want"), [(16, "0201 3412 ffff"), (24, "020100 341278 ffffff"), (32, "02010000 34127856 ffffffff")]
)
def test_numbers_are_packed_with_their_low_byte_first(m, want):
    assert pack(np.array([0x0102, 0x56781234, 0xFFFFFFFF], np.uint32), m).hex(" ", -m // 8) == want


@each_ring
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 999), size=st.integers(0, 50) | st.integers(PIECE - 2, PIECE + 3) | st.just(2 * PIECE + 1))
def test_packed_numbers_are_read_back(m, seed, size):
    x = numbers(seed, size) & np.uint32(2**m - 1)
    data = pack(x, m)
    assert len(data) == size * m // 8
    found = unpack(data, size, m)
    assert found.dtype == np.uint32
    np.testing.assert_array_equal(found, x)
    found += 1  # it is the caller's own, and may be written


@each_ring
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 999), size=st.integers(0, 50) | st.integers(PIECE - 2, PIECE + 3), count=st.integers(1, 5))
def test_packed_vectors_are_summed_in_the_ring(m, seed, size, count):
    total = np.zeros(size, np.uint32)
    want = np.zeros(size, np.int64)
    for i in range(count):
        x = numbers((seed, i), size)
        add_packed(total, pack(x, m), m)
        want += x
    np.testing.assert_array_equal(total, want % 2**m)


@each_ring
def test_bytes_of_any_kind_can_be_added(m):
    x = numbers(1, 7) & np.uint32(2**m - 1)
    data = pack(x, m)
    within = memoryview(b"?" + data + b"?")[1:-1]
    for kind in (bytes(data), bytearray(data), memoryview(data), within):
        np.testing.assert_array_equal(unpack(kind, 7, m), x)


@each_ring
@pytest.mark.parametrize("change", [-1, 1, 4])
def test_a_wrong_length_is_refused_and_changes_nothing(m, change):
    total = np.arange(5, dtype=np.uint32)
    data = bytes(5 * m // 8 + change)
    with pytest.raises(ProtocolError, match=f"a vector of {len(data)} bytes; want {5 * m // 8}, for 5 of {m} bits"):
        add_packed(total, data, m)
    np.testing.assert_array_equal(total, np.arange(5))
    with pytest.raises(ProtocolError, match=f"want {5 * m // 8}, for 5"):
        unpack(data, 5, m)


@each_ring
def test_adding_needs_no_second_vector(m):
    size = 2_000_000
    total = np.zeros(size, np.uint32)
    data = pack(numbers(1, size), m)
    tracemalloc.start()
    add_packed(total, data, m)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20  # the vector has 8 MB


def test_packing_takes_slices():
    x = numbers(1, 21)
    assert pack(x[::3], 24) == pack(x[::3].copy(), 24)


@pytest.mark.parametrize(("m", "want"), [(16, 0x5678), (24, 0x345678), (32, 0x12345678)])
def test_reducing_keeps_the_low_bits(m, want):
    x = np.array([0x12345678, 5], np.uint32)
    reduce(x, m)
    assert x.tolist() == [want, 5]


@pytest.mark.parametrize("m", [0, 8, 20, 64])
def test_another_ring_is_refused(m):
    x = np.zeros(3, np.uint32)
    for call in (lambda: pack(x, m), lambda: unpack(b"", 0, m), lambda: add_packed(x, b"", m), lambda: reduce(x, m)):
        with pytest.raises(ValueError, match=f"a ring of {m} bits; want 16, 24 or 32"):
            call()
