"""Whole sessions, byte by byte, against a second writing of the suite that shares nothing with the package."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from fedpeft.secagg.protocol import Entropy
from tests.secagg import oracle
from tests.secagg.parties import BROADCAST, OPEN, Cohort, cohort, entropy


def recorded(found: Cohort) -> dict[bytes, list[bytes]]:
    """From now on, all that each client draws."""
    draws: dict[bytes, list[bytes]] = {i: [] for i in found.ids}

    def noting(id_: bytes, source: Entropy) -> Entropy:
        def draw(size: int) -> bytes:
            draws[id_].append(source(size))
            return draws[id_][-1]

        return draw

    for i, party in found.parties.items():
        party.entropy = noting(i, party.entropy)
    return draws


@pytest.mark.parametrize(
    ("suite", "consistency", "m", "dims", "lost"),
    [
        ("full", True, 32, (13,), {}),
        ("full", True, 24, (9,), {1: "keys", 4: "vectors"}),
        ("full", False, 16, (9,), {2: "shares", 3: "unmask"}),
        ("full", True, 32, (5, 8, 3), {0: "vectors", 6: "survivors"}),
        ("kregular", True, 32, (6,), {3: "vectors"}),
        ("kregular", False, 24, (6, 10), {7: "vectors", 2: "unmask"}),
    ],
)
def test_every_byte_of_a_session_is_what_the_specification_says(
    suite: str, consistency: bool, m: int, dims: tuple[int, ...], lost: dict[int, str]
) -> None:
    ring = {} if suite == "full" else {"k": 4, "t": 3}
    policy = replace(OPEN, min_threshold=0.5, consistency=consistency)
    found = cohort(9, dims, m, suite, consistency, policy=policy, seed=f"model {m}", **ring)
    draws, asked, answered, sums, gone = recorded(found), {}, {}, [], set()
    while not found.server.is_over:
        phase = found.server.phase
        gone |= {found.ids[i] for i, name in lost.items() if name == phase.name}
        for id_, message in found.server.outbox().items():
            asked[phase.name, phase.pass_, id_] = message
        for id_, message in found.ask(gone).items():
            answered[phase.name, phase.pass_, id_] = message
            assert found.give(id_, message) == ""
        found.close()
        if phase.name == "unmask":
            sums.append((list(found.server.survivors), found.server.total.copy()))
    inputs = {i: x.inputs.vectors for i, x in found.parties.items()}
    want = oracle.check(asked, answered, draws, inputs, dict.fromkeys(range(1, len(dims)), BROADCAST))
    assert len(sums) == len(want) == len(dims)
    for p, ((survivors, total), (alive, summed)) in enumerate(zip(sums, want, strict=True)):
        assert survivors == alive
        np.testing.assert_array_equal(total, summed)
        np.testing.assert_array_equal(total, found.plain(alive, p))


def test_the_second_writing_gives_the_golden_values_too() -> None:
    """The vectors of the specification, 2.12."""
    assert oracle.H("ctx", b"{}").hex() == "569ddf3cb55a5fa9e60a3e55b384de381d974420ee50273cebb4aa31299cef1c"
    assert oracle.stream(bytes(range(32)), 3).tolist() == [3053490418, 3500099882, 1788539817]
    secret = oracle.dh(b"\1" * 32, oracle.public(b"\2" * 32))
    assert secret.hex() == "2ed76ab549b1e73c031eb49c9448f0798aea81b698279a0c3dc3e49fbfc4b953"
    key = oracle.hkdf(secret, bytes(32), b"mask" + b"\xaa" * 32 + b"\xbb" * 32)
    assert key.hex() == "859cad40d576a789d759f1224987ce1713843461bfecba0fd72842844888ed03"
    drawn = (7).to_bytes(40, "big") + (11).to_bytes(40, "big")
    assert oracle.share(bytes(range(1, 33)), drawn, 3, 3).hex()[-4:] == "1f98"


def test_what_the_tests_draw_is_not_the_same_twice() -> None:
    draw = entropy("x")
    assert len({draw(32) for _ in range(9)} | {hashlib.sha256(b"").digest()}) == 10
