"""Who a party is: what it signs, what it is known by, and what of it is never shown."""

import copy
import pickle

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedpeft.secagg.identity import Identity, is_id, verify

SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")  # RFC 8032, 7.1, test 2
ID = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)
P = 2**255 - 19


def test_an_identity_has_the_key_and_signature_of_the_rfc():
    me = Identity.of(SEED)
    assert me.id == ID
    assert me.sign(b"\x72") == SIGNATURE
    assert me.to_bytes() == SEED
    assert Identity.of(me.to_bytes()).id == ID


def test_a_signature_holds_for_its_own_id_and_message_alone():
    other = Identity.of(bytes(32)).id
    assert verify(ID, SIGNATURE, b"\x72") is True
    assert verify(ID, SIGNATURE, b"\x73") is False
    assert verify(other, SIGNATURE, b"\x72") is False
    assert verify(ID, SIGNATURE[:-1] + b"\x01", b"\x72") is False


@pytest.mark.parametrize("id_", [b"", ID[:31], ID + b"\x00", b"\xff" * 32])
def test_what_is_no_key_verifies_nothing(id_):
    assert verify(id_, SIGNATURE, b"\x72") is False


@pytest.mark.parametrize("signature", [b"", SIGNATURE[:63], SIGNATURE + b"\x00", bytes(64)])
def test_what_is_no_signature_is_not_verified(signature):
    assert verify(ID, signature, b"\x72") is False


def points_of_small_order():
    """Every encoding of the 8 points, worked out from the curve: their y, and y + p where that fits."""
    d = -121665 * pow(121666, -1, P) % P

    def add(one, two):
        (x1, y1), (x2, y2) = one, two
        k = d * x1 * x2 * y1 * y2
        return (x1 * y2 + x2 * y1) * pow(1 + k, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - k, -1, P) % P

    root = pow(2, (P - 1) // 4, P)  # of -1
    # a point of order 8 doubles to one of order 4, whose y is 0: so y² + x² = 0, and x = ±y·√-1
    # -x² + y² = 1 + d·x²·y² with x² = -y²: 2y² = 1 - d·y⁴
    found = set()
    for sign in (1, -1):
        square = (-1 + sign * _root(1 + d)) * pow(d, -1, P) % P
        y = _root(square)
        if y is None:
            continue
        start, point = (y * root % P, y), (y * root % P, y)
        while point != (0, 1):
            found.add(point)
            point = add(point, start)
        found.add(point)
    assert len(found) == 8
    encoded = {x + (sign << 255) for _, y in found for x in (y, y + P) if x < 1 << 255 for sign in (0, 1)}
    return [x.to_bytes(32, "little") for x in sorted(encoded)]


def _root(square):
    square %= P
    for x in (pow(square, (P + 3) // 8, P), pow(square, (P + 3) // 8, P) * pow(2, (P - 1) // 4, P) % P):
        if x * x % P == square:
            return x
    return None


def test_ids_under_which_anybody_could_sign_are_refused():
    weak = points_of_small_order()
    assert len(weak) == 14
    assert not any(is_id(x) for x in weak)
    neutral = (1).to_bytes(32, "little")
    forged = neutral + bytes(32)  # R neutral and s = 0: s·B = R + h·A for every message
    Ed25519PublicKey.from_public_bytes(neutral).verify(forged, b"anything")  # the library takes it
    assert not verify(neutral, forged, b"anything")
    assert is_id(ID)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_private_key_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match=rf"^got {size} bytes; want the 32 of an Ed25519 private key$"):
        Identity.of(bytes(size))


def test_no_text_and_no_pickle_has_the_private_key():
    me = Identity.of(SEED)
    for said in (repr(me), str(me), f"{me}", f"{me!r}"):
        assert SEED.hex() not in said
        assert repr(SEED)[2:-1] not in said
        assert "_key" not in said
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(me)
    with pytest.raises(TypeError, match="not pickled"):
        copy.deepcopy(me)
