"""A session whose answers, sums and failures a test has chosen, and rounds over it."""

from fedpeft.channel import RingChannel
from fedpeft.errors import ProtocolError
from fedpeft.rounds import SecureRound
from fedpeft.secagg.protocol import Phase, Refused, ServerSide
from tests.laws.cohorts import FEDIT, TwoPasses, cohort, start
from tests.laws.secure import Heard, drive, id_of
from tests.laws.secure import machine as over_mock

STATE = start(round=4)
RANKS = {10: 3, 11: 1, 12: 2, 13: 3, 14: 3}
CLIENTS = cohort(FEDIT, STATE, ranks=RANKS.values())
TWO = TwoPasses()
PAIR = cohort(TWO, STATE, ranks=RANKS.values())
CHANNEL = RingChannel(range=64.0)


class Scripted(ServerSide):
    """A session of two phases a pass, whose answers are b"good" or one that is refused; a helper has the sums."""

    def __init__(self, ids, sums, helper=False, carries="model"):
        self.everyone, self.sums, self.helper, self.carried = tuple(sorted(ids)), list(sums), helper, carries
        self.heard, self.dropped, self.told, self.closed = [], [], [], 0
        self.blamed, self.open, self.over = {}, set(ids), False
        self.question, self.sum = None, None

    phase = property(lambda self: Phase(("keys", "vectors")[self.closed % 2], self.closed // 2, self._carries()))
    is_over = property(lambda self: self.over)
    waiting = property(lambda self: frozenset(self.open))
    survivors = property(lambda self: tuple(x for x in self.everyone if x not in self.dropped))
    total = property(lambda self: self.sum)
    culprits = property(lambda self: self.blamed)

    def _carries(self):
        return "nothing" if self.closed % 2 == 0 else self.carried if self.closed < 2 else "pass"

    def outbox(self):
        return {x: b"to " + x for x in self.open}

    def receive(self, id_, text):
        self.heard.append((id_, text))
        if text != b"good":
            self.drop(id_)
            raise Refused("bad", f"{text!r} is not good", id_)
        self.open.discard(id_)

    def drop(self, id_):
        self.open.discard(id_)
        self.dropped.append(id_)

    def close(self):
        self.dropped += self.open
        if len(self.survivors) < 2:
            self.over = True
            raise ProtocolError("fewer than 2 are left")
        if self.closed % 2 and self.helper and self.question is None:
            self.question = b"please"
            return
        self._next()

    def _next(self):
        self.open = set(self.survivors)
        if self.closed % 2:
            self.sum = self.sums.pop(0)
            self.over = not self.sums
        self.closed += 1

    def begin(self, shared):
        self.told.append((self.phase, shared))

    def to_helper(self):
        return self.question

    def from_helper(self, text):
        if text != b"thanks":
            raise ProtocolError("the helper said nothing of use")
        self.question = None
        self._next()


def totals(rule, clients, channel=CHANNEL):
    """The grids and the sum of each pass of a round in which everybody answers."""
    m = over_mock(Heard(rule), STATE, RANKS, channel)
    sums = []
    taken = type(m.session).total

    class Spy(type(m.session)):
        @property
        def total(self):
            sums.append(taken.fget(self))
            return sums[-1]

    m.session.__class__ = Spy
    drive(m, clients)
    return m.grid, sums


def scripted(rule=FEDIT, clients=CLIENTS, quorum=1, ids=None, sums=None, **options):
    grid, found = totals(rule, clients)
    ids = ids or {c: id_of(c) for c in RANKS}
    session = Scripted(ids.values(), found if sums is None else sums, **options)
    return SecureRound(STATE, RANKS, ids, quorum, grid, session, rule=rule)


def all_good(m, *clients):
    for client in clients or sorted(m.waiting):
        m.receive(client, b"good")
