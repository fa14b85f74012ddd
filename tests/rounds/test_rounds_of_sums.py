"""A round that sees only sums, as a state machine: who is asked, what is refused, what comes out."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import same
from fedpeft.channel import RingChannel
from fedpeft.errors import ProtocolError
from fedpeft.rounds import SecureRound, grids
from fedpeft.secagg.protocol import Phase, Refused
from tests.laws.cohorts import FEDIT, play
from tests.laws.secure import LARGEST, id_of
from tests.rounds.scripted import CHANNEL, CLIENTS, RANKS, STATE, TWO, Scripted, all_good, scripted, totals


def test_everybody_receives_the_sessions_message_and_the_model_in_its_own_rank_where_the_phase_carries_it():
    m = scripted()
    assert (m.phase, m.waiting, m.is_settled, m.is_over) == (Phase("keys", 0, "nothing"), set(RANKS), False, False)
    assert m.outbox() == {c: (b"to " + id_of(c), None) for c in RANKS}
    assert list(m.outbox()) == sorted(RANKS)
    all_good(m, 14, 10)
    assert list(m.outbox()) == [11, 12, 13]
    all_good(m)
    assert m.is_settled
    assert m.outbox() == {}
    m.close()
    outbox = m.outbox()
    assert {c: sent.adapter.layers["q"].rank for c, (_, sent) in outbox.items()} == RANKS
    assert all(sent.task is STATE.task for _, sent in outbox.values())
    assert outbox[10][1] is outbox[13][1]
    assert scripted(carries="nothing").session.carried == "nothing"


def test_an_outcome_is_that_of_the_round_in_the_clear():
    m = scripted()
    for _ in range(2):
        all_good(m)
        m.close()
    assert m.is_over
    got, want = m.result(), play(FEDIT, STATE, CLIENTS, ranks=RANKS)
    for n, x in want.state.adapter.tensors().items():
        np.testing.assert_allclose(got.state.adapter.tensors()[n], x, atol=3e-6)  # fp32 in the clear
    assert (got.survivors, got.refused, got.metrics, got.exactness) == (tuple(RANKS), (), want.metrics, None)
    assert got.weight == pytest.approx(want.weight, rel=1e-12)
    assert got.staleness == ()
    assert got.state.task.round == 5
    assert m.waiting == frozenset()
    assert m.outbox() == {}
    again = m.result()
    assert same(again.state.adapter, got.state.adapter)
    assert m.state is STATE


def test_an_open_round_has_no_result_and_a_closed_one_is_not_closed_again():
    m = scripted()
    all_good(m, 10, 11)
    with pytest.raises(RuntimeError, match=r"^the round is still open: 3 clients have not answered$"):
        m.result()
    for _ in range(2):
        m.close()
    with pytest.raises(RuntimeError, match=r"^the round is over: nothing to close$"):
        m.close()


def test_a_stranger_is_refused_and_the_session_does_not_hear_of_it():
    m = scripted()
    with pytest.raises(ProtocolError, match=r"^was not asked, or is no longer waited for$"):
        m.receive(99, b"good")
    assert m.refused == [(99, "was not asked, or is no longer waited for")]
    assert m.session.heard == []
    assert m.waiting == set(RANKS)


def test_a_second_answer_is_refused_and_the_first_one_counts_until_the_next_phase():
    m = scripted()
    all_good(m, 12)
    with pytest.raises(ProtocolError, match=r"^answered twice: the first answer counts$"):
        m.receive(12, b"bad")
    assert m.session.heard == [(id_of(12), b"good")]
    assert m.refused == [(12, "answered twice: the first answer counts")]
    all_good(m)
    m.close()
    all_good(m)
    m.close()
    assert m.result().survivors == tuple(RANKS)


def test_a_bad_answer_is_refused_counted_and_the_others_go_on():
    m = scripted()
    all_good(m, 10)
    with pytest.raises(Refused, match="b'rot' is not good") as error:
        m.receive(12, b"rot")
    assert error.value.culprit == id_of(12)
    assert m.refused == [(12, "b'rot' is not good")]
    assert m.waiting == {11, 13, 14}
    with pytest.raises(ProtocolError, match="no longer waited for"):
        m.receive(12, b"good")
    all_good(m)
    m.close()
    assert m.waiting == {10, 11, 13, 14}


def test_who_failed_is_dropped_unless_it_has_answered():
    m = scripted()
    all_good(m, 10)
    m.refuse(11, "out of memory")
    m.refuse(10, "said so too late")
    m.refuse(99, "who is that")
    assert m.session.dropped == [id_of(11)]
    assert m.refused == [(11, "out of memory"), (10, "said so too late"), (99, "who is that")]
    assert m.waiting == {12, 13, 14}


def test_who_does_not_answer_in_time_is_counted_with_the_phase():
    m = scripted()
    all_good(m, 10, 12, 14)
    m.close()
    assert m.refused == [(c, "no answer before the deadline (keys)") for c in (11, 13)]
    assert m.waiting == {10, 12, 14}
    all_good(m, 12, 14)
    m.close()
    assert m.refused[2:] == [(10, "no answer before the deadline (vectors)")]
    got = m.result()
    assert got.survivors == (12, 14)
    assert got.refused == tuple(m.refused)


def test_a_session_that_fails_ends_the_round_with_its_reason():
    m = scripted()
    all_good(m, 10)
    m.close()
    assert m.is_over
    assert m.waiting == frozenset()
    assert m.to_helper() is None
    with pytest.raises(ProtocolError, match=r"^fewer than 2 are left$"):
        m.result()
    assert m.state is STATE


def test_a_session_that_ends_without_a_sum_gives_no_result():
    m = scripted()
    m.session.over = True
    assert m.is_over
    with pytest.raises(ProtocolError, match=r"^the session ended without a sum$"):
        m.result()
    m = scripted(sums=[None])
    for _ in range(2):
        all_good(m)
        m.close()
    with pytest.raises(ProtocolError, match=r"^the session ended without a sum$"):
        m.result()


@pytest.mark.parametrize(("stay", "enough"), [(3, True), (2, False)])
def test_a_quorum_is_of_those_in_the_sum(stay, enough):
    m = scripted(quorum=3)
    all_good(m)
    m.close()
    all_good(m, *list(RANKS)[:stay])
    m.close()
    assert m.is_over
    if enough:
        assert m.result().survivors == (10, 11, 12)
    else:
        with pytest.raises(ProtocolError, match=r"^too few answers: got 2; want at least 3$"):
            m.result()


@pytest.mark.parametrize("quorum", [0, -1])
def test_a_round_without_a_quorum_is_refused(quorum):
    with pytest.raises(ValueError, match=f"^quorum: got {quorum}; want at least 1"):
        scripted(quorum=quorum)


def test_every_client_needs_an_id_of_its_own():
    for ids in ({c: id_of(1) for c in RANKS}, {10: id_of(10)}, {c + 1: id_of(c) for c in RANKS}):
        with pytest.raises(ValueError, match=r"^ids: got \d for 5 clients; want one for each, no two the same$"):
            scripted(ids=ids)


def test_grids_must_be_those_of_the_passes():
    good = grids(TWO, CHANNEL, STATE.task, 5, LARGEST)
    assert [(x.size, x.sketches, x.cohort, x.largest_weight) for x in good] == [
        (TWO.layout(replace(STATE.task, pass_=p)).size, 0, 5, LARGEST) for p in (0, 1)
    ]
    assert good[0].size != good[1].size
    ids = {c: id_of(c) for c in RANKS}
    for grid in (good[:1], good[::-1], (*good, good[1])):
        with pytest.raises(ValueError, match=r"^grid: got sizes \[.*\]; want those of the rule's passes, \["):
            SecureRound(STATE, RANKS, ids, 1, grid, Scripted(ids.values(), []), rule=TWO)
    with pytest.raises(ValueError, match=r"^grid: got sizes"):
        SecureRound(STATE, RANKS, ids, 1, good, Scripted(ids.values(), []), rule=TWO, exactness=True)
    with pytest.raises(ValueError, match=r"^bits: got 31; want at least 2 and at most 29"):
        grids(TWO, RingChannel(bits=31), STATE.task, 5, LARGEST)


def test_culprits_are_told_by_number():
    m = scripted()
    m.session.blamed = {id_of(13): "bad shares", b"the helper": "is nobody's number"}
    assert m.culprits == {13: "bad shares"}


def test_the_sum_is_not_there_before_the_second_server_has_answered():
    m = scripted(helper=True)
    all_good(m)
    m.close()
    assert m.to_helper() is None
    all_good(m)
    m.close()
    assert m.to_helper() == b"please"
    assert not m.is_over
    m.from_helper(b"thanks")
    assert m.to_helper() is None
    assert m.is_over
    assert m.result().survivors == tuple(RANKS)


def test_a_second_server_that_answers_rot_ends_the_round():
    m = scripted(helper=True)
    for _ in range(2):
        all_good(m)
        m.close()
    with pytest.raises(ProtocolError, match="nothing of use"):
        m.from_helper(b"rot")
    assert m.is_over
    assert m.to_helper() is None
    with pytest.raises(ProtocolError, match=r"^the helper said nothing of use$"):
        m.result()


def test_a_sum_that_left_the_grid_ends_the_round():
    _, (total,) = totals(FEDIT, CLIENTS)
    total[0] = 2**31 - 1
    m = scripted(sums=[total])
    for _ in range(2):
        all_good(m)
        m.close()
    assert m.is_over
    with pytest.raises(ProtocolError, match="a client left the grid"):
        m.result()
