"""Suite FP-SA-1 once more, written from its specification alone: every byte of a session is worked out and compared.

It shares no line with the package: raw X25519, Ed25519, SHA-256, HMAC, AES-CTR, ChaCha20-Poly1305 and whole numbers.
A wire is what was sent: (phase, pass, id) to bytes, as ``asked`` by the server and as ``answered`` by clients. A
message is kind (1) session (16) pass (1) body; rows and their order are those that ``check`` reads.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

V, P = b"fedpeft-sa/1/", 2**256 + 297
Wire = Mapping[tuple[str, int, bytes], bytes]


def H(label: str, *parts: bytes) -> bytes:  # noqa: N802
    return hashlib.sha256(V + label.encode() + b"\0" + b"".join(len(x).to_bytes(4, "big") + x for x in parts)).digest()


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:  # RFC 5869, one block
    return hmac.digest(hmac.digest(salt, secret, "sha256"), V + info + b"\1", "sha256")


def dh(mine: bytes, theirs: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(mine).exchange(X25519PublicKey.from_public_bytes(theirs))


def public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def verify(id_: bytes, signature: bytes, text: bytes) -> None:
    Ed25519PublicKey.from_public_bytes(id_).verify(signature, text)


def stream(key: bytes, size: int) -> np.ndarray:
    keyed = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(keyed.update(bytes(4 * size)), "<u4").astype(np.int64)


def share(secret: bytes, drawn: bytes, t: int, x: int) -> bytes:
    rest = [int.from_bytes(drawn[40 * i : 40 * i + 40], "big") for i in range(t - 1)]
    return (sum(c * pow(x, i, P) for i, c in enumerate([int.from_bytes(secret, "big"), *rest])) % P).to_bytes(33, "big")


def near(u: bytes, ids: Sequence[bytes], k: int, th1: bytes) -> list[bytes]:
    if k >= len(ids) - 1:
        return sorted(set(ids) - {u})
    ring = sorted(ids, key=lambda v: H("perm", th1, v))
    at = ring.index(u)
    return sorted(ring[(at + o) % len(ids)] for o in range(-k // 2, k // 2 + 1) if o)


def cut(data: bytes, *sizes: int) -> list[bytes]:
    assert len(data) == sum(sizes), (len(data), sizes)
    ends = np.cumsum(sizes).tolist()
    return [data[end - size : end] for end, size in zip(ends, sizes, strict=True)]


@dataclass
class Drawn:
    """All randomness of one client, in the order in which it was drawn: keys, seeds, then polynomials."""

    draws: list[bytes]
    passes: int

    def __post_init__(self) -> None:
        p = self.passes
        self.box, self.masks = self.draws[0], self.draws[1 : 1 + p]
        self.seeds, self.coefficients = self.draws[1 + p : 1 + 2 * p], self.draws[1 + 2 * p :]


def check(
    asked: Wire,
    answered: Wire,
    draws: Mapping[bytes, list[bytes]],
    inputs: Mapping[bytes, Sequence[np.ndarray]],
    shared: Mapping[int, bytes],
) -> list[tuple[list[bytes], np.ndarray]]:
    """Survivors and sum of each pass. AssertionError or InvalidSignature for any byte that is not as it should be."""

    def body(wire: Wire, phase: str, pass_: int, id_: bytes) -> bytes:
        kind = {"keys": 1, "shares": 2, "vectors": 3, "survivors": 4, "unmask": 5}[phase] + 16 * (wire is answered)
        message = wire[phase, pass_, id_]
        assert message[:18] == bytes([kind]) + session + bytes([pass_])
        return message[18:]

    def there(phase: str, pass_: int = 0) -> list[bytes]:
        return sorted(i for name, p, i in answered if (name, p) == (phase, pass_))

    everyone = sorted(i for name, p, i in asked if name == "keys")
    session = asked["keys", 0, everyone[0]][1:17]
    (raw,) = {body(asked, "keys", 0, i) for i in everyone}
    params = json.loads(raw)
    assert json.dumps(params, sort_keys=True, separators=(",", ":")).encode() == raw
    assert (bytes.fromhex(params["session"]), params["cohort"]) == (session, [i.hex() for i in everyone])
    t, k, m, dims = params["t"], params["k"], params["m"], params["dims"]
    passes, ctx = len(dims), H("ctx", raw)
    u1 = there("keys")
    own = {u: Drawn(draws[u], passes) for u in u1}
    # Keys: id, C, S' for each pass, signature
    adverts = {u: cut(body(answered, "keys", 0, u), 32, 32, *[32] * passes, 64) for u in u1}
    for u, (id_, *keys, signature) in adverts.items():
        assert [id_, *keys] == [u, public(own[u].box), *map(public, own[u].masks)]
        verify(u, signature, V + b"adv" + ctx + b"".join(keys))
    assert all(body(asked, "shares", 0, u) == b"".join(b"".join(adverts[v]) for v in u1) for u in u1)
    th1 = H("U1", ctx, *(part for u in u1 for part in adverts[u]))
    around = {u: near(u, u1, k, th1) for u in u1}
    holders = {u: sorted([u, *around[u]]) for u in u1}
    # Shares: of pass p, the seed's and the mask key's, for each holder
    u2, sealed, commitments, given = there("shares"), {}, {}, {}

    def later(p: int) -> list[bytes]:
        return [bytes([p])] if p else []

    for u in u2:
        for p in range(passes):
            for x, v in enumerate(holders[u], 1):
                for i, (kind, secret) in enumerate((("b", own[u].seeds[p]), ("s", own[u].masks[p]))):
                    one = share(secret, own[u].coefficients[2 * p + i], t, x)
                    given[u, v, p, kind] = one
                    commitments[u, v, p, kind] = H("sh" + kind, th1, u, v, one, *later(p))
        size = 2 + 66 * passes + 16
        *cts, rest, signature = cut(
            body(answered, "shares", 0, u), *[size] * len(around[u]), 32 * passes + 64 * passes * len(holders[u]), 64
        )
        cb = [H("b", th1, u, own[u].seeds[p], *later(p)) for p in range(passes)]
        every = cb + [commitments[u, v, p, kind] for p in range(passes) for v in holders[u] for kind in "bs"]
        assert rest == b"".join(every)
        verify(u, signature, V + b"shares" + H("sharemsg", th1, *every))
        for v, ct in zip(around[u], cts, strict=True):
            key = hkdf(dh(own[v].box, adverts[u][1]), th1, b"enc" + u + v)
            plain = ChaCha20Poly1305(key).decrypt(bytes(12), ct, th1 + u + v)
            want = b"".join(given[u, v, p, kind] for p in range(passes) for kind in "bs")
            assert plain == (holders[u].index(v) + 1).to_bytes(2, "big") + want
            sealed[u, v] = ct
    members, out = u2, []
    for p in range(passes):
        suffix = bytes([p]) + shared[p] if p else b""
        alive = there("vectors", p)
        total = np.zeros(dims[p], np.int64)
        for u in alive:
            want = b"".join(
                v + sealed[v, u] + b"".join(commitments[v, u, q, kind] for q in range(passes) for kind in "bs")
                for v in around[u]
                if v in u2
            )
            assert body(asked, "vectors", p, u) == (b"" if p else want)
            y = inputs[u][p].astype(np.int64) + stream(hkdf(own[u].seeds[p], th1, b"self" + u + suffix), dims[p])
            for v in around[u]:
                if v in members:
                    key = hkdf(dh(own[u].masks[p], adverts[v][2 + p]), th1, b"mask" + min(u, v) + max(u, v) + suffix)
                    y += (1 if u < v else -1) * stream(key, dims[p])
            signature, packed = cut(body(answered, "vectors", p, u), 64, dims[p] * m // 8)
            assert packed == b"".join(int(x % 2**m).to_bytes(m // 8, "little") for x in y)
            verify(u, signature, V + b"masked" + H("y", th1, bytes([p]), packed))
            total += np.array([int.from_bytes(packed[i : i + m // 8], "little") for i in range(0, len(packed), m // 8)])
        h3 = H("U3", th1, *([bytes([p]), shared[p]] if p else []), *alive)
        if params["consistency"]:
            signed = there("survivors", p)
            for u in signed:
                assert body(asked, "survivors", p, u) == b"".join(alive)
                verify(u, body(answered, "survivors", p, u), V + b"cons" + h3)
        unmasked, known = there("unmask", p), {}
        for v in unmasked:
            question = body(asked, "unmask", p, v)
            if params["consistency"]:
                first = [u for u in holders[v] if u in signed][:t]
                assert question == b"".join(u + body(answered, "survivors", p, u) for u in first)
            else:
                assert question == b"".join(alive)
            owners = [u for u in holders[v] if u in members]
            kinds = ["b" if u in alive else "s" for u in owners]
            shares = cut(body(answered, "unmask", p, v), *[33] * len(owners))
            assert shares == [given[u, v, p, kind] for u, kind in zip(owners, kinds, strict=True)]
            for u, one in zip(owners, shares, strict=True):
                known.setdefault(u, []).append((holders[u].index(v) + 1, int.from_bytes(one, "big")))
        for u in members:  # what the server can do with what it was sent, and nothing that only this check knows
            secret = 0
            for x, value in known[u][-t:]:
                for other, _ in known[u][-t:]:
                    if other != x:
                        value = value * other * pow(other - x, -1, P) % P
                secret += value
            found = (secret % P).to_bytes(32, "big")
            assert found == (own[u].seeds[p] if u in alive else own[u].masks[p])
            if u in alive:
                total -= stream(hkdf(found, th1, b"self" + u + suffix), dims[p])
                continue
            for v in around[u]:
                if v in alive:
                    key = hkdf(dh(found, adverts[v][2 + p]), th1, b"mask" + min(u, v) + max(u, v) + suffix)
                    total -= (1 if v < u else -1) * stream(key, dims[p])
        out.append((alive, (total % 2**m).astype(np.uint32)))
        members = alive
    return out
