"""What a server or another client may try, and who is named for it."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fedpeft.errors import ProtocolError
from fedpeft.secagg import Policy, hash_models, kept, messages, states
from fedpeft.secagg.messages import Abort, Advert, Dealt, Envelope, Kind, Parcel, enclose
from fedpeft.secagg.protocol import Step
from fedpeft.secagg.shamir import split
from fedpeft.secagg.states import Shared
from tests.secagg.parties import OPEN, Cohort, Party, cohort, identity


def why(step: Step, party: Party, session: bytes) -> tuple[str, bytes]:
    """The code of a signed refusal, and who is accused."""
    assert step.was_refused
    envelope = Envelope.open(step.answer)
    assert (envelope.kind, envelope.session, envelope.pass_) == (Kind.ABORT, session, 0)
    found = Abort.read(envelope.body)
    assert found.is_of(party.id, session)
    return found.code, found.culprit


def refused(found: Cohort, party: Party, message: bytes, pass_: int = 0) -> tuple[str, bytes]:
    """How a client refuses a message; that it then refuses everything, for ever, and keeps nothing."""
    session = bytes.fromhex(found.params.session)
    step = party.answer(message, pass_)
    assert step.is_over
    assert kept.load(step.state) == kept.Closed(session, True)
    asked = found.server.outbox().get(party.id, enclose(Kind.ASK_SURVIVORS, session, 0))
    for again in (message, asked):
        later = party.answer(again, pass_)
        assert why(later, party, session) in (("closed", b""), ("replay", b""))
        assert later.state == step.state
    return why(step, party, session)


def ask(found: Cohort, kind: Kind, *body: bytes, pass_: int = 0) -> bytes:
    return enclose(kind, bytes.fromhex(found.params.session), pass_, *body)


def adverts(found: Cohort) -> list[Advert]:
    """What the server would send of everyone's keys."""
    found.until("shares")
    body = Envelope.open(found.server.outbox()[found.ids[0]]).body
    size = Advert.size(len(found.params.dims))
    return [Advert.read(body[i : i + size], len(found.params.dims)) for i in range(0, len(body), size)]


def listed(found: Cohort, rows: list[Advert]) -> bytes:
    return ask(found, Kind.ASK_SHARES, *(x.to_bytes() for x in rows))


# Keys: what the server asks for


@pytest.mark.parametrize(
    ("changes", "policy", "code"),
    [
        ({"t": 1}, None, "threshold"),
        ({"t": 4}, Policy(), "threshold"),  # two thirds of 6
        ({}, Policy(min_cohort=7), "cohort"),
        ({"n": 1, "k": 0, "t": 1, "cohort": (identity("/0").id.hex(),)}, None, "cohort"),
        ({"bits": 32}, None, "overflow"),
        ({"clip": "0"}, None, "grid"),
        ({"dims": (14,)}, None, "layout"),
        ({"layout_hash": "00" * 32}, None, "layout"),
        ({"model_hash": "00" * 32}, None, "model"),
        ({"fl_round": 2}, None, "round"),
        ({"suite": "mock"}, None, "suite"),
        ({"v": 2}, None, "version"),
        ({"consistency": False}, Policy(), "consistency"),
        ({"suite": "kregular"}, None, "suite"),
    ],
)
def test_a_client_refuses_parameters_that_its_policy_does_not_have(
    changes: dict[str, object], policy: Policy | None, code: str
) -> None:
    found = cohort(6, policy=policy)
    params = replace(found.params, **changes)
    message = ask(found, Kind.ASK_KEYS, params.to_json())
    assert refused(found, found.parties[identity("/0").id], message) == (code, b"")


def test_a_client_refuses_an_odd_number_of_neighbours_which_make_no_ring() -> None:
    found = cohort(8, suite="kregular", t=4, k=5, policy=replace(OPEN, min_threshold=0.5))
    assert refused(found, found[0], found.server.outbox()[found.ids[0]]) == ("degree", b"")


def test_a_client_refuses_a_cohort_with_somebody_who_is_not_in_the_roster() -> None:
    found = cohort(6)
    sybil = identity("made up").id
    ids = sorted([*found.ids[:-1], sybil])
    params = replace(found.params, cohort=tuple(x.hex() for x in ids))
    assert refused(found, found[0], ask(found, Kind.ASK_KEYS, params.to_json())) == ("roster", b"")
    with pytest.raises(ValueError, match="1 of the cohort are not in the roster"):
        type(found.server)(params, found.roster)


def test_a_client_refuses_a_session_that_it_has_begun_already() -> None:
    found = cohort(6)
    message = found.server.outbox()[found.ids[0]]
    assert not found[0].answer(message).was_refused
    step = found[0].answer(message)
    assert why(step, found[0], bytes.fromhex(found.params.session)) == ("replay", b"")
    assert kept.load(step.state) == kept.Closed(bytes.fromhex(found.params.session), True)


def test_a_client_refuses_a_session_that_its_journal_has() -> None:
    found = cohort(6)
    side = replace(found[0].side, history=replace(found[0].side.history, sessions={found.params.session}))
    found[0].side = side
    assert refused(found, found[0], found.server.outbox()[found.ids[0]]) == ("replay", b"")


def test_a_client_refuses_parameters_that_come_under_the_name_of_another_session() -> None:
    found = cohort(6)
    message = enclose(Kind.ASK_KEYS, bytes(16), 0, found.params.to_json())
    assert why(found[0].answer(message), found[0], bytes(16)) == ("session", b"")


def test_a_message_of_another_session_is_refused_and_this_one_goes_on() -> None:
    found = cohort(6)
    found.until("shares")
    before = found[0].state
    step = found[0].answer(enclose(Kind.ASK_SHARES, bytes(16), 0))
    assert why(step, found[0], bytes(16)) == ("session", b"")
    assert step.state == before
    assert not step.is_over
    np.testing.assert_array_equal(found.finish(), found.plain(found.ids))


def test_a_new_session_ends_the_one_before() -> None:
    found = cohort(6)
    found.until("vectors")
    session = hashlib.sha256(b"another").hexdigest()[:32]
    params = replace(found.params, session=session, attempt=1)
    step = found[0].answer(enclose(Kind.ASK_KEYS, bytes.fromhex(session), 0, params.to_json()))
    assert not step.was_refused
    old = found.server.outbox()[found.ids[0]]
    assert why(found[0].answer(old), found[0], bytes.fromhex(found.params.session))[0] == "session"


# Shares: everyone's keys


def swap(rows: list[Advert], place: int, **changes: object) -> list[Advert]:
    return [replace(x, **changes) if i == place else x for i, x in enumerate(rows)]


KEY = bytes([9, *[0] * 31])  # the base point: a good key of somebody's


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda rows: swap(rows, 2, masks=(KEY,)), "key-signature"),
        (lambda rows: swap(rows, 2, box=KEY), "key-signature"),
        (lambda rows: swap(rows, 0, box=KEY), "own-keys"),
        (lambda rows: swap(rows, 0, masks=(KEY,)), "own-keys"),
        (lambda rows: rows[1:], "own-keys"),
        (lambda rows: swap(rows, 2, signature=bytes(64)), "key-signature"),
        (lambda rows: swap(rows, 2, signature=rows[1].signature), "key-signature"),
        (lambda rows: swap(rows, 2, masks=rows[1].masks), "key-twice"),
        (lambda rows: swap(rows, 2, masks=(rows[2].box,)), "key-twice"),
        (lambda rows: swap(rows, 2, box=rows[2].box[:-1] + bytes([rows[2].box[-1] | 128])), "key"),
        (lambda rows: swap(rows, 2, id=identity("made up").id), "members"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "members"),
        (lambda rows: [rows[0], *rows[:5]], "members"),
        (lambda rows: [*rows, rows[0]], "malformed"),
        (lambda rows: rows[:3], "few"),
        (lambda rows: [], "few"),
    ],
)
def test_a_client_refuses_keys_that_are_not_as_everyone_has_signed_them(
    change: Callable[[list[Advert]], list[Advert]], code: str
) -> None:
    found = cohort(6)
    message = listed(found, change(adverts(found)))
    named = {"key-twice": found.ids[2], "key": found.ids[2]}.get(code, b"")
    assert refused(found, found[0], message) == (code, named)


def test_keys_from_another_session_or_round_are_refused() -> None:
    old, found = cohort(6), cohort(6, session=hashlib.sha256(b"another").hexdigest()[:32])
    for party, other in zip(found.parties.values(), old.parties.values(), strict=True):
        party.entropy = other.entropy  # as bad as it gets: the very same keys
    rows, before = adverts(found), adverts(old)
    assert rows[2].id == before[2].id
    assert refused(found, found[0], listed(found, [*rows[:2], before[2], *rows[3:]])) == ("key-signature", b"")


def test_a_client_refuses_another_model_than_all_were_told_of_or_none() -> None:
    for model in (bytes(32), None):
        found = cohort(6)
        found.until("shares")
        found[0].inputs.model = model
        assert refused(found, found[0], found.server.outbox()[found.ids[0]]) == ("model", b"")


def test_a_client_of_one_rank_refuses_the_model_of_another() -> None:
    models = {"4": hashlib.sha256(b"4").hexdigest(), "8": hashlib.sha256(b"8").hexdigest()}
    found = cohort(6, ranks=(4, 4, 4, 8, 8, 8), models=models, model_hash=hash_models(models).hex())
    found.until("shares")
    message = found.server.outbox()[found.ids[0]]
    found[0].inputs.model, found[5].inputs.model = bytes.fromhex(models["4"]), bytes.fromhex(models["4"])
    assert not found[0].answer(message).was_refused
    assert refused(found, found[5], message) == ("model", b"")


# Vectors: what the others have dealt


def parcels(found: Cohort, place: int) -> list[Parcel]:
    found.until("vectors")
    body = Envelope.open(found.server.outbox()[found.ids[place]]).body
    passes = len(found.params.dims)
    size = Parcel.size(passes)
    return [Parcel.read(bytes(body[i : i + size]), passes) for i in range(0, len(body), size)]


def boxed(found: Cohort, rows: list[Parcel]) -> bytes:
    return ask(found, Kind.ASK_VECTOR, *(x.to_bytes() for x in rows))


def flipped(data: bytes, place: int = 0) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (lambda rows: [replace(rows[0], sealed=flipped(rows[0].sealed, 40)), *rows[1:]], "sealed", 1),
        (
            lambda rows: [replace(rows[0], sealed=rows[1].sealed), replace(rows[1], sealed=rows[0].sealed), *rows[2:]],
            "sealed",
            1,
        ),
        (lambda rows: [replace(rows[0], commitments=rows[1].commitments), *rows[1:]], "share", 1),
        (lambda rows: [*rows[:2], rows[1], *rows[3:]], "senders", None),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "senders", None),
        (lambda rows: [*rows[:4], replace(rows[4], owner=identity("made up").id)], "senders", None),
        (lambda rows: rows[:3], "few", None),
    ],
)
def test_a_client_refuses_shares_that_were_changed_or_are_not_for_it(
    change: Callable[[list[Parcel]], list[Parcel]], code: str, named: int | None
) -> None:
    found = cohort(6)
    message = boxed(found, change(parcels(found, 0)))
    assert refused(found, found[0], message) == (code, b"" if named is None else found.ids[named])


def test_a_share_for_another_holders_place_is_its_dealers_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cohort(6)
    found.until("shares")
    cheat, asked = found.ids[3], found.server.outbox()
    for id_ in found.ids:
        with monkeypatch.context() as patch:
            if id_ == cheat:
                patch.setattr(states, "Opened", lambda point, shares: messages.Opened(point % 6 + 1, shares))
            found.give(id_, found.parties[id_].answer(asked[id_]).answer)
    found.close()
    assert refused(found, found[0], found.server.outbox()[found.ids[0]]) == ("share", cheat)


def test_a_later_pass_is_asked_for_with_nothing_but_its_broadcast() -> None:
    found = cohort(6, (4, 5))
    found.until("vectors", 1)
    message = found.server.outbox()[found.ids[0]]
    assert refused(found, found[0], message + b"\0", 1) == ("malformed", b"")
    found[1].inputs.broadcast = None
    assert refused(found, found[1], message, 1) == ("model", b"")


def test_a_client_refuses_survivors_of_whom_too_few_hold_its_shares() -> None:
    found = cohort(12, suite="kregular", t=4, k=4, policy=replace(OPEN, min_threshold=0.5))
    found.until("survivors")
    near = found.server._dealing.around[found.ids[0]]
    others = [i for i in found.ids if i not in near[:2]]
    assert not found[0].answer(ask(found, Kind.ASK_SURVIVORS, *(i for i in found.ids if i != near[0]))).was_refused
    again = cohort(12, suite="kregular", t=4, k=4, policy=replace(OPEN, min_threshold=0.5))
    again.until("survivors")
    assert refused(again, again[0], ask(again, Kind.ASK_SURVIVORS, *others)) == ("few", b"")


def test_who_has_too_few_neighbours_left_when_shares_are_dealt_is_left_out_and_the_others_go_on() -> None:
    # In this graph four are out, the most that clients' policies allow of twelve; in others it is five.
    found = cohort(12, suite="kregular", t=3, k=4, policy=replace(OPEN, min_threshold=0.5), seed="a")
    found.until("shares")
    holders = found.server._dealing.holders
    lost = found.server._dealing.around[found.ids[0]][:3]  # so that two are left who hold this one's shares
    found.phase(lost=lost)
    left = found.server.waiting
    assert found.ids[0] not in left
    assert len(left) == 8
    assert all(sum(v in left for v in holders[u]) >= 3 for u in left)
    assert all(sum(v in left for v in holders[u]) < 3 for u in set(found.ids) - left - set(lost))
    np.testing.assert_array_equal(found.finish(), found.plain(left))
    assert set(found.server.survivors) == left


def test_a_client_refuses_its_own_shares_sent_back_to_it() -> None:
    found = cohort(6)
    rows = parcels(found, 0)
    own = parcels(found, 1)[0]
    assert own.owner == found.ids[0]
    assert refused(found, found[0], boxed(found, [replace(rows[0], sealed=own.sealed), *rows[1:]])) == (
        "sealed",
        found.ids[1],
    )
    again = cohort(6)
    rows = parcels(again, 0)
    assert refused(again, again[0], boxed(again, [own, *rows])) == ("senders", b"")


def test_a_client_whose_training_gave_no_finite_vector_says_so_and_sends_none() -> None:
    for bad in (np.zeros(12, np.uint32), np.zeros(13, np.int64), np.full(13, 2**16, np.uint32)):
        found = cohort(6, m=16)
        found.until("vectors")
        found[0].inputs.vectors = [bad]
        assert refused(found, found[0], found.server.outbox()[found.ids[0]]) == ("vector", b"")

    def nan(pass_: int) -> None:
        raise ValueError("NaN in the update")

    found = cohort(6)
    found.until("vectors")
    found[0].inputs.vector = nan
    assert refused(found, found[0], found.server.outbox()[found.ids[0]]) == ("vector", b"")


# Survivors and unmasking


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda ids: ids[:3], "few"),
        (lambda ids: ids[1:], "survivors"),
        (lambda ids: [*ids[:4], ids[3], ids[5]], "survivors"),
        (lambda ids: [ids[1], ids[0], *ids[2:]], "survivors"),
        (lambda ids: sorted([*ids[:5], identity("made up").id]), "survivors"),
        (lambda ids: [*ids, ids[0]], "malformed"),
        (lambda ids: [], "survivors"),
    ],
)
@pytest.mark.parametrize("consistency", [True, False])
def test_a_client_refuses_survivors_that_can_not_be(
    change: Callable[[list[bytes]], list[bytes]], code: str, consistency: bool
) -> None:
    found = cohort(6, consistency=consistency)
    found.until("survivors" if consistency else "unmask")
    kind = Kind.ASK_SURVIVORS if consistency else Kind.ASK_UNMASK
    assert refused(found, found[0], ask(found, kind, *change(found.ids))) == (code, b"")


def test_a_client_refuses_survivors_of_whom_too_many_are_lost_for_its_policy() -> None:
    found = cohort(10, policy=replace(OPEN, max_dropout=0.2))
    found.until("survivors")
    assert not found[0].answer(ask(found, Kind.ASK_SURVIVORS, *found.ids[:8])).was_refused
    assert refused(found, found[1], ask(found, Kind.ASK_SURVIVORS, *found.ids[:7])) == ("few", b"")


def test_a_neighbour_that_dealt_nothing_can_not_be_said_to_survive() -> None:
    found = cohort(8)
    rows = parcels(found, 0)
    assert not found[0].answer(boxed(found, rows[:-1])).was_refused
    assert refused(found, found[0], ask(found, Kind.ASK_SURVIVORS, *found.ids)) == ("survivors", b"")


def test_a_client_refuses_survivors_among_whom_its_slice_is_almost_alone() -> None:
    found = cohort(8, ranks=(4, 4, 4, 4, 4, 8, 8, 8))
    found.until("survivors")
    without = [i for i in found.ids if i not in found.ids[5:7]]
    assert not found[0].answer(ask(found, Kind.ASK_SURVIVORS, *without)).was_refused
    assert refused(found, found[7], ask(found, Kind.ASK_SURVIVORS, *without)) == ("slice", b"")
    assert refused(cohort(8, ranks=(4,) * 7 + (8,)), (alone := cohort(8, ranks=(4,) * 7 + (8,)))[7],
                   alone.server.outbox()[alone.ids[7]]) == ("slice", b"")  # fmt: skip


def test_clients_that_are_told_of_different_survivors_give_nothing_out() -> None:
    found = cohort(9)
    found.until("survivors")
    signed, told = {}, [found.ids, found.ids[:-1]]
    for i in range(8):
        step = found[i].answer(ask(found, Kind.ASK_SURVIVORS, *told[i % 2]))
        signed[found.ids[i]] = bytes(Envelope.open(step.answer).body)
    rows = b"".join(i + signed[i] for i in found.ids[:7])
    for i in range(8):
        assert refused(found, found[i], ask(found, Kind.ASK_UNMASK, rows)) == ("inconsistent", b"")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda rows: rows[:4], "few"),
        (lambda rows: [rows[0], *rows[:4]], "signers"),
        (lambda rows: [*rows[:4], rows[0]], "signers"),
        (lambda rows: [*rows[:4], identity("made up").id + rows[4][32:]], "signers"),
        (lambda rows: [*rows[:4], rows[4][:32] + rows[3][32:]], "inconsistent"),
        (lambda rows: [*rows[:4], rows[4][:-1]], "malformed"),
    ],
)
def test_a_client_wants_enough_good_signatures_on_the_survivors(
    change: Callable[[list[bytes]], list[bytes]], code: str
) -> None:
    found = cohort(6)
    found.until("unmask")
    body = bytes(Envelope.open(found.server.outbox()[found.ids[5]]).body)
    rows = [body[i : i + 96] for i in range(0, len(body), 96)]
    assert len(rows) == found.params.t == 5
    message = ask(found, Kind.ASK_UNMASK, *change(sorted(rows) if code != "signers" else rows))
    got = refused(found, found[5], message)
    assert got == (code, b"") or (code == "signers" and got == ("signers", b""))


def test_signatures_must_come_from_those_who_hold_shares_of_mine() -> None:
    policy = replace(OPEN, min_threshold=0.5)
    found = cohort(12, suite="kregular", t=3, k=4, policy=policy)
    found.until("unmask")
    fixed = found.server._dealing
    me = found.ids[0]
    strangers = [i for i in found.ids if i not in fixed.holders[me]]
    rows = [i + found.server._signatures[i] for i in sorted(strangers)[:3]]
    assert refused(found, found[0], ask(found, Kind.ASK_UNMASK, *rows)) == ("signers", b"")


def test_shares_are_given_out_once_and_of_one_kind_for_each_owner() -> None:
    found = cohort(6)
    found.until("vectors")
    lost = found.ids[5]
    found.phase(lost=[lost])
    found.phase()
    state = kept.load(found[0].state)
    message = found.server.outbox()[found.ids[0]]
    body = Envelope.open(found[0].answer(message).answer).body
    want = b"".join(state.now.held[i][0][i == lost] for i in found.ids)
    assert bytes(body) == want
    for kind in (Kind.ASK_UNMASK, Kind.ASK_SURVIVORS, Kind.ASK_VECTOR, Kind.ASK_SHARES):
        step = found[0].answer(ask(found, kind, *found.ids[:5]))
        assert why(step, found[0], bytes.fromhex(found.params.session)) == ("closed", b"")
    assert kept.load(found[0].state) == kept.Closed(bytes.fromhex(found.params.session), False)


def test_a_client_signs_one_set_of_survivors_only() -> None:
    found = cohort(6)
    found.until("survivors")
    assert not found[0].answer(ask(found, Kind.ASK_SURVIVORS, *found.ids)).was_refused
    assert refused(found, found[0], ask(found, Kind.ASK_SURVIVORS, *found.ids[:5])) == ("phase", b"")


def test_without_consistency_shares_are_given_out_once_as_well() -> None:
    found = cohort(6, consistency=False)
    found.until("unmask")
    assert not found[0].answer(ask(found, Kind.ASK_UNMASK, *found.ids)).was_refused
    step = found[0].answer(ask(found, Kind.ASK_UNMASK, *found.ids[:5]))
    assert why(step, found[0], bytes.fromhex(found.params.session)) == ("closed", b"")


@pytest.mark.parametrize("consistency", [True, False])
def test_the_phase_of_the_other_profile_is_refused(consistency: bool) -> None:
    found = cohort(6, consistency=consistency)
    found.until("vectors")
    found.phase()
    kind = Kind.ASK_UNMASK if consistency else Kind.ASK_SURVIVORS
    assert refused(found, found[0], ask(found, kind, *found.ids)) == ("phase", b"")


# Clients that cheat


def test_changed_shares_are_left_out_and_who_sent_them_is_named() -> None:
    found = cohort(6, (4, 6))
    found.until("unmask")
    cheat = found.ids[2]
    answers = found.ask()
    for id_, message in answers.items():
        bad = found.give(id_, flipped(message, 18 + 7) if id_ == cheat else message)
        assert bad == (f"{cheat.hex()[:8]} sent 1 shares that are not those it was dealt" if id_ == cheat else "")
    found.close()
    np.testing.assert_array_equal(found.server.total, found.plain(found.ids))
    assert found.server.culprits == {cheat: f"{cheat.hex()[:8]} sent 1 shares that are not those it was dealt"}
    assert found.server.waiting == frozenset(found.ids) - {cheat}
    np.testing.assert_array_equal(found.finish(), found.plain([i for i in found.ids if i != cheat], 1))


def test_the_good_shares_of_one_who_changed_another_still_count() -> None:
    found = cohort(6)
    found.until("unmask")
    cheat = found.ids[2]
    answers = {i: x for i, x in found.ask().items() if i != found.ids[5]}  # 5 are left, and all 5 are wanted
    for id_, message in answers.items():
        found.give(id_, flipped(message, 18 + 33 * 5) if id_ == cheat else message)
    with pytest.raises(ProtocolError, match=f"4 good shares of what {found.ids[5].hex()[:8]} dealt; want at least 5"):
        found.close()


@pytest.mark.parametrize(("call", "dropped"), [(0, False), (1, True)])
def test_a_dealer_who_shares_another_secret_than_it_committed_to_is_named(
    call: int, dropped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cohort(6)
    found.until("shares")
    cheat, calls = found.ids[1], iter(range(2))

    def cheating(secret: bytes, *rest: object) -> list[bytes]:
        return split(bytes(32) if next(calls) == call else secret, *rest)

    asked = found.server.outbox()
    answers = {}
    for id_ in found.ids:
        with monkeypatch.context() as patch:
            if id_ == cheat:
                patch.setattr(states, "split", cheating)
            answers[id_] = found.parties[id_].answer(asked[id_]).answer
    for id_, message in answers.items():
        assert found.give(id_, message) == ""
    found.close()
    found.phase(lost=[cheat] if dropped else [])
    found.phase()
    text = f"{cheat.hex()[:8]} dealt shares that don't give what it had committed to"
    with pytest.raises(ProtocolError, match=text):
        found.phase()
    assert found.server.culprits == {cheat: text}
    assert found.server.total is None
    assert found.server.is_over


def test_a_dealer_of_shares_that_give_no_secret_at_all_is_named() -> None:
    found = cohort(6)
    found.until("shares")
    cheat = found[1]

    def other(secret: bytes, threshold: int, points: range, entropy: object) -> list[bytes]:
        return [bytes([1, *[0] * 31, x]) for x in points]  # a polynomial with a value beyond 2^256 at zero

    patch = pytest.MonkeyPatch()
    asked = found.server.outbox()
    for id_ in found.ids:
        if id_ == cheat.id:
            patch.setattr(states, "split", other)
        found.give(id_, found.parties[id_].answer(asked[id_]).answer)
        patch.undo()
    found.close()
    found.until("unmask")
    with pytest.raises(ProtocolError, match="dealt shares that don't give"):
        found.phase()
    assert found.server.culprits.keys() == {cheat.id}


def garbling(holders: list[bytes], found: Cohort, cheat: bytes) -> Callable[[bytes, bytes], bytes]:
    """Change what one has sealed for these."""

    def change(id_: bytes, message: bytes) -> bytes:
        if id_ != cheat:
            return message
        envelope = Envelope.open(message)
        others = [i for i in found.ids if i != cheat]
        dealt = Dealt.read(envelope.body, len(others), 1)
        sealed = tuple(flipped(x) if i in holders else x for i, x in zip(others, dealt.sealed, strict=True))
        return enclose(Kind.SHARES, envelope.session, 0, replace(dealt, sealed=sealed).to_bytes())

    return change


def test_a_dealer_whose_shares_two_can_not_open_is_named_and_the_round_goes_on_without_these() -> None:
    found = cohort(9)
    found.until("shares")
    cheat, victims = found.ids[4], found.ids[1:3]
    found.phase(change=garbling(victims, found, cheat))
    answers = found.ask()
    for id_, message in answers.items():
        said = found.give(id_, message)
        assert said == (f"{id_.hex()[:8]} goes no further: sealed" if id_ in victims else "")
    found.close()
    assert found.server.culprits == {cheat: "is in 2 conflicts over what was dealt, the most of those concerned"}
    total = found.finish()
    assert found.server.survivors == tuple(i for i in found.ids if i not in victims)
    np.testing.assert_array_equal(total, found.plain(found.server.survivors))


def test_of_one_who_can_not_open_shares_and_their_dealer_neither_is_named() -> None:
    found = cohort(9)
    found.until("shares")
    found.phase(change=garbling(found.ids[1:2], found, found.ids[4]))
    found.phase()
    assert found.server.culprits == {}
    np.testing.assert_array_equal(found.finish(), found.plain([i for i in found.ids if i != found.ids[1]]))


def lie(found: Cohort, by: int, about: bytes | None, code: str = "sealed") -> str:
    session = bytes.fromhex(found.params.session)
    word = Abort.of(found[by].identity, session, code, about)
    return found.give(found.ids[by], enclose(Kind.ABORT, session, 0, word.to_bytes()))


def test_accusations_count_only_where_the_server_can_not_look_itself() -> None:
    for phase in ("keys", "shares", "survivors", "unmask"):
        found = cohort(9)
        found.until(phase)
        for liar in (0, 1):
            assert lie(found, liar, found.ids[5]) == f"{found.ids[liar].hex()[:8]} goes no further: sealed"
            assert found.ids[liar] not in found.server.waiting
        assert found.server.culprits == {}
    for code, about, named in (
        ("sealed", 5, True),
        ("share", 5, True),
        ("key-signature", 5, False),
        ("inconsistent", 5, False),
        ("sealed", None, False),
    ):
        found = cohort(9)
        found.until("vectors")
        for liar in (0, 1):
            lie(found, liar, None if about is None else found.ids[about], code)
        assert found.server.culprits.keys() == ({found.ids[5]} if named else set())
    found = cohort(9)
    found.until("vectors")
    for liar in (0, 1):
        lie(found, liar, identity("made up").id)
        lie(found, liar, found.ids[liar])
    assert found.server.culprits == {}


def test_a_refusal_that_is_not_signed_is_its_senders_own_doing() -> None:
    found = cohort(9)
    found.until("vectors")
    session = bytes.fromhex(found.params.session)
    word = Abort.of(found[1].identity, session, "sealed", found.ids[5])
    said = found.give(found.ids[0], enclose(Kind.ABORT, session, 0, word.to_bytes()))
    assert said == f"{found.ids[0].hex()[:8]} sent a refusal that it has not signed"
    assert found.server.culprits == {found.ids[0]: said}
    word = Abort.of(found[1].identity, bytes(16), "sealed", found.ids[5])
    assert "not signed" in found.give(found.ids[1], enclose(Kind.ABORT, session, 0, word.to_bytes()))


@pytest.mark.parametrize("phase", ["keys", "shares", "vectors", "survivors"])
def test_what_is_not_signed_for_this_session_is_refused_and_its_sender_named(phase: str) -> None:
    found = cohort(6)
    found.until(phase)
    cheat = found.ids[3]
    for id_, message in found.ask().items():
        place = 18 if phase in ("vectors", "survivors") else len(message) - 1
        said = found.give(id_, flipped(message, place) if id_ == cheat else message)
        assert ("not signed for this session" in said) == (id_ == cheat)
    found.close()
    assert found.server.culprits.keys() == {cheat}
    total = found.finish()
    there = [i for i in found.ids if i != cheat or phase == "survivors"]
    assert found.server.survivors == tuple(there)
    np.testing.assert_array_equal(total, found.plain(there))


def test_the_server_refuses_keys_of_another_or_twice_or_that_give_no_secret() -> None:
    found = cohort(6)
    answers = found.ask()
    session = bytes.fromhex(found.params.session)

    def signed(place: int, **changes: object) -> bytes:
        advert = replace(Advert.read(answers[found.ids[place]][18:], 1), **changes)
        text = b"fedpeft-sa/1/adv" + found.params.ctx + advert.box + b"".join(advert.masks)
        advert = replace(advert, signature=found[place].identity.sign(text))
        return enclose(Kind.KEYS, session, 0, advert.to_bytes())

    assert found.give(found.ids[0], answers[found.ids[0]]) == ""
    first = Advert.read(answers[found.ids[0]][18:], 1)
    for place, changes, text in (
        (1, {"masks": first.masks}, "a key that is there already"),
        (2, {"box": first.masks[0]}, "a key that is there already"),
        (3, {"box": bytes(32)}, "a public key that gives no secret"),
        (4, {"masks": ((2**255 - 19 + 9).to_bytes(32, "little"),)}, "not written in the one way"),
        (5, {"id": found.ids[4]}, "the keys of somebody else"),
    ):
        assert text in found.give(found.ids[place], signed(place, **changes))
    assert found.server.culprits.keys() == set(found.ids[1:])
    own = cohort(6)
    advert = Advert.read(own.ask()[own.ids[0]][18:], 1)
    text = b"fedpeft-sa/1/adv" + own.params.ctx + advert.box * 2
    advert = replace(advert, masks=(advert.box,), signature=own[0].identity.sign(text))
    assert "there already" in own.give(own.ids[0], enclose(Kind.KEYS, session, 0, advert.to_bytes()))


def test_a_late_or_repeated_vector_changes_nothing() -> None:
    found = cohort(6)
    found.until("vectors")
    answers = found.ask()
    late = found.ids[5]
    for id_, message in answers.items():
        if id_ != late:
            assert found.give(id_, message) == ""
            assert "has answered" in found.give(id_, message)
    found.close()
    assert "too late" in found.give(late, answers[late])
    assert found.server.waiting == frozenset(found.ids[:5])
    np.testing.assert_array_equal(found.finish(), found.plain(found.ids[:5]))
    assert "not asked" in found.give(found.ids[0], answers[found.ids[0]])


def test_a_client_holds_nothing_of_those_who_are_not_its_neighbours() -> None:
    found = cohort(12, suite="kregular", t=3, k=4, policy=replace(OPEN, min_threshold=0.5))
    found.until("vectors")
    state = kept.load(found[0].state)
    assert isinstance(state, Shared)
    assert set(state.peers) == set(found.server._dealing.around[found.ids[0]])
    assert len(state.peers) == 4
