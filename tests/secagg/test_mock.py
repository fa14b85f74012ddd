"""The protocol that hides nothing adds up what it should, and says that it hides nothing."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from fedpeft.errors import ProtocolError
from fedpeft.secagg.messages import Envelope, Kind, enclose
from fedpeft.secagg.mock import Mock
from fedpeft.secagg.protocol import Phase, Refused, Vectors

IDS = tuple(bytes([i]) * 32 for i in (7, 3, 9, 1))
DIMS = (5, 3)


@dataclass(frozen=True)
class Asked:
    """What Mock.server reads of a session's parameters."""

    session: str = "ab" * 16
    cohort: tuple[str, ...] = tuple(x.hex() for x in IDS)
    t: int = 2
    m: int = 24
    dims: tuple[int, ...] = DIMS


@dataclass(frozen=True)
class Given(Vectors):
    """A client's vector: its own number everywhere, plus the pass."""

    number: int
    dims: tuple[int, ...] = DIMS

    def model_hash(self):
        return bytes(32)

    def vector(self, pass_):
        return np.full(self.dims[pass_], self.number + pass_, np.uint32)


def side(id_):
    return Mock().client(SimpleNamespace(id=id_), None, None, None, None)


def ask(server, id_, state=b"", number=1):
    return side(id_).answer(state, server.outbox()[id_], Given(number), lambda n: bytes(n))


def test_two_passes_add_up_who_answered_modulo_the_ring():
    server = Mock().server(Asked(), None)
    assert server.phase == Phase("vectors", 0, "model")
    assert server.waiting == set(IDS)
    numbers = dict(zip(IDS, (2**24 - 1, 5, 7, 11), strict=True))
    steps = {i: ask(server, i, number=numbers[i]) for i in IDS[:3]}
    for i, step in steps.items():
        server.receive(i, step.answer)
    assert server.total is None
    assert server.waiting == {IDS[3]}
    server.close()
    assert server.survivors == tuple(sorted(IDS[:3]))
    np.testing.assert_array_equal(server.total, np.full(5, 11, np.uint32))  # 2^24 - 1 + 5 + 7 = 11
    assert server.total.dtype == np.uint32
    assert server.phase == Phase("vectors", 1, "pass")
    assert server.waiting == set(IDS[:3])
    server.drop(IDS[0])
    assert server.waiting == set(IDS[1:3])
    for i in IDS[1:3]:
        last = ask(server, i, steps[i].state, numbers[i])
        assert last.is_over
        assert not last.was_refused
        server.receive(i, last.answer)
    np.testing.assert_array_equal(server.total, np.full(5, 11, np.uint32))
    server.close()
    assert server.is_over
    assert server.survivors == tuple(sorted(IDS[1:3]))
    np.testing.assert_array_equal(server.total, np.full(3, 6 + 8, np.uint32))
    assert server.culprits == {}
    assert server.outbox() == {}
    with pytest.raises(RuntimeError, match="over"):
        server.phase  # noqa: B018
    with pytest.raises(RuntimeError, match="over"):
        server.close()


def test_who_is_dropped_after_its_answer_stays_in_that_sum_and_is_not_asked_again():
    server = Mock().server(Asked(), None)
    for i in IDS:
        server.receive(i, ask(server, i).answer)
    server.drop(IDS[1])
    server.close()
    assert server.survivors == tuple(sorted(IDS))
    assert server.waiting == set(IDS) - {IDS[1]}
    with pytest.raises(ValueError, match="not of this cohort of 4"):
        server.drop(b"x" * 32)


def test_too_few_answers_end_the_session():
    server = Mock().server(Asked(), None)
    server.receive(IDS[0], ask(server, IDS[0]).answer)
    with pytest.raises(ProtocolError, match="got 1; want 2 of 4"):
        server.close()
    assert server.is_over
    assert server.total is None
    with pytest.raises(Refused) as found:
        server.receive(IDS[1], b"")
    assert found.value.code == "stranger"


def test_strangers_repeats_and_wrong_vectors_are_refused_and_the_sum_stays_as_it_was():
    server = Mock().server(Asked(), None)
    good = ask(server, IDS[0], number=4).answer
    server.receive(IDS[0], good)
    tried = {
        "stranger": (b"x" * 32, good),
        "repeat": (IDS[0], good),
        "malformed": (IDS[1], good),  # another's
    }
    for code, (id_, message) in tried.items():
        with pytest.raises(Refused) as found:
            server.receive(id_, message)
        assert (found.value.code, found.value.culprit) == (code, id_)
    assert server.waiting == {IDS[2], IDS[3]}
    assert list(server.culprits) == [IDS[1]]
    with pytest.raises(Refused, match="want 15, for 5 of 24 bits") as found:
        server.receive(IDS[2], enclose(Kind.VECTOR, b"\xab" * 16, 0, IDS[2], bytes(14)))
    assert found.value.code == "malformed"
    with pytest.raises(Refused, match="refuses: order") as found:
        server.receive(IDS[3], ask(server, IDS[3], state=b"\xab" * 16 + b"\1", number=3).answer)
    assert found.value.code == "aborted"
    assert server.waiting == set()
    assert list(server.culprits) == [IDS[1], IDS[2]]  # and not who only refused


def question(kind=Kind.ASK_VECTOR, pass_=0, m=24, sizes=bytes([0, 0, 0, 0, 0, 0, 0, 5])):
    return enclose(kind, b"\xab" * 16, pass_, bytes([m]), sizes)


GARBAGE = [b"", b"\0", b"\xff" * 99, question(Kind.ASK_KEYS), question(pass_=1), question(m=18), question()[:-1]]


@pytest.mark.parametrize("change", GARBAGE)
def test_garbage_is_refused_by_both_sides(change):
    step = side(IDS[0]).answer(b"", change, Given(1), lambda n: bytes(n))
    assert step.was_refused
    assert step.is_over
    server = Mock().server(Asked(), None)
    with pytest.raises(Refused):
        server.receive(IDS[0], change)
    assert server.waiting == set(IDS) - {IDS[0]}


def test_a_client_answers_each_pass_once_in_order_and_for_its_own_length_only():
    server = Mock().server(Asked(), None)
    first = ask(server, IDS[0])
    assert ask(server, IDS[0], first.state).was_refused
    over = ask(server, IDS[0], first.state).state
    assert ask(server, IDS[0], over).was_refused
    other = Mock().server(replace(Asked(), session="cd" * 16), None)
    assert not ask(other, IDS[0], over).was_refused
    later = question(pass_=1, sizes=bytes(16))
    assert side(IDS[0]).answer(over, later, Given(1), lambda n: bytes(n)).was_refused
    longer = side(IDS[0]).answer(b"", server.outbox()[IDS[0]], Given(1, (6, 3)), lambda n: bytes(n))
    assert longer.was_refused
    assert Envelope.open(longer.answer).body == b"length"


def test_the_label_says_that_nothing_is_hidden():
    label = Mock().label(4)
    assert label.hides == "nothing"
    assert (label.corrupt, label.dropouts) == (0.0, 0.75)
    assert Mock().threshold(4) == 1
    assert Mock().degree(4) == 0
    with pytest.raises(ValueError, match="a cohort of 0"):
        Mock().threshold(0)
    with pytest.raises(ValueError, match="a cohort of 0"):
        Mock().degree(0)
    with pytest.raises(ValueError, match="dims"):
        Mock().server(replace(Asked(), dims=()), None)
