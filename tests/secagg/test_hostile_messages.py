"""Messages that are cut short, changed, repeated, out of order, of another kind, enormous, or no messages at all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import ProtocolError
from fedpeft.secagg import kept
from fedpeft.secagg.messages import Abort, Advert, Dealt, Envelope, Kind, Opened, Parcel, Vector, cut, rows, session_of
from tests.secagg.parties import Cohort, cohort

WHEN = [("keys", 0), ("shares", 0)] + [(x, p) for p in (0, 1) for x in ("vectors", "survivors", "unmask")]
ANSWERS = {
    "shares": Kind.SHARES,
    "vectors": Kind.VECTOR,
    "survivors": Kind.SURVIVORS,
    "unmask": Kind.UNMASK,
}
NOT_BYTES = [None, 0, "", "abc", float("nan"), [], {}, (1, 2), object(), np.zeros(3)]


def mangled(data: st.DataObject, message: bytes, others: list[bytes]) -> bytes:
    """Some other message than this one."""
    how = data.draw(st.sampled_from(("cut", "flip", "longer", "kind", "pass", "session", "other", "random", "twice")))
    at = data.draw(st.integers(0, len(message) - 1), "at")
    match how:
        case "cut":
            return message[:at]
        case "flip":
            return message[:at] + bytes([message[at] ^ data.draw(st.integers(1, 255))]) + message[at + 1 :]
        case "longer":
            return message + bytes(data.draw(st.integers(1, 5_000)))
        case "kind":
            return bytes([data.draw(st.integers(0, 255).filter(lambda x: x != message[0]))]) + message[1:]
        case "session":
            return message[:1] + bytes(16) + message[17:]
        case "pass":
            return (
                message[:17] + bytes([data.draw(st.integers(0, 255).filter(lambda x: x != message[17]))]) + message[18:]
            )
        case "other":
            return data.draw(st.sampled_from([x for x in others if x != message] or [b""]))
        case "twice":
            return message + message[18:] if len(message) > 18 else message + message
    return data.draw(st.binary(max_size=300))


def reach(found: Cohort, when: tuple[str, int]) -> list[bytes]:
    """Go to a phase; everything that was sent on the way."""
    seen = []
    while (found.server.phase.name, found.server.phase.pass_) != when:
        seen += found.server.outbox().values()
        answers = found.ask()
        seen += answers.values()
        for id_, message in answers.items():
            found.give(id_, message)
        found.close()
    return seen


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_no_message_to_a_client_makes_it_fail_or_say_what_it_should_not(data: st.DataObject) -> None:
    found = cohort(5, (3, 4))
    when = data.draw(st.sampled_from(WHEN), "when")
    seen = reach(found, when)
    party = found[data.draw(st.integers(0, 4), "who")]
    real = found.server.outbox()[party.id]
    session = bytes.fromhex(found.params.session)
    message = mangled(data, real, seen)
    before = party.state
    step = party.answer(message, when[1])
    if not step.was_refused and real.startswith(message):  # whole rows are left, and enough of them
        assert Envelope.open(step.answer).kind == ANSWERS[when[0]]
        return
    if not step.was_refused:  # other parameters may be good ones too; nobody else signs for them
        assert (when[0], Envelope.open(step.answer).kind) == ("keys", Kind.KEYS)
        assert Envelope.open(message).kind == Kind.ASK_KEYS
        return
    said = Envelope.open(step.answer)
    assert said.kind == Kind.ABORT
    assert Abort.read(said.body).is_of(party.id, said.session)
    if before and session_of(message) not in (None, session):
        if Envelope.open(message).kind == Kind.ASK_KEYS:
            assert step.is_over
        else:
            assert step.state == before
            assert not step.is_over
        return
    assert step.is_over == (bool(before) or session_of(message) is None or message[0] == Kind.ASK_KEYS)
    if before:
        assert kept.load(step.state) == kept.Closed(session, True)
        again = party.answer(real, when[1])
        assert again.was_refused
        assert again.state == step.state


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_no_message_of_one_client_stops_the_others(data: st.DataObject) -> None:
    found = cohort(7, (3, 4), m=24)
    when = data.draw(st.sampled_from(WHEN), "when")
    seen = reach(found, when)
    bad = found.ids[data.draw(st.integers(0, 6), "who")]
    answers = found.ask()
    message = mangled(data, answers[bad], [*seen, *answers.values()])
    said = {id_: found.give(id_, message if id_ == bad else good) for id_, good in answers.items()}
    assert not any(text for id_, text in said.items() if id_ != bad)
    found.close()
    sums = [(found.server.survivors, found.server.total)]
    while not found.server.is_over:
        found.phase()
        sums.append((found.server.survivors, found.server.total))
    gone = {bad}
    if not said[bad]:  # only the holder of a sealed share can tell that it was changed
        assert when[0] == "shares"
        assert len(message) == len(answers[bad])
        gone = set(found.ids) - set(sums[-1][0])
        assert len(gone) == 1
        assert bad not in gone
    assert not gone & found.server.waiting
    for pass_, size in enumerate((3, 4)):
        later = WHEN.index(when) > WHEN.index(("vectors", pass_))
        there = tuple(i for i in found.ids if later or i not in gone)
        summed = [x for x in sums if x[1] is not None and x[1].size == size]
        assert summed or (later and pass_ == 0)  # unless it was summed before
        for survivors, total in summed:
            assert survivors == there
            np.testing.assert_array_equal(total, found.plain(there, pass_))
    assert set(found.server.culprits) <= {bad}


@pytest.mark.parametrize("when", WHEN)
def test_what_is_no_bytes_is_refused_on_either_side(when: tuple[str, int]) -> None:
    found = cohort(6, (3, 4))
    reach(found, when)
    for bad in NOT_BYTES:
        with pytest.raises(ProtocolError):
            found.server.receive(bad, b"")
    for id_ in found.ids[:1]:
        with pytest.raises(ProtocolError, match="want bytes"):
            found.server.receive(id_, NOT_BYTES[len(when[0])])
    message = found.server.outbox()[found.ids[1]]
    assert found[1].answer(None, when[1]).was_refused
    assert kept.load(found[1].state).was_refused
    assert found[1].answer(message, when[1]).was_refused == (when[0] != "keys")  # what names no session ends none


@pytest.mark.parametrize("kind", ["keys", "shares", "vectors", "survivors", "unmask"])
def test_an_enormous_list_is_refused_by_its_size_alone(kind: str) -> None:
    found = cohort(6)
    found.until(kind)
    message = found.server.outbox()[found.ids[0]]
    step = found[0].answer(message + message[18:] * 20_000 + (bytes(17 << 20) if kind == "keys" else b""))
    assert Abort.read(Envelope.open(step.answer).body).code == "malformed"
    assert "malformed" not in found.give(found.ids[1], found[1].answer(message).answer)
    assert found.give(found.ids[2], bytes([0x11]) + message[1:18] + bytes(1 << 24)) != ""


def test_one_answer_of_each_kind_is_not_taken_for_another() -> None:
    found = cohort(6, (3, 4))
    answers: dict[str, bytes] = {}
    while not found.server.is_over:
        name = f"{found.server.phase.name} of pass {found.server.phase.pass_}"
        assert all(found.give(found.ids[0], x) for x in answers.values()) or not answers
        found = _again(found)
        reply = found.ask()
        answers[name] = reply[found.ids[0]]
        for id_, message in reply.items():
            assert found.give(id_, message) == ""
        found.close()
    assert len(answers) == 8


def _again(found: Cohort) -> Cohort:
    """The same session, at the same phase, from the start: a wrong answer put its sender out."""
    when = (found.server.phase.name, found.server.phase.pass_)
    fresh = cohort(6, (3, 4))
    reach(fresh, when)
    return fresh


def test_pieces_must_add_up_to_the_byte() -> None:
    whole = memoryview(b"abcdef")
    assert cut(whole, (1, 2, 3), "x") == [b"a", b"bc", b"def"]
    for sizes in ((1, 2), (1, 2, 4), ()):
        with pytest.raises(ProtocolError, match=f"6 bytes of x; want {sum(sizes)}"):
            cut(whole, sizes, "x")
    assert rows(whole, 2, 3, "x") == [b"ab", b"cd", b"ef"]
    assert rows(memoryview(b""), 2, 0, "x") == []
    for size, most in ((2, 2), (4, 9), (5, 9)):
        with pytest.raises(ProtocolError, match=f"want at most {most} rows of {size}"):
            rows(whole, size, most, "x")


def test_messages_are_the_same_after_they_were_bytes() -> None:
    def fill(size: int, byte: int) -> bytes:
        return bytes([byte]) * size

    advert = Advert(fill(32, 1), fill(32, 2), (fill(32, 3), fill(32, 4)), fill(64, 5))
    assert Advert.read(advert.to_bytes(), 2) == advert
    assert len(advert.to_bytes()) == Advert.size(2) == 32 * 4 + 64
    shares = tuple(tuple((fill(32, 10 * p + v), fill(32, 100 + 10 * p + v)) for v in range(3)) for p in range(2))
    dealt = Dealt((fill(150, 6), fill(150, 7)), (fill(32, 8), fill(32, 9)), shares, fill(64, 5))
    assert Dealt.sealed_size(2) == 2 + 4 * 33 + 16 == 150
    assert Dealt.read(memoryview(dealt.to_bytes()), 2, 2) == dealt
    assert dealt.commitments == (*dealt.seeds, *(x for row in shares for both in row for x in both))
    parcel = Parcel(fill(32, 1), fill(150, 2), ((fill(32, 3), fill(32, 4)), (fill(32, 5), fill(32, 6))))
    assert Parcel.read(parcel.to_bytes(), 2) == parcel
    assert len(parcel.to_bytes()) == Parcel.size(2) == 32 + 150 + 128
    opened = Opened(259, ((fill(33, 1), fill(33, 2)), (fill(33, 3), fill(33, 4))))
    assert opened.to_bytes()[:2] == b"\x01\x03"
    assert Opened.read(opened.to_bytes(), 2) == opened
    vector = Vector.read(memoryview(fill(64, 1) + fill(12, 2)), 12)
    assert (vector.signature, bytes(vector.packed)) == (fill(64, 1), fill(12, 2))
    for culprit in (b"", fill(32, 3)):
        word = Abort("some-word", culprit, fill(64, 4))
        assert Abort.read(memoryview(word.to_bytes())) == word
    for bad in (b"", b"\0", b"\1a", b"\1a\0", b"\1a\0" + bytes(63), b"\1a\1x" + bytes(64), b"\1 \0" + bytes(64)):
        with pytest.raises(ProtocolError):
            Abort.read(memoryview(bad))
    with pytest.raises(ProtocolError):
        Abort.read(memoryview(b"\x41" + b"a" * 65 + b"\0" + bytes(64)))
    for data in (b"", bytes(17), b"\x09" + bytes(17)):
        assert session_of(data) is None
    assert session_of(b"\x01" + b"s" * 16 + b"\0") == b"s" * 16
