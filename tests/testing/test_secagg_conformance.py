"""Our own protocols pass the checks for protocols of others, and broken ones fail the check that is meant for them."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fedpeft.errors import ProtocolError
from fedpeft.secagg import Full, KRegular, Mock, TwoServer
from fedpeft.secagg.helper import Helper, HelperKey, InMemory
from fedpeft.secagg.mock import MockClient, MockServer
from fedpeft.secagg.protocol import Protocol, Step
from fedpeft.secagg.terms import Policy
from fedpeft.testing import Second, secagg_conformance
from fedpeft.testing.secagg import CHECKS, UNIFORM

KEY = HelperKey.of(b"\x55" * 32)


def start(roster):
    """A helper of one session, that believes who has signed its roster."""
    helper = Helper(KEY, roster, frozenset(roster.signatures), Policy(), InMemory())
    return lambda request: helper.answer(request, 0.0).answer


SECOND = Second(KEY.public, start)


def checks(*found):
    return pytest.mark.parametrize("check", [x for one in found for x in one], ids=lambda x: x.name)


@checks(secagg_conformance(Full()))
def test_full(check):
    check()


@checks(secagg_conformance(TwoServer(), second=SECOND))
def test_twoserver(check):
    check()


@checks(secagg_conformance(Mock(), 5))
def test_mock(check):
    check()


RING = KRegular(corrupt=0.05, dropouts=0.05, consistency=False)
QUICK = ("strangers and repeats are refused", "too few make no sum", "its label says whom to believe")


@checks([x for x in secagg_conformance(RING, 50, consistency=False) if x.name in QUICK])
def test_kregular(check):
    check()


@pytest.mark.slow  # 50 clients are the fewest of a ring, and their 2,500 signatures take seconds in each session
@checks([x for x in secagg_conformance(RING, 50, consistency=False) if x.name not in QUICK])
def test_kregular_at_length(check):
    check()


@dataclass(frozen=True, slots=True)
class Broken(Mock):
    """The mock with another server or client."""

    server_class: type[MockServer] = MockServer
    client_class: type[MockClient] = MockClient
    hides: str = "nothing"

    def label(self, cohort):
        return replace(Mock.label(self, cohort), hides=self.hides)

    def client(self, me, roster, policy, history, expected):
        return self.client_class(me.id)

    def server(self, params, roster):
        made = Mock.server(self, params, roster)
        return self.server_class(made.session, made.cohort, made.threshold, made.modulus, made.dims)


class Twice(MockServer):
    """Adds a repeated vector again."""

    def receive(self, id_, message):
        if id_ in self._answered:
            self._waiting.add(id_)
        MockServer.receive(self, id_, message)


class Anybody(MockServer):
    """Asks nobody who they are."""

    def receive(self, id_, message):
        MockServer.receive(self, id_ if id_ in self.cohort else min(self._waiting), message)


class Crashes(MockServer):
    """Has an error of its own for a message that it can't read."""

    def receive(self, id_, message):
        if len(message) < 30:
            raise KeyError(message)
        MockServer.receive(self, id_, message)


class EndsAll(MockServer):
    """Ends the session because of one client."""

    def receive(self, id_, message):
        try:
            MockServer.receive(self, id_, message)
        except ProtocolError:
            self._is_over = True
            raise


class Forgets(MockServer):
    """Says that all of the cohort are in the sum."""

    @property
    def survivors(self):
        return tuple(sorted(self.cohort)) if self._survivors else ()


class Wraps(MockServer):
    """A sum in the wrong ring."""

    @property
    def total(self):
        return None if self._total is None else self._total & np.uint32(2**23 - 1)


class NeverTooFew(MockServer):
    """Makes a sum of whoever is there."""

    def close(self):
        self.threshold = 0
        MockServer.close(self)


class StillAsks(MockServer):
    """Does not let go of who was dropped."""

    def drop(self, id_):
        self._out.add(id_)


class Hoards(MockServer):
    """Keeps every message."""

    def __init__(self, *about):
        MockServer.__init__(self, *about)
        self.messages = []

    def receive(self, id_, message):
        MockServer.receive(self, id_, message)
        self.messages.append(message)


class Draws(MockClient):
    """Has a state with randomness that it took from elsewhere."""

    def answer(self, state, message, surroundings, entropy):
        step = MockClient.answer(self, state[:17], message, surroundings, entropy)
        return replace(step, state=step.state + os.urandom(4))


class Remembers(MockClient):
    """Keeps its vector."""

    def answer(self, state, message, surroundings, entropy):
        step = MockClient.answer(self, state[:17], message, surroundings, entropy)
        kept = surroundings.vector(1).tobytes() if step.is_over and not step.was_refused else b""
        return replace(step, state=step.state + kept)


class Grows(MockClient):
    """Keeps far more than it needs, once it has refused."""

    def answer(self, state, message, surroundings, entropy):
        step = MockClient.answer(self, state[:17], message, surroundings, entropy)
        return replace(step, state=step.state + bytes(600)) if step.was_refused else step


class Raises(MockClient):
    """Has an error for what it can't read."""

    def answer(self, state, message, surroundings, entropy):
        if not message:
            raise IndexError("no message")
        return MockClient.answer(self, state, message, surroundings, entropy)


class Obliges(MockClient):
    """Answers again, when asked again."""

    def answer(self, state, message, surroundings, entropy):
        step = MockClient.answer(self, state, message, surroundings, entropy)
        return MockClient.answer(self, b"", message, surroundings, entropy) if step.was_refused else step


class SamePad(MockClient):
    """Masks with one pad, whoever and whenever: uniform, and the same each time."""

    def answer(self, state, message, surroundings, entropy):
        step = MockClient.answer(self, state, message, surroundings, entropy)
        pad = np.random.default_rng(3).bytes(len(step.answer) - 50)
        return Step(step.state, step.answer[:50] + pad, step.is_over, step.was_refused)


BROKEN: list[tuple[str, type, str, type[Exception]]] = [
    ("strangers and repeats are refused", Twice, "a repeat was not refused", AssertionError),
    ("strangers and repeats are refused", Anybody, "a stranger was not refused", AssertionError),
    ("one client's garbage stops nobody", Crashes, "b''", KeyError),
    ("one client's garbage stops nobody", EndsAll, "over", RuntimeError),
    ("sums are exact whoever is lost, from any phase on", Forgets, "never gave a vector", AssertionError),
    ("sums are exact", Wraps, "are not the survivors' sum", AssertionError),
    ("too few make no sum", NeverTooFew, "made a sum", AssertionError),
    ("a client can be dropped in any phase", StillAsks, "still waited for", AssertionError),
    ("the server keeps one sum", Hoards, "vectors are kept of 5", AssertionError),
    ("randomness is what it is given", Draws, "comes from somewhere else", AssertionError),
    ("what is kept at the end has no secret", Remembers, "a secret is kept when it is over", AssertionError),
    ("what is kept at the end has no secret", Grows, "bytes are kept when it is refused", AssertionError),
    ("a client refuses what is not next", Raises, "no message", IndexError),
    ("a client refuses what is not next", Obliges, "is answered", AssertionError),
]


def broken(made: type) -> Callable[..., Protocol]:
    return Broken(server_class=made) if issubclass(made, MockServer) else Broken(client_class=made)


@pytest.mark.parametrize(("name", "made", "text", "error"), BROKEN, ids=[x[1].__name__ for x in BROKEN])
def test_a_broken_protocol_fails_the_check_that_is_meant_for_it(name, made, text, error):
    [check] = [x for x in secagg_conformance(broken(made), 5) if x.name == name]
    with pytest.raises(error, match=text):
        check()


@pytest.mark.parametrize(
    ("made", "text"), [(MockClient, "bytes are not uniform"), (SamePad, "masked vectors are alike")]
)
def test_a_protocol_that_says_it_hides_something_must_look_so(made, text):
    [check] = [x for x in secagg_conformance(Broken(client_class=made, hides="vectors"), 5) if x.name == UNIFORM]
    with pytest.raises(AssertionError, match=text):
        check()


def test_a_changed_byte_that_is_taken_spoils_the_sum_of_a_protocol_that_hides():
    [check] = [x for x in secagg_conformance(Broken(hides="vectors"), 5) if x.name == "a changed byte does no harm"]
    with pytest.raises(AssertionError, match="are not the survivors' sum"):
        check()


def test_a_protocol_that_hides_must_draw_secrets():
    name = "what is kept at the end has no secret"
    [check] = [x for x in secagg_conformance(Broken(hides="vectors"), 5) if x.name == name]
    with pytest.raises(AssertionError, match="nothing was drawn"):
        check()


def test_checks_can_be_skipped_by_name_and_a_size_must_allow_a_loss():
    assert [x.name for x in secagg_conformance(Full())] == list(CHECKS)
    assert UNIFORM not in [x.name for x in secagg_conformance(Mock())]
    assert "sums are exact" not in [x.name for x in secagg_conformance(Full(), skip=("sums are exact",))]
    with pytest.raises(ValueError, match="no such checks: \\['sums'\\]"):
        secagg_conformance(Full(), skip=("sums",))
    with pytest.raises(ValueError, match="of 3 clients none may be lost"):
        secagg_conformance(Full(), 3)


def test_a_protocol_with_a_second_server_says_that_it_wants_one():
    [check] = [x for x in secagg_conformance(TwoServer()) if x.name == "sums are exact"]
    with pytest.raises(ValueError, match=r"roster\.helper: there is none"):
        check()

    class Asks(MockServer):
        """Has a question for a second server, whatever the roster says."""

        def to_helper(self):
            return b"?"

    [check] = [x for x in secagg_conformance(broken(Asks), 5) if x.name == "sums are exact"]
    with pytest.raises(ValueError, match="second: got none"):
        check()
