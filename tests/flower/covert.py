"""Clients with identities and their coordinator, over an in-process grid: secure rounds of the tiny linear model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256

from flwr.app import Message

from fedpeft.channel import RingChannel
from fedpeft.flower import Fleet, Journal, Participant, Secure, Terms, Traffic, drive_secure, in_process, muster
from fedpeft.flower.sealed import unpack_reply
from fedpeft.rounds import Outcome, SecureRound
from fedpeft.rules import Examples, FactorMean, MeanRule, ServerState
from fedpeft.secagg import Identity, Member, Mock, Params, Policy, Roster
from fedpeft.secagg.full import Full
from fedpeft.secagg.helper import HelperKey
from fedpeft.secagg.messages import Envelope, Kind
from fedpeft.secagg.protocol import Protocol
from tests.flower.grids import Clock, FaultyGrid, first_state
from tests.flower.linear import RANK, LinearTrainer, participant

LARGEST = 16  # examples that count at most
RUN = "toy"
DEADLINE, PATIENCE = 30.0, 7.0


def identity(client: int) -> Identity:
    return Identity.of(sha256(b"identity of %d" % client).digest())


HELPER, ADMIN = HelperKey.of(bytes(31) + b"h"), Identity.of(bytes(31) + b"a")


class Entropy:
    """Bytes that look random and are the same in every test."""

    def __init__(self, seed: int) -> None:
        self.count, self.seed = 0, seed

    def __call__(self, size: int) -> bytes:
        self.count += 1
        return b"".join(sha256(b"%d/%d/%d" % (self.seed, self.count, i)).digest() for i in range(size // 32 + 1))[:size]


@dataclass
class Stage:
    """A run of ``clients`` under secure aggregation. sessions: the parameters of each that was opened."""

    clients: int
    protocol: Protocol = field(default_factory=Full)
    suite: str = "full"
    rule: MeanRule = field(default_factory=FactorMean)
    trainer: LinearTrainer = field(default_factory=LinearTrainer)
    policy: Policy = field(default_factory=Policy)
    channel: RingChannel = field(default_factory=RingChannel)
    ranks: Mapping[int, int] | None = None
    sessions: dict[str, Params] = field(default_factory=dict)
    fleet: Fleet = field(init=False)
    grid: FaultyGrid = field(init=False)
    clock: Clock = field(default_factory=Clock)
    here: Participant = field(init=False)
    entropy: Entropy = field(default_factory=lambda: Entropy(1))
    journal: Journal = field(default_factory=Journal)

    def __post_init__(self) -> None:
        self.ids = {c: identity(c).id for c in range(self.clients)}
        self.roster = Roster(tuple(Member(x) for x in sorted(self.ids.values())), HELPER.public).signed(ADMIN)
        self.here = replace(participant(self.trainer, self.rule), weighting=Examples(LARGEST), secure=self.secure())
        like = in_process(lambda settings, config: self.here, self.clients)
        self.grid = FaultyGrid(like._handler, list(like._nodes.values()))
        self.fleet = muster(
            self.grid, self.rule, "{}", self.clients, 10.0, True, self.clock, self.clock.sleep, identified=True
        )

    def secure(self) -> Secure:
        made = Secure(
            RUN,
            self.suite,
            self.protocol,
            self.channel,
            identity,
            lambda: self.roster,
            self.policy,
            self.journal,
            lambda client, round: self.rank(client),
            entropy=self.entropy,
        )
        return replace(made, params=self.told) if isinstance(self.protocol, Mock) else made

    def told(self, message: bytes) -> Params | None:
        """Mock's messages do not say what a session is about."""
        return next((x for x in self.sessions.values() if bytes.fromhex(x.session) in message), None)

    def rank(self, client: int) -> int:
        return RANK if self.ranks is None else self.ranks[client]

    def round(
        self,
        cohort: Iterable[int] | None = None,
        state: ServerState | None = None,
        attempt: int = 0,
        quorum: int = 1,
        halvings: tuple[tuple[int, ...], ...] = (),
    ) -> SecureRound:
        state = first_state() if state is None else state
        ranks = {c: self.rank(c) for c in (range(self.clients) if cohort is None else cohort)}
        ids = {c: self.ids[c] for c in ranks}
        terms = Terms(RUN, self.suite, self.rule, self.channel, LARGEST, self.fleet.base, settings="{}")
        params, grid = terms.proposal(self.protocol, state, ranks, ids, self.entropy(16), attempt, halvings=halvings)
        self.sessions[params.session] = params
        session = self.protocol.server(params, self.roster)
        return SecureRound(state, ranks, ids, quorum, grid, session, rule=self.rule)

    def run(self, round: SecureRound | None = None, **options: object) -> tuple[Outcome, Traffic]:
        round = self.round(**options) if round is None else round  # type: ignore[arg-type]
        traffic = drive_secure(self.fleet, round, DEADLINE, PATIENCE)
        return round.result(), traffic


def kind_of(reply: Message) -> Kind | None:
    """What an answer of ``full`` is; None for what is no message of the protocol."""
    try:
        return Envelope.open(unpack_reply(reply.content)).kind
    except Exception:
        return None


def when(clients: Iterable[int], kind: Kind, change: Callable[[Message], list[Message]]) -> object:
    """What happens to the answers of this kind that these clients give."""
    some = frozenset(clients)
    return lambda client, reply: change(reply) if client in some and kind_of(reply) == kind else [reply]
