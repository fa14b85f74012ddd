"""A round over the real protocol: unequal ranks, two passes and clients lost on the way, against plain sums."""

import hashlib
from contextlib import suppress

import numpy as np
import pytest

from fedpeft.errors import ProtocolError
from fedpeft.rounds import SecureRound, contribute_ring, grids, shared_digest
from fedpeft.rules import Subspace
from tests.laws.cohorts import FEDIT, assert_near, cohort, computed, metrics, start
from tests.laws.secure import LARGEST, wide
from tests.laws.secure import drive as drive_mock
from tests.laws.secure import machine as over_mock
from tests.secagg.parties import Inputs, Party
from tests.secagg.parties import cohort as session_of

RANKS = dict(enumerate((3, 1, 2, 3, 2, 1), 10))
STATE = start()


def begin(rule, clients):
    """The round, and the parties by number."""
    channel = wide(rule, STATE, clients, RANKS)
    grid = grids(rule, channel, STATE.task, len(RANKS), LARGEST)
    found = session_of(len(RANKS), tuple(x.length for x in grid), seed="rounds")
    ids = dict(zip(RANKS, found.ids, strict=True))
    m = SecureRound(STATE, RANKS, ids, 2, grid, found.server, rule=rule)
    return m, {c: found.parties[id_] for c, id_ in ids.items()}


def phase(m, clients, parties, lost=(), told=None):
    """One phase. told: what each is told of a pass, in place of what was broadcast."""
    now = m.phase
    for client, (text, sent) in m.outbox().items():
        if client in lost:
            continue
        party: Party = parties[client]
        update, weight = clients[client]
        if sent is not None:
            party.sent = sent
        if now.name == "vectors":
            rng = np.random.default_rng([client, now.pass_])
            task = party.sent.task
            vector = contribute_ring(m.rule, m.grid[now.pass_], update, weight, metrics(client), task, False, rng)
            party.inputs = Inputs({now.pass_: vector}, broadcast=(told or {}).get(client, shared_digest(task)))
        with suppress(ProtocolError):  # it is in m.refused
            m.receive(client, party.answer(text, now.pass_).answer)
    m.close()


@pytest.mark.parametrize("rule", [FEDIT, Subspace(seed=5)], ids=["fedit", "subspace"])
@pytest.mark.parametrize("lost", [{}, {11: 0}, {13: 2}, {12: 4}], ids=["all", "while asked", "with its vector", "last"])
def test_a_round_over_masks_ends_as_one_over_plain_sums(rule, lost):
    clients = cohort(rule, STATE, ranks=RANKS.values())
    m, parties = begin(rule, clients)
    steps = 0
    while not m.is_over:
        phase(m, clients, parties, {c for c, when in lost.items() if when <= steps})
        steps += 1
    got = m.result()
    # Over plain sums a client is in a pass or not; here who vanishes after its vector is in the first one.
    want_lost = {c: 0 if when <= 2 else 1 for c, when in lost.items()}
    plain = over_mock(rule, STATE, RANKS, wide(rule, STATE, clients, RANKS))
    want = drive_mock(plain, clients, want_lost)
    assert (got.survivors, got.metrics, got.weight) == (want.survivors, want.metrics, want.weight)
    assert_near(computed(got.state), computed(want.state), atol=1e-12)  # the same dice: nothing is left to differ
    assert {c for c, _ in got.refused} == set(lost)
    assert m.culprits == {}
    assert steps == 5 if rule == FEDIT else steps == 8


def test_clients_that_are_told_different_things_between_passes_leave_no_sum():
    rule = Subspace(seed=5)
    clients = cohort(rule, STATE, ranks=RANKS.values())
    m, parties = begin(rule, clients)
    for _ in range(5):
        phase(m, clients, parties)
    assert m.phase.pass_ == 1
    others = dict.fromkeys((10, 11, 12), hashlib.sha256(b"another Q").digest())
    while not m.is_over:
        phase(m, clients, parties, told=others)
    assert {c for c, _ in m.refused} == {10, 11, 12}  # their signatures are of something else
    with pytest.raises(ProtocolError, match="survivors of pass 1: fewer than 5 are left who hold"):
        m.result()
