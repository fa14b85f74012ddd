"""A whole secure round, over a protocol that hides nothing: what is left is the ring and the round."""

from dataclasses import dataclass, field

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Layout, Spec, Tensors, Update
from fedpeft.channel import RingChannel
from fedpeft.rounds import SecureRound, contribute_ring, grids
from fedpeft.rules import Broadcast, MeanRule, ServerState, Task
from fedpeft.secagg.mock import MockClient, MockServer
from fedpeft.secagg.protocol import Vectors
from tests.laws.cohorts import metrics

LARGEST = 51.0  # 65535 is 51 · 1285: a whole weight up to 51 travels as it is


@dataclass(frozen=True)
class Given(Vectors):
    """One vector, whatever pass is asked for."""

    given: np.ndarray

    def model_hash(self):
        return bytes(32)

    def vector(self, pass_):
        return self.given


@dataclass(frozen=True)
class Heard(MeanRule):
    """A rule that notes the means which it is given, pass by pass."""

    rule: MeanRule
    means: list = field(default_factory=list)

    @property
    @override
    def passes(self) -> int:
        return self.rule.passes

    @override
    def layout(self, task: Task) -> Layout:
        return self.rule.layout(task)

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        return self.rule.encode(update, task)

    @override
    def personal(self, spec: Spec) -> frozenset[str]:
        return self.rule.personal(spec)

    @override
    def send(self, state: ServerState, rank: int) -> Broadcast:
        return self.rule.send(state, rank)

    @override
    def between(self, mean: Tensors, state: ServerState) -> Tensors:
        self.means.append(mean)
        return self.rule.between(mean, state)

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        self.means.append(mean)
        return self.rule.decode(mean, state)


def id_of(client):
    return bytes([client]) * 32


def machine(rule, state, ranks, channel, exactness=False, quorum=1, halvings=(), **options):
    grid = grids(rule, channel, state.task, len(ranks), LARGEST, exactness, halvings)
    ids = {client: id_of(client) for client in ranks}
    session = MockServer(bytes(16), tuple(sorted(ids.values())), 1, channel.modulus, tuple(x.length for x in grid))
    return SecureRound(state, ranks, ids, quorum, grid, session, rule=rule, exactness=exactness, **options)


def message(m, client, asked, update, weight, kept=b"", rng=None):
    """What a client answers to its letter of the outbox, and what it keeps."""
    text, sent = asked
    rng = rng or np.random.default_rng([client, sent.task.pass_])
    grid = m.grid[sent.task.pass_]
    vector = contribute_ring(m.rule, grid, update, weight, metrics(client), sent.task, m.exactness, rng)
    step = MockClient(id_of(client)).answer(kept, text, Given(vector), bytes)
    return step.answer, step.state


def drive(m, clients, lost=None, each=lambda pass_, tasks: None):
    """The outcome. lost: the pass in which a client vanishes; each: told the tasks of those who answer a pass."""
    lost, kept = lost or {}, dict.fromkeys(clients, b"")
    while not m.is_over:
        pass_ = m.phase.pass_
        asked = {c: x for c, x in m.outbox().items() if lost.get(c, 99) > pass_}
        each(pass_, {c: sent.task for c, (_, sent) in asked.items()})
        for client, letter in asked.items():
            update, weight = clients[client]
            answer, kept[client] = message(m, client, letter, update, weight, kept[client])
            m.receive(client, answer)
        m.close()
    return m.result()


def wide(rule, state, clients, ranks, modulus=32, bits=None):
    """A channel whose range no client leaves: a power of two, so that a step is one too."""
    most = 1.0
    shared = state
    for pass_ in range(rule.passes):
        each = [rule.encode(u, rule.send(shared, ranks[c]).task) for c, (u, _) in clients.items()]
        most = max(most, *(float(np.abs(x).max()) for tensors in each for x in tensors.values()))
        if pass_ + 1 < rule.passes:
            mean = {n: np.mean([x[n] for x in each], axis=0) for n in each[0]}
            task = Task(state.task.spec, state.task.round, pass_ + 1, rule.between(mean, shared))
            shared = ServerState(task, shared.adapter, shared.tail, shared.memory)
    return RingChannel(range=2.0 ** np.ceil(np.log2(4 * most)), modulus=modulus, bits=bits)
