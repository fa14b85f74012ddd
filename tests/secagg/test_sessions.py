"""Sessions of ``full`` and ``kregular`` from the first key to the sum, whoever is lost on the way."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import ProtocolError
from fedpeft.secagg.protocol import Phase
from tests.secagg.parties import BROADCAST, OPEN, Cohort, cohort, run

PHASES = ("keys", "shares", "vectors", "survivors", "unmask")


def when(found: Cohort) -> list[tuple[str, int]]:
    """The phases of a session in order."""
    own = PHASES if found.params.consistency else (*PHASES[:3], "unmask")
    passes = len(found.params.dims)
    return [(x, 0) for x in own[:2]] + [(x, p) for p in range(passes) for x in own[2:]]


def check(found: Cohort, lost: dict[bytes, tuple[str, int]]) -> None:
    """The sum of each pass is that of all who were there until their vectors came, and no bit differs."""
    sums = run(found, lost)
    order = when(found)
    assert len(sums) == len(found.params.dims)
    for pass_, (survivors, total) in enumerate(sums):
        there = [i for i in found.ids if i not in lost or order.index(lost[i]) > order.index(("vectors", pass_))]
        assert survivors == tuple(there)
        assert total.dtype == np.uint32
        np.testing.assert_array_equal(total, found.plain(there, pass_))
    assert found.server.is_over
    assert found.server.culprits == {}


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_sum_is_that_of_the_survivors_bit_for_bit_whoever_is_lost_and_whenever(data: st.DataObject) -> None:
    n = data.draw(st.integers(5, 12) | st.just(20), "n")
    m = data.draw(st.sampled_from((16, 24, 32)), "m")
    passes = data.draw(st.integers(1, 2), "passes")
    is_full, consistency = data.draw(st.booleans(), "full"), data.draw(st.booleans(), "consistency")
    if is_full:
        found = cohort(n, (7, 11)[:passes], m, consistency=consistency)
        most = min(n - found.params.t, int(0.4 * n))
    else:  # one who is lost leaves each of its neighbours with k holders, itself among them
        policy = replace(OPEN, min_threshold=0.5, consistency=consistency)
        found = cohort(n, (7, 11)[:passes], m, "kregular", consistency, t=3, k=4, policy=policy)
        most = 2
    who = data.draw(st.lists(st.integers(0, n - 1), max_size=most, unique=True), "lost")
    check(found, {found.ids[i]: data.draw(st.sampled_from(when(found)), f"lost {i}") for i in who})


def test_a_hundred_clients_lose_some_in_every_phase() -> None:
    found = cohort(100, (5,), 24)
    order = when(found)
    check(found, {found.ids[17 * i + 2]: phase for i, phase in enumerate(order)})


def test_a_hundred_clients_with_twenty_neighbours_and_two_passes_lose_some_in_every_phase() -> None:
    policy = replace(OPEN, min_threshold=0.5)
    found = cohort(100, (3, 4), 16, "kregular", t=11, k=20, policy=policy)
    check(found, {found.ids[11 * i + 5]: phase for i, phase in enumerate(when(found))})
    sent = len(found[0].steps[0].answer)
    assert sent == 18 + 32 + 3 * 32 + 64
    assert len(found[0].steps[1].answer) == 18 + 20 * (2 + 2 * 66 + 16) + 2 * (32 + 21 * 64) + 64


def test_phases_say_what_they_carry_and_without_consistency_one_is_left_out() -> None:
    for consistency in (True, False):
        found = cohort(5, (2, 3), consistency=consistency)
        seen = []
        while not found.server.is_over:
            seen.append(found.server.phase)
            assert found.server.waiting == frozenset(found.ids)
            assert set(found.server.outbox()) == set(found.ids)
            found.phase()
            assert (found.server.total is None) == (len(seen) < (5 if consistency else 4))
        later = [Phase("survivors", 1, "nothing")] if consistency else []
        first = [Phase("survivors", 0, "nothing")] if consistency else []
        assert seen == [
            Phase("keys", 0, "nothing"),
            Phase("shares", 0, "model"),
            Phase("vectors", 0, "nothing"),
            *first,
            Phase("unmask", 0, "nothing"),
            Phase("vectors", 1, "pass"),
            *later,
            Phase("unmask", 1, "nothing"),
        ]
        assert found.server.outbox() == {}
        assert found.server.waiting == frozenset()
        with pytest.raises(RuntimeError, match="over"):
            _ = found.server.phase
        with pytest.raises(RuntimeError, match="over"):
            found.server.close()


@pytest.mark.parametrize(
    ("phase", "text"),
    [
        ("keys", "keys of pass 0: 3 of 6 clients are left; want at least 5"),
        ("shares", "shares of pass 0: 3 of 6"),
        ("vectors", "vectors of pass 0: 3 of 6"),
        ("survivors", "survivors of pass 0: fewer than 5 are left who hold shares of 6 clients' secrets"),
        ("unmask", "3 good shares of what .* dealt; want at least 5"),
    ],
)
def test_too_few_in_any_phase_end_the_session_without_a_sum(phase: str, text: str) -> None:
    found = cohort(6)
    found.until(phase)
    with pytest.raises(ProtocolError, match=text):
        found.phase(lost=found.ids[:3])
    assert found.server.is_over
    assert found.server.total is None
    assert found.server.survivors == ()


def test_the_second_pass_has_no_sum_when_too_few_are_left_but_the_first_keeps_its() -> None:
    found = cohort(6, (4, 9))
    found.until("unmask", 0)
    found.phase(lost=found.ids[:1])
    with pytest.raises(ProtocolError, match="vectors of pass 1: 4 of 6 clients are left; want at least 5"):
        found.phase(lost=found.ids[1:2])
    np.testing.assert_array_equal(found.server.total, found.plain(found.ids, 0))
    assert found.server.survivors == tuple(found.ids)


def test_one_who_is_dropped_by_the_server_is_not_waited_for_nor_asked_again() -> None:
    found = cohort(6)
    found.until("vectors")
    gone = found.ids[2]
    found.server.drop(gone)
    assert gone not in found.server.waiting
    assert gone not in found.server.outbox()
    assert found.give(gone, b"") != ""
    total = found.finish()
    assert found.server.survivors == tuple(i for i in found.ids if i != gone)
    np.testing.assert_array_equal(total, found.plain(found.server.survivors))


def test_one_who_is_dropped_after_its_vector_came_is_in_the_sum_and_not_asked_again() -> None:
    found = cohort(6)
    found.until("vectors")
    answers = found.ask()
    for id_, message in answers.items():
        found.give(id_, message)
    found.server.drop(found.ids[0])
    found.close()
    assert found.server.waiting == frozenset(found.ids[1:])
    np.testing.assert_array_equal(found.finish(), found.plain(found.ids))


def test_a_session_ends_when_too_many_are_dropped_after_their_vectors_came() -> None:
    found = cohort(6)
    found.until("vectors")
    for id_, message in found.ask().items():
        found.give(id_, message)
    for id_ in found.ids[:2]:
        found.server.drop(id_)
    with pytest.raises(ProtocolError, match="vectors of pass 0: 4 of 6 clients are left; want at least 5"):
        found.close()
    assert found.server.is_over


def test_clients_that_heard_of_different_broadcasts_have_masks_that_do_not_cancel() -> None:
    found = cohort(5, (4, 40))
    found.until("vectors", 1)
    found[1].inputs.broadcast = bytes(32)
    answers = found.ask()
    for id_, message in answers.items():
        found.give(id_, message)
    found.close()
    found.phase()  # each signs with what it was told, so that the odd one is refused
    assert found.server.culprits.keys() == {found.ids[1]}
    total = found.finish()
    assert not np.isin(total, found.plain(found.ids, 1)).any()


def test_the_server_is_told_of_a_broadcast_only_ahead_of_a_later_pass() -> None:
    found = cohort(5, (2, 2))
    for phase in PHASES:
        found.until(phase)
        with pytest.raises(RuntimeError, match="want vectors of a later pass"):
            found.server.begin(BROADCAST)
    found.until("vectors", 1)
    found.server.begin(BROADCAST)
    asked = found.server.outbox()
    found.give(found.ids[0], found[0].answer(asked[found.ids[0]], 1).answer)
    with pytest.raises(RuntimeError, match="before any came"):
        found.server.begin(BROADCAST)
