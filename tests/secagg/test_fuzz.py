"""Anything at all in place of a message, in either direction, for every protocol: nobody falls over, nothing leaks.

What is asked here is not which error comes, but what must hold whatever comes: the only exception is ProtocolError, and
only of the server; a client's answer to what it can't accept is a refusal that it has signed; no client gives what
would lay a vector open; and who misbehaves costs the others nothing.
"""

import contextlib
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import ProtocolError
from fedpeft.secagg import kept
from fedpeft.secagg.dealing import Dealing
from fedpeft.secagg.encoding import digest, lp
from fedpeft.secagg.full import Full, KRegular
from fedpeft.secagg.helper import Helper, HelperKey, InMemory
from fedpeft.secagg.messages import Abort, Advert, Dealt, Envelope, Kind, Parcel, enclose
from fedpeft.secagg.params import Params
from fedpeft.secagg.policy import Policy
from fedpeft.secagg.protocol import Phase, Step
from fedpeft.secagg.roster import Roster
from fedpeft.secagg.sealing import Request
from fedpeft.secagg.states import Advertised, Agreed, Masked, Ready, Shared
from fedpeft.secagg.transcript import survivors_text
from fedpeft.secagg.twoserver import TwoServer
from fedpeft.testing.sessions import ADMIN, SHARED, Drawn, Person, Second, Session, Setting
from tests.secagg.parties import Cohort, Party, cohort, entropy

HEAD = 18  # kind, session, pass
DIMS = (5, 3)
KEY = HelperKey.of(b"\x55" * 32)


def start(roster: Roster) -> Callable[[bytes], bytes]:
    """The second server of a session."""
    one = Helper(KEY, roster, {ADMIN.id}, Policy(min_cohort=3, max_dropout=0.9, min_slice=1), InMemory())
    return lambda request: one.answer(request, 0.0).answer


SETTINGS = {
    "full": Setting(Full(), 7),
    "twoserver": Setting(TwoServer(), 7, Second(KEY.public, start)),
    "kregular": Setting(KRegular(), 50),
}


def restarted(setting: Setting, session: Session) -> Session:
    """Another session of the same people, who draw other secrets for it."""
    params = replace(session.params, session=digest("testing", b"another").hex()[:32])
    roster = next(iter(session.people.values())).side.roster  # type: ignore[attr-defined]
    people = {
        id_: Person(
            id_, x.side, replace(x.around, told=None, has_model=False, asked=[]), Drawn(10_000 + x.entropy.seed)
        )
        for id_, x in session.people.items()
    }
    second = None if setting.second is None else setting.second.start(roster)
    return Session(params, people, setting.protocol.server(params, roster), second)


@lru_cache
def rehearsed(name: str) -> tuple[tuple[Phase, ...], tuple[bytes, ...]]:
    """The phases of a session, and all that is sent by either side in another one of the same people."""
    setting = SETTINGS[name]
    session = restarted(setting, setting.begin(DIMS, 24))
    phases = session.run()
    sent = ((*(m for _, m in x.heard), *(s.answer for s in x.steps)) for x in session.people.values())
    return tuple(phases), tuple(m for each in sent for m in each)


@dataclass
class Fuzz:
    """Other messages than honest ones. pool: what others have sent, in this session and in others."""

    rng: np.random.Generator
    pool: list[bytes] = field(default_factory=list)

    def __call__(self, message: bytes) -> bytes:
        """Some other message than this one, that its reader can tell from it.

        What is sealed in shares is left out: nobody but its holder can check that, and the server passes it on. So is
        cutting off whole rows of what holders are sent: a server that sends less than there is gets no sum.
        """
        while True:
            made = self._made(message)
            if made != message:
                return made

    def _made(self, message: bytes) -> bytes:
        rng, size = self.rng, len(message)
        at = int(rng.integers(size))
        match str(rng.choice(HOW)):
            case "cut":
                return message[: at + (message[0] == Kind.ASK_VECTOR and (at - HEAD) % Parcel.size(len(DIMS)) == 0)]
            case "longer":
                return message + rng.bytes(int(rng.choice([1, 2, 16, 33, 64, 5_000])))
            case "flip":
                if message[0] == Kind.SHARES:
                    at = int(rng.choice([at % HEAD, size - 1 - at % 500]))
                return message[:at] + bytes([message[at] ^ (1 << int(rng.integers(8)))]) + message[at + 1 :]
            case "kind":
                return bytes([int(rng.integers(256))]) + message[1:]
            case "pass":
                return message[: HEAD - 1] + bytes([int(rng.integers(256))]) + message[HEAD:]
            case "session":
                return message[:1] + rng.bytes(16) + message[HEAD - 1 :]
            case "twice":
                return message + message[HEAD:] if size > HEAD else message + message
            case "backwards":
                return message[:HEAD] + b"".join(message[i : i + 32] for i in range(HEAD, size, 32))[::-1]
            case "zeros":
                return message[:HEAD] + bytes(size - HEAD)
            case "lengths":
                return message[:HEAD] + b"\xff" * 4 + message[HEAD + 4 :]
            case "noise":
                return rng.bytes(int(rng.integers(200)))
            case "empty":
                return message[: int(rng.choice([0, 1, 17, HEAD]))]
        return self.pool[int(rng.integers(len(self.pool)))] if self.pool else b""


HOW = ("cut", "longer", "flip", "kind", "pass", "session", "twice", "backwards", "zeros", "lengths", "noise", "empty")
HOW += ("other",) * 6  # of another phase, pass, client or session


@dataclass
class Deed:
    """What a bad client does: from which phase on, with how many messages, the true one among them or not."""

    at: int
    messages: int
    truth: int


def exact(session: Session, phases: Sequence[Phase], out: dict[bytes, int]) -> None:
    """Each pass's sum is that of everyone but those who were out by then. out: at which phase, by its number."""
    assert len(session.sums) == len(DIMS)
    for pass_, one in enumerate(session.sums):
        at = next(i for i, x in enumerate(phases) if (x.name, x.pass_) == ("vectors", pass_))
        assert one.survivors == tuple(i for i in sorted(session.people) if out.get(i, len(phases)) > at)
        np.testing.assert_array_equal(one.total, session.plain(one.survivors, pass_))


def bad_clients(name: str, seed: int) -> None:
    """A session in which as many clients as may be lost send anything, in any order, and the others are honest."""
    rng, setting = np.random.default_rng(seed), SETTINGS[name]
    phases, sent = rehearsed(name)
    session, fuzz = setting.begin(DIMS, 24), Fuzz(rng, list(sent))
    ids = sorted(session.people)
    bad = {
        ids[i]: Deed(int(rng.integers(len(phases))), int(rng.integers(1, 5)), int(rng.integers(-1, 3)))
        for i in rng.permutation(len(ids))[: setting.may_lose]
    }
    out: dict[bytes, int] = {}
    for index, phase in enumerate(phases):
        assert session.server.phase == phase
        asked = session.server.outbox()
        answers = {i: session.people[i].hear(phase, asked[i]).answer for i in sorted(asked)}
        fuzz.pool += answers.values()
        said = {i: [message] for i, message in answers.items()}
        for id_, deed in bad.items():
            if deed.at == index and id_ in said:
                good = said[id_][0]
                said[id_] = [fuzz(good) for _ in range(deed.messages)]
                said[id_].insert(min(max(deed.truth, 0), deed.messages), good)
                if said[id_][0] != good:
                    out[id_] = index
            elif deed.at < index:  # who is out still talks
                said[id_] = [fuzz(answers.get(id_, rng.bytes(99)))] if id_ not in asked else [answers[id_], b"more"]
        order = [i for i, messages in said.items() for _ in messages]
        rng.shuffle(order)
        for id_ in order:
            message, first = said[id_].pop(0), id_ in session.server.waiting
            session.refused.discard(id_)
            session.give(id_, message)
            assert (id_ not in session.refused) == (first and message == answers.get(id_))
        session.close(phase)
    exact(session, phases, out)
    assert set(session.server.culprits) <= set(bad)


def deaf_clients(name: str, seed: int) -> None:
    """A session in which the server's messages reach as many clients as may be lost changed, each in some phase."""
    rng, setting = np.random.default_rng(seed), SETTINGS[name]
    phases, sent = rehearsed(name)
    session, fuzz = setting.begin(DIMS, 24), Fuzz(rng, list(sent))
    ids = sorted(session.people)
    when = {ids[i]: int(rng.integers(len(phases))) for i in rng.permutation(len(ids))[: setting.may_lose]}
    out: dict[bytes, int] = {}
    for index, phase in enumerate(phases):
        asked = session.server.outbox()
        fuzz.pool += asked.values()
        for id_ in sorted(asked):
            one, message = session.people[id_], asked[id_]
            step = one.hear(phase, fuzz(message) if when.get(id_) == index else message)
            if when.get(id_) == index:
                out[id_] = index
                for _ in range(3):
                    is_well_formed(one.id, one.hear(phase, fuzz(message)))
            is_well_formed(one.id, step)
            session.refused.discard(id_)
            session.give(id_, step.answer)
            assert (id_ in session.refused) == (id_ in out)
        session.close(phase)
    exact(session, phases, out)


def is_well_formed(id_: bytes, step: Step) -> None:
    """A refusal says a signed word and nothing else; anything else is one of the clients' own kinds."""
    said = Envelope.open(step.answer)
    if step.was_refused:
        assert said.kind == Kind.ABORT
        assert Abort.read(said.body).is_of(id_, said.session)
    else:
        assert said.kind in (Kind.KEYS, Kind.SHARES, Kind.VECTOR, Kind.SURVIVORS, Kind.UNMASK)


@pytest.mark.parametrize("name", ["full", "twoserver"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_whatever_some_clients_send_the_sum_of_the_others_is_exact(name: str, seed: int) -> None:
    bad_clients(name, seed)


@pytest.mark.parametrize("name", ["full", "twoserver"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_whatever_some_clients_hear_they_refuse_and_the_sum_of_the_others_is_exact(name: str, seed: int) -> None:
    deaf_clients(name, seed)


@pytest.mark.parametrize("side", [bad_clients, deaf_clients])
def test_a_ring_of_fifty_is_as_hard_to_disturb(side: Callable[[str, int], None]) -> None:
    side("kregular", 5)


@pytest.mark.parametrize("holders", [1, 2, 6])
def test_who_deals_shares_that_do_not_open_costs_their_holders_at_most_and_is_named_by_two(holders: int) -> None:
    """What is sealed for another, the server can't check: each holder that finds it spoilt is out, and accuses."""
    session = SETTINGS["full"].begin(DIMS, 24)
    session.may_refuse = True
    session.phase()
    bad = sorted(session.people)[3]
    size = Dealt.sealed_size(len(DIMS))

    def spoil(id_: bytes, message: bytes) -> bytes:
        spoilt = bytearray(message)
        for i in range(holders):
            spoilt[HEAD + i * size + 7 * i] ^= 1
        return bytes(spoilt) if id_ == bad else message

    session.phase(spoil)
    assert not session.refused
    if holders <= SETTINGS["full"].may_lose:
        session.run()
        assert len(session.sums) == len(DIMS)
        for pass_, one in enumerate(session.sums):
            assert one.survivors == tuple(sorted(session.people.keys() - session.gone))
            np.testing.assert_array_equal(one.total, session.plain(one.survivors, pass_))
    else:
        with pytest.raises(ProtocolError, match="want at least 5"):
            session.run()
        assert session.server.total is None
    assert len(session.gone) == holders
    assert set(session.server.culprits) == ({bad} if holders > 1 else set())


N, PASSES = 6, 2
LOOSE = Policy(min_cohort=3, min_threshold=0.3, max_dropout=0.6, min_slice=1, min_degree=1)


@dataclass
class Conspiracy:
    """The server and all clients but one, who knows everything of theirs and tries what it likes with that one.

    It forges whatever a malicious server could: other keys and shares of the others, other survivors with everyone
    else's true signatures on them, other broadcasts, old messages again, and several sessions at once.
    """

    rng: np.random.Generator
    consistency: bool
    cohorts: dict[bytes, Cohort] = field(init=False)
    victim: Party = field(init=False)
    seen: set[str] = field(default_factory=set)
    adverts: dict[bytes, dict[bytes, Advert]] = field(default_factory=dict)
    dealings: dict[bytes, Dealing] = field(default_factory=dict)
    sent: list[bytes] = field(default_factory=list)
    log: list[Step] = field(default_factory=list)
    pairs: dict[tuple[bytes, int, bytes], tuple[bytes, bytes]] = field(default_factory=dict)
    settled: dict[tuple[bytes, int], frozenset[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        made = [self._cohort(session, round) for session, round in ((1, 3), (2, 4), (3, 4), (4, 5))]
        self.cohorts = {bytes.fromhex(x.params.session): x for x in made}
        self.victim = made[0][int(self.rng.integers(N))]
        # What a client's history says is what its journal writes down before an answer leaves.
        side = self.victim.side
        self.victim.side = replace(side, history=replace(side.history, sessions=self.seen))  # type: ignore[type-var]

    def _cohort(self, session: int, round: int) -> Cohort:
        policy, name = replace(LOOSE, consistency=self.consistency), bytes([session] * 16).hex()
        made = cohort(N, (3, 4), consistency=self.consistency, t=3, policy=policy, session=name, fl_round=round)
        for id_, party in made.parties.items():
            party.entropy = entropy(f"{name}/{id_.hex()}")
        return made

    def some(self, ids: Collection[bytes], odds: float = 0.85) -> list[bytes]:
        return [x for x in sorted(ids) if self.rng.random() < odds or x == self.victim.id]

    def next(self) -> bytes:
        """What the victim waits for, with whatever sets the server likes to tell."""
        before = kept.load(self.victim.state) if self.victim.state else None
        match before:
            case Advertised(params=params):
                return self._keys(bytes.fromhex(params.session))
            case Shared(params=params):
                session = bytes.fromhex(params.session)
                dealing = self.dealings[session]
                rows = [dealing.parcels(self.victim.id, {u}) for u in self.some(dealing.around[self.victim.id])]
                return enclose(Kind.ASK_VECTOR, session, 0, *rows)
            case Ready(now=now):
                return enclose(Kind.ASK_VECTOR, bytes.fromhex(now.params.session), now.pass_)
            case Masked(now=now):
                kind = Kind.ASK_SURVIVORS if self.consistency else Kind.ASK_UNMASK
                return enclose(kind, bytes.fromhex(now.params.session), now.pass_, *self.some(now.members, 0.7))
            case Agreed(now=now, survivors=survivors):
                return enclose(
                    Kind.ASK_UNMASK, bytes.fromhex(now.params.session), now.pass_, self._signed(before, survivors)
                )
        return self.begin()

    def begin(self) -> bytes:
        session = sorted(self.cohorts)[int(self.rng.integers(len(self.cohorts)))]
        return enclose(Kind.ASK_KEYS, session, 0, self.cohorts[session].params.to_json())

    def _signed(self, agreed: Agreed, survivors: Sequence[bytes]) -> bytes:
        """True signatures of the others, on this set or, now and then, on another."""
        now = agreed.now
        if self.rng.random() < 0.15:
            survivors = self.some(now.members, 0.7)
        text = survivors_text(now.th1, now.pass_, agreed.shared, survivors)
        others = self.cohorts[bytes.fromhex(now.params.session)].parties
        return b"".join(x + others[x].identity.sign(text) for x in self.some(survivors) if x != self.victim.id)

    def _keys(self, session: bytes) -> bytes:
        """The others' keys, and what they deal once these are fixed."""
        found = self.cohorts[session]
        chosen = [self.adverts[session][x] for x in self.some(found.parties)]
        message = enclose(Kind.ASK_SHARES, session, 0, *(x.to_bytes() for x in chosen))
        self.dealings[session] = Dealing.of(found.params, chosen)
        for one in chosen:
            if one.id != self.victim.id:
                party = found.parties[one.id]
                step = party.side.answer(party.state, message, party.inputs, party.entropy)  # type: ignore[attr-defined]
                if not step.was_refused:
                    body = Envelope.open(step.answer).body
                    self.dealings[session].dealt[one.id] = Dealt.read(body, len(chosen) - 1, PASSES)
        return message

    def tell(self, message: bytes, shared: bytes | None) -> None:
        """The victim's answer to this, and all that the others and the journal make of it."""
        envelope = None
        if len(message) >= HEAD and message[0] == Kind.ASK_KEYS:
            envelope = Envelope.open(message)
        inputs = self.victim.inputs
        inputs.broadcast = shared
        self.sent.append(message)
        step = self.victim.answer(message, 1 if len(message) >= HEAD and message[HEAD - 1] else 0)
        self.log.append(step)
        if envelope is not None:
            with contextlib.suppress(ProtocolError):
                self.seen.add(Params.from_json(bytes(envelope.body)).session)
        if not step.was_refused and Envelope.open(step.answer).kind == Kind.KEYS:
            self._advertised(step)
        self._note(kept.load(step.state))

    def _advertised(self, step: Step) -> None:
        said = Envelope.open(step.answer)
        if said.session not in self.cohorts:
            return
        own = Advert.read(said.body, PASSES)
        self.adverts[said.session] = {own.id: own}
        asked = enclose(Kind.ASK_KEYS, said.session, 0, self.cohorts[said.session].params.to_json())
        for id_, party in self.cohorts[said.session].parties.items():
            if id_ != own.id:
                party.state = b""
                self.adverts[said.session][id_] = Advert.read(Envelope.open(party.answer(asked).answer).body, PASSES)

    def _note(self, state: kept.State) -> None:
        if isinstance(state, Ready | Masked | Agreed):
            now = state.now
            session = bytes.fromhex(now.params.session)
            for owner, each in now.held.items():
                for later, both in enumerate(each):
                    self.pairs[session, now.pass_ + later, owner] = both

    def attack(self, steps: int) -> None:
        fuzz = Fuzz(self.rng, self.sent)
        for _ in range(steps):
            what = self.rng.random()
            message = self.next()
            if what < 0.02:
                message = fuzz(message)
            elif what < 0.05 and self.sent:
                message = self.sent[int(self.rng.integers(len(self.sent)))]
            elif what < 0.06:
                message = self.begin()
            told = [SHARED, None, digest("told", b"other")][int(self.rng.choice(3, p=[0.9, 0.02, 0.08]))]
            for _ in range(2 if what > 0.98 else 1):  # at once once more
                self.tell(message, told)


def check_secrecy(found: Conspiracy) -> Counter[str]:
    """What must hold of all that one client has said, whatever it was told: how often it said something, and how many
    shares of seeds (b) and of mask keys (s) it gave."""
    said: Counter[tuple[bytes, int, Kind]] = Counter()
    refused: set[bytes] = set()
    for step in found.log:
        is_well_formed(found.victim.id, step)
        answer = Envelope.open(step.answer)
        if step.was_refused:
            if step.is_over:
                refused.add(answer.session)
            continue
        assert answer.session not in refused  # once refused, it says nothing more of that session
        said[answer.session, answer.pass_, answer.kind] += 1
    assert set(said.values()) <= {1}  # one vector, one word on who survived, one set of shares
    answers = b"".join(x.answer for x in found.log)
    given = {key: [share in answers for share in both] for key, both in found.pairs.items()}
    assert not any(b and s for b, s in given.values())  # never both kinds of one owner's in a pass
    shown = {(session, pass_) for (session, pass_, _), both in given.items() if any(both)}
    assert shown == {(session, pass_) for session, pass_, kind in said if kind == Kind.UNMASK}
    reached = Counter(kind.name for _, _, kind in said)
    reached["b"], reached["s"] = (sum(both[i] for both in given.values()) for i in (0, 1))
    return reached


@pytest.mark.parametrize("consistency", [True, False])
def test_no_conspiracy_of_all_others_gets_both_shares_of_an_owner_or_two_answers_of_a_kind(consistency: bool) -> None:
    reached: Counter[str] = Counter()
    for seed in range(30):
        found = Conspiracy(np.random.default_rng([seed, consistency]), consistency)
        found.attack(36)
        try:
            reached += check_secrecy(found)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert reached["UNMASK"] > 20  # or else nothing was tried
    assert min(reached["b"], reached["s"]) > 10


def test_a_client_of_two_servers_gives_one_vector_a_pass_whatever_it_is_told() -> None:
    name = "twoserver"
    _, sent = rehearsed(name)
    reached = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        both = [SETTINGS[name].begin(DIMS, 24)]
        both.append(restarted(SETTINGS[name], both[0]))
        one, seen = next(iter(both[0].people.values())), set[str]()
        one.side = replace(one.side, history=replace(one.side.history, sessions=seen))  # type: ignore[attr-defined,type-var]
        fuzz, heard = Fuzz(rng, list(sent)), []
        for _ in range(12):
            session = both[int(rng.integers(2)) if rng.random() < 0.2 else 0]
            pass_ = int(rng.random() < 0.6)
            message = enclose(Kind.ASK_VECTOR, bytes.fromhex(session.params.session), pass_, session.params.to_json())
            if rng.random() < 0.15:
                message = fuzz(message)
            step = one.hear(Phase("vectors", pass_, "pass" if pass_ else "model"), message)
            is_well_formed(one.id, step)
            heard.append(step)
            with contextlib.suppress(ProtocolError):
                seen.add(Params.from_json(bytes(Envelope.open(message).body)).session)
        given, refused = Counter[tuple[bytes, int]](), set[bytes]()
        for step in heard:
            answer = Envelope.open(step.answer)
            if step.was_refused and step.is_over:
                refused.add(answer.session)
            elif not step.was_refused:
                assert answer.session not in refused, f"seed {seed}"
                given[answer.session, answer.pass_] += 1
        assert set(given.values()) <= {1}, f"seed {seed}"
        reached += any(pass_ for _, pass_ in given)
        drawn = one.entropy.given
        assert len(set(drawn)) == len(drawn) == 2 * given.total()  # a fresh seed and a fresh key for each
    assert reached > 15


MILLION = 1_000_000
PARSED = 32  # bytes that Python's JSON takes of one of "[{},{},…": an empty object takes 64 and its place 8, of 3 bytes
MOST = 64 << 20  # bytes, of as many values as are parsed at all
LITTLE = 1 << 19  # bytes: what parameters of 7 clients and an error take, and far less than a list of a million


def taken(act: Callable[[], object]) -> int:
    """The most memory that this took at a time."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def enormous(message: bytes, row: int) -> memoryview:
    """The head of a message with a million rows; the system gives zeros no memory until they are looked at."""
    made = np.zeros(HEAD + MILLION * row, np.uint8)
    made[:HEAD] = np.frombuffer(message[:HEAD], np.uint8)
    return memoryview(made)


@pytest.mark.parametrize("name", ["full", "twoserver"])
def test_a_million_rows_are_refused_by_their_size_before_they_take_memory(name: str) -> None:
    session = SETTINGS[name].begin(DIMS, 24)
    while not session.server.is_over:
        phase, asked = session.server.phase, session.server.outbox()
        for i, row in enumerate((1, 33, 96)):
            id_ = sorted(asked)[i]
            one, state = session.people[id_], session.people[id_].state
            got: list[Step] = []
            big = enormous(asked[id_], row)
            has_json = asked[id_][HEAD : HEAD + 1] == b"{"  # which is copied whole, since its reader takes nothing else
            assert taken(lambda: got.append(one.hear(phase, big))) < LITTLE + has_json * big.nbytes  # type: ignore[arg-type]  # noqa: B023
            assert got[0].was_refused
            one.state = state
        answers = {i: session.people[i].hear(phase, asked[i]).answer for i in sorted(asked)}
        first = session.server.waiting == frozenset(session.people)
        for row, id_ in zip((1, 33) if first else (), sorted(asked), strict=False):
            big = enormous(answers.pop(id_), row)
            assert taken(lambda: session.give(id_, big)) < LITTLE  # type: ignore[arg-type]  # noqa: B023
            assert id_ in session.refused
        for id_, message in answers.items():
            session.give(id_, message)
        session.close(phase)
    assert len(session.refused) == 2
    assert len(session.sums) == len(DIMS)


def stretched(params: Params, key: str, value: object) -> bytes:
    return json.dumps(json.loads(params.to_json()) | {key: value}, sort_keys=True, separators=(",", ":")).encode()


LISTS: dict[str, object] = {
    "dims": [1] * MILLION,
    "cohort": ["00"] * MILLION,
    "ranks": [[]] * MILLION,
    "models": {str(i): "" for i in range(MILLION // 4)},
    "deadlines": [{}] * (MILLION // 4),
}
GIANT: dict[str, object] = {
    "n": 2**32 - 1,
    "k": 10**2000,
    "m": 2**31,
    "bits": 2**32 - 1,
    "t": 2**32 - 1,
    "dims": [2**31 - 1],
}


@pytest.mark.parametrize("name", ["full", "twoserver"])
@pytest.mark.parametrize("key", GIANT)
def test_a_giant_number_in_the_parameters_is_refused_and_nothing_is_made_room_for(name: str, key: str) -> None:
    session = SETTINGS[name].begin(DIMS, 24)
    phase = session.server.phase
    one, message = next(iter(session.people.values())), next(iter(session.server.outbox().values()))
    big = message[:HEAD] + stretched(session.params, key, GIANT[key])
    got: list[Step] = []
    assert taken(lambda: got.append(one.hear(phase, big))) < LITTLE
    assert got[0].was_refused
    assert one.around.asked == []


@pytest.mark.parametrize("key", LISTS)
def test_a_million_entries_in_the_parameters_are_refused_and_cost_no_more_than_to_parse_them(key: str) -> None:
    session = SETTINGS["full"].begin(DIMS, 24)
    phase, one = session.server.phase, next(iter(session.people.values()))
    big = next(iter(session.server.outbox().values()))[:HEAD] + stretched(session.params, key, LISTS[key])
    got: list[Step] = []
    most = taken(lambda: got.append(one.hear(phase, big)))
    assert got[0].was_refused
    assert most < min(PARSED * len(big), MOST)
    nested = big[:HEAD] + b"[" * MILLION
    assert taken(lambda: got.append(one.hear(phase, nested))) < 3 * MILLION
    assert got[1].was_refused


def test_a_length_of_four_gigabytes_is_refused_by_the_helper_and_by_who_asked_it() -> None:
    session = SETTINGS["twoserver"].begin(DIMS, 24)
    asked = session.server.outbox()
    for id_ in sorted(asked):
        session.give(id_, session.people[id_].hear(session.server.phase, asked[id_]).answer)
    session.server.close()
    request = session.server.to_helper()
    assert request is not None
    roster = next(iter(session.people.values())).side.roster  # type: ignore[attr-defined]
    helper = Helper(KEY, roster, {ADMIN.id}, Policy(), InMemory())
    at, places = 0, []
    while at < len(request):
        places.append(at)
        at += 4 + int.from_bytes(request[at : at + 4], "big")
    for place in places:
        bad = request[:place] + b"\xff" * 4 + request[place + 4 :]
        assert taken(lambda: helper.answer(bad, 0.0)) < LITTLE  # noqa: B023
        with pytest.raises(ProtocolError):
            Request.read(bad)
    long = lp(*[b""] * MILLION)
    assert taken(lambda: helper.answer(long, 0.0)) < 4 * len(long)  # copied to be hashed, for the refusal names it
    for bad in (b"\xff" * 4, b"\xff" * 400, long, bytes(4 * MILLION), b"", lp(b"2s/sum", b""), request):
        assert helper.answer(bad, 0.0).refusal is not None or bad == request
    answer = helper.answer(request, 0.0)
    assert answer.refusal is not None  # it has answered this pass
    other = SETTINGS["twoserver"].begin(DIMS, 24).server
    with pytest.raises(RuntimeError, match="nothing was asked"):
        other.from_helper(b"\xff" * 400)
    with pytest.raises(ProtocolError):
        session.server.from_helper(b"\xff" * 4)
    assert session.server.total is None
