import random

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.secagg.encoding import derive_key
from fedpeft.secagg.masks import CIPHERS, LARGEST, Mask, add_masks

KEY = bytes(range(32))
PIECE = 2**15  # numbers in the 128 KiB that are masked at a time
each_cipher = pytest.mark.parametrize("cipher", CIPHERS)


def stream(key, size, cipher="aes256", start=0):
    found = np.zeros(size, np.uint32)
    add_masks(found, [Mask(key, 1)], cipher, start)
    return found


def numbers(seed, size):
    return np.random.default_rng(seed).integers(0, 2**32, size, np.uint32)


def test_there_are_two_ciphers():
    assert CIPHERS == ("aes256", "chacha20")


def test_an_aes_mask_has_its_golden_values():
    want = [3053490418, 3500099882, 1788539817, 2155294429, 2926992880, 3852450122, 832304806, 1026998856]
    assert stream(KEY, 8).tolist() == want


def test_a_mask_taken_off_has_its_golden_values():
    shared = bytes.fromhex("2ed76ab549b1e73c031eb49c9448f0798aea81b698279a0c3dc3e49fbfc4b953")
    key = derive_key(shared, bytes(32), b"mask" + b"\xaa" * 32 + b"\xbb" * 32)
    found = np.zeros(4, np.uint32)
    add_masks(found, [Mask(key, -1)])
    assert found.tolist() == [2746499723, 1498835420, 2158931411, 3502630751]


def test_an_aes_mask_is_the_blocks_counted_from_zero():
    block = Cipher(AES256(KEY), ECB()).encryptor()
    want = b"".join(block.update(i.to_bytes(16, "big")) for i in range(20_000))
    np.testing.assert_array_equal(stream(KEY, 80_000), np.frombuffer(want, "<u4"))


@pytest.mark.parametrize("first", [2**32 - 1, 2**33 + 5])
def test_an_aes_mask_counts_beyond_32_bits(first):
    block = Cipher(AES256(KEY), ECB()).encryptor()
    want = b"".join(block.update(i.to_bytes(16, "big")) for i in range(first, first + 3))
    np.testing.assert_array_equal(stream(KEY, 12, start=4 * first), np.frombuffer(want, "<u4"))


def test_a_chacha20_mask_has_the_values_of_rfc_8439():
    # Appendix A.1, test vectors 1 and 2: the first two blocks of a zero key and a zero nonce.
    want = bytes.fromhex(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    np.testing.assert_array_equal(stream(bytes(32), 32, "chacha20"), np.frombuffer(want, "<u4"))


@each_cipher
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(start=st.integers(0, 3 * PIECE), size=st.integers(0, 2 * PIECE))
def test_a_slice_is_masked_as_within_the_whole(cipher, start, size):
    whole = stream(KEY, 5 * PIECE, cipher)
    np.testing.assert_array_equal(stream(KEY, size, cipher, start), whole[start : start + size])


@each_cipher
def test_slices_one_by_one_equal_the_whole(cipher):
    masks = [Mask(bytes([i]) * 32, (-1) ** i) for i in range(5)]
    whole = numbers(1, 2 * PIECE + 77)
    cut = whole.copy()
    add_masks(whole, masks, cipher)
    for begin, end in ((0, 1), (1, 18), (18, PIECE + 3), (PIECE + 3, cut.size)):
        add_masks(cut[begin:end], masks, cipher, begin)
    np.testing.assert_array_equal(cut, whole)


@each_cipher
def test_many_masks_are_added_and_taken_off_number_by_number(cipher):
    before = numbers(2, PIECE + 1001)
    signs = {bytes([i]) * 32: sign for i, sign in enumerate((1, -1, -1, 1, -1, 1, 1))}
    found = before.copy()
    add_masks(found, [Mask(key, sign) for key, sign in signs.items()], cipher)
    want = before.astype(np.int64)
    for key, sign in signs.items():
        want += sign * stream(key, before.size, cipher).astype(np.int64)
    np.testing.assert_array_equal(found, want % 2**32)


@each_cipher
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 999), clients=st.integers(2, 7), size=st.integers(0, 70))
def test_pairs_cancel_in_the_sum(cipher, seed, clients, size):
    draw = random.Random(seed)
    plain = [numbers((seed, i), size) for i in range(clients)]
    masked = [x.copy() for x in plain]
    for u in range(clients):
        for v in range(u + 1, clients):
            key = draw.randbytes(32)
            add_masks(masked[u], [Mask(key, 1)], cipher)
            add_masks(masked[v], [Mask(key, -1)], cipher)
    np.testing.assert_array_equal(sum(masked, np.zeros(size, np.uint32)), sum(plain, np.zeros(size, np.uint32)))


@each_cipher
def test_no_masks_change_nothing(cipher):
    found = numbers(3, 9)
    add_masks(found, [], cipher)
    np.testing.assert_array_equal(found, numbers(3, 9))


def test_ciphers_and_keys_give_different_masks():
    assert not np.array_equal(stream(KEY, 8, "aes256"), stream(KEY, 8, "chacha20"))
    assert not np.array_equal(stream(KEY, 8), stream(KEY[::-1], 8))


@each_cipher
def test_a_masked_constant_has_uniform_bytes(cipher):
    found = np.full(2**18, 12345, np.uint32)
    add_masks(found, [Mask(KEY, 1)], cipher)
    counts = [np.bincount(found.view(np.uint8)[i::4], minlength=256) for i in range(4)]
    expected = 2**18 / 256
    for seen in counts:
        chi = float(((seen - expected) ** 2 / expected).sum())
        assert (
            abs(chi - 255) < 5 * (2 * 255) ** 0.5
        )  # 5 standard deviations of a chi-square with 255 degrees of freedom


def test_two_masked_vectors_are_not_correlated():
    size = 2**18
    one, two = (stream(key, size).astype(np.float64) for key in (KEY, KEY[::-1]))
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / size**0.5  # 5 standard errors


def test_a_mask_hides_its_key():
    mask = Mask(b"secretsecretsecretsecretsecretse", 1)
    assert repr(mask) == "Mask(sign=1)"
    assert str(mask) == repr(mask)


@pytest.mark.parametrize(("key", "sign"), [(bytes(31), 1), (bytes(33), 1), (b"", -1), (bytes(32), 0), (bytes(32), 2)])
def test_a_mask_that_cannot_be_is_refused(key, sign):
    with pytest.raises(ValueError, match=f"a key of {len(key)} bytes and sign {sign}; want 32 bytes"):
        Mask(key, sign)


def test_a_cipher_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="got cipher 'aes128'; want one of aes256, chacha20"):
        add_masks(np.zeros(3, np.uint32), [], "aes128")  # type: ignore[arg-type]  # refusing it is the test


def test_a_vector_of_another_kind_is_refused():
    fixed = np.zeros(4, np.uint32)
    fixed.flags.writeable = False
    others = (np.zeros(4, np.int32), np.zeros(4, np.uint64), np.zeros((2, 2), np.uint32), np.zeros(8, np.uint32)[::2])
    for vector in (*others, fixed):
        with pytest.raises(ValueError, match="want uint32, \\(n,\\), contiguous, writeable"):
            add_masks(vector, [Mask(KEY, 1)])


def test_a_key_masks_no_more_numbers_than_its_counter_has():
    assert LARGEST == 2**32 * 16
    last = np.zeros(3, np.uint32)
    add_masks(last, [Mask(KEY, 1)], "chacha20", LARGEST - 3)
    assert last.any()
    for start in (-1, LARGEST - 2):
        with pytest.raises(ValueError, match=f"numbers {start} to"):
            add_masks(np.zeros(3, np.uint32), [Mask(KEY, 1)], "chacha20", start)
