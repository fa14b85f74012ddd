"""What a coordinator that lies could try beside the protocol's own messages: models, settings, ranks, runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from flwr.app import Message, RecordDict

from fedpeft.errors import ProtocolError
from fedpeft.flower import Vault, drive_secure, serve
from fedpeft.flower.inprocess import NodeConfig
from fedpeft.flower.requests import pack_request, unpack_request
from fedpeft.flower.sealed import Sealed, pack_sealed, unpack_reply, unpack_sealed
from fedpeft.rounds import SecureRound
from fedpeft.rules import Broadcast, LoRAA2, Rule
from fedpeft.secagg import Policy
from fedpeft.secagg.messages import Envelope, Kind, enclose
from tests.flower.covert import DEADLINE, PATIENCE, Stage, kind_of
from tests.flower.grids import first_state
from tests.flower.linear import RANK
from tests.flower.test_drive_rounds import TwoPasses

N, VICTIM = 6, 2
Lie = Callable[[int, Kind, Sealed], Sealed]


def told(stage: Stage, lie: Lie) -> None:
    """From now on clients are sent what ``lie`` makes of what they are sent in secure sessions."""
    likely = stage.grid._handler

    def handle(messages: Sequence[Message], nodes: Mapping[int, NodeConfig]) -> Iterator[Message]:
        for message in messages:
            if message.metadata.message_type.endswith(".secure"):
                sealed = unpack_sealed(message.content)
                kind = Envelope.open(sealed.message).kind
                message.content = pack_sealed(lie(message.metadata.dst_node_id - 1, kind, sealed))
        yield from likely(messages, nodes)

    stage.grid._handler = handle


def driven(stage: Stage, round: SecureRound | None = None) -> dict[int, str]:
    """Who refused, and the last word of why."""
    round = stage.round() if round is None else round
    drive_secure(stage.fleet, round, DEADLINE, PATIENCE)
    return {client: why.rpartition(": ")[2] for client, why in round.refused}


def another_model(stage: Stage) -> RecordDict:
    state = first_state()
    moved = replace(state, adapter=state.adapter.put({"bias": np.full(5, 1e-6, np.float32)}))
    return pack_request("train", stage.rule.send(moved, RANK), "{}", stage.fleet.base)


def test_nobody_trains_on_a_model_that_comes_with_the_question_for_a_vector() -> None:
    """All but one could else be made to add what they learnt of a model that teaches nothing."""
    stage = Stage(N)
    lie = another_model(stage)
    told(stage, lambda c, kind, x: replace(x, request=lie) if kind == Kind.ASK_VECTOR and c != VICTIM else x)
    refused = driven(stage)
    assert stage.trainer.seen == list(range(N))
    assert {c: refused[c] for c in range(N) if c != VICTIM} == dict.fromkeys({*range(N)} - {VICTIM}, "malformed")


def test_what_was_trained_for_a_session_that_was_left_is_not_added_in_another_ones_name() -> None:
    """A model that says it is of another round is trained on and put away; what an earlier session made of this round
    would still be there."""
    stage, vault, state = Stage(N), Vault(), first_state()
    moved = replace(state, adapter=state.adapter.put({"bias": np.full(5, 1e-6, np.float32)}))
    left = stage.round(state=moved)
    for _ in ("keys", "shares"):
        asked(stage, left, vault, "left")
    round = stage.round(state=replace(state, task=replace(state.task, round=1)))
    params = stage.sessions[list(stage.sessions)[-1]]
    round.session = stage.protocol.server(replace(params, fl_round=0), stage.roster)
    answers = [asked(stage, round, vault, "next") for _ in range(3)]
    assert answers == [[Kind.KEYS] * N, [Kind.SHARES] * N, [Kind.ABORT] * N]


def test_settings_are_the_same_for_all_clients_and_all_messages_of_a_session() -> None:
    """They say how long a client trains and on what grid its numbers go: told others, one would stand out."""
    stage = Stage(N)
    for at in (Kind.ASK_KEYS, Kind.ASK_SHARES, Kind.ASK_VECTOR, Kind.ASK_SURVIVORS, Kind.ASK_UNMASK):
        stage = Stage(N)
        told(stage, lambda c, kind, x, at=at: replace(x, settings="{ }") if kind == at and c == VICTIM else x)
        assert set(driven(stage)) == {VICTIM}, at
        assert stage.trainer.seen == [c for c in range(N) if c != VICTIM or at not in (Kind.ASK_KEYS, Kind.ASK_SHARES)]


def test_a_pass_after_the_first_is_encoded_by_the_shape_that_the_session_began_with() -> None:
    stage = Stage(N, rule=TwoPasses())

    def lie(client: int, kind: Kind, sealed: Sealed) -> Sealed:
        if sealed.request is None or client == VICTIM:
            return sealed
        request = unpack_request(sealed.request, stage.here.store.constants)
        task = request.broadcast.task
        if not task.pass_:
            return sealed
        layer = replace(task.spec.layers[0], scale=2e6)
        other = replace(request.broadcast, task=replace(task, spec=replace(task.spec, layers=(layer,))))
        return replace(sealed, request=pack_request("train", other, request.settings, request.base))

    told(stage, lie)
    refused = driven(stage)
    assert {c: refused.get(c) for c in range(N) if c != VICTIM} == dict.fromkeys({*range(N)} - {VICTIM}, "malformed")


def test_a_client_is_sent_no_more_and_no_fewer_directions_than_all_are_told() -> None:
    """One that is said to have the lowest rank believes that all add to what it adds to."""
    stage = Stage(N, ranks={c: 1 if c == VICTIM else 2 for c in range(N)})
    honest, stage.rule = stage.rule, _Swapped(stage.rule)
    stage.here = replace(stage.here, rule=honest)
    refused = driven(stage, stage.round())
    assert set(refused) == set(range(N))


class _Swapped:
    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __getattr__(self, name: str) -> object:
        return getattr(self.rule, name)

    def send(self, state: object, rank: int) -> Broadcast:
        return self.rule.send(state, {1: RANK, 2: 1}[rank])  # type: ignore[arg-type]


def test_two_sessions_of_one_round_are_not_both_opened_whatever_the_transport_calls_its_runs() -> None:
    """A node keeps the state of each of Flower's runs by itself: the same round may go on in two of them."""
    stage = Stage(N)
    vaults = {"a": Vault(), "b": Vault()}
    rounds = {"a": stage.round(), "b": stage.round(range(N - 1))}
    answers: dict[str, list[Kind | None]] = {"a": [], "b": []}
    for _ in range(5):
        for name, round in rounds.items():
            answers[name] += asked(stage, round, vaults[name], name)
    assert answers["a"].count(Kind.UNMASK) == N
    assert answers["b"].count(Kind.UNMASK) == 0


def test_rounds_that_go_on_beside_one_another_are_no_more_than_a_policy_has() -> None:
    stage, state = Stage(N, policy=Policy(max_rounds=1)), first_state()
    rounds = [stage.round(state=replace(state, task=replace(state.task, round=i))) for i in range(2)]
    vaults = (Vault(), Vault())
    answers = [[asked(stage, x, v, "one") for x, v in zip(rounds, vaults, strict=True)] for _ in range(3)]
    assert answers[2] == [[Kind.VECTOR] * N, [Kind.ABORT] * N]


def test_ranks_by_which_nobody_can_count_contributors_are_refused_where_a_policy_counts_them() -> None:
    ranks = {c: 1 if c == VICTIM else 2 for c in range(N)}
    for least, refused in ((3, set(range(N))), (1, set())):
        stage = Stage(N, rule=LoRAA2(), ranks=ranks, policy=Policy(min_slice=least))
        assert set(driven(stage)) == refused


def test_a_state_that_came_back_is_not_answered_from_again() -> None:
    """Flower sends an answer before it keeps the state: a process that is killed in between has the old one again."""
    stage, cells = Stage(N), dict[str, bytes]()
    vault, round = Vault(cells), stage.round()
    for _ in ("keys", "shares", "vectors"):
        asked(stage, round, vault, "one")
    before = dict(cells)
    waiting = round.session.outbox()
    assert asked(stage, round, vault, "one") == [Kind.SURVIVORS] * N
    cells.update(before)
    ids = sorted(stage.ids.values())
    lost = next(x for x in ids if x != stage.ids[0])
    other = enclose(Kind.ASK_SURVIVORS, Envelope.open(waiting[ids[0]]).session, 0, *(x for x in ids if x != lost))
    content = pack_sealed(Sealed("{}", "one", other))
    (reply,) = serve(stage.here, lambda m: 0, [Message(content, 1, "query.secure")], vault)
    assert kind_of(reply) is None


def asked(stage: Stage, round: SecureRound, vault: Vault, thread: str) -> list[Kind | None]:
    """One phase of a round, by hand: what each client answered."""
    if round.is_over:
        return []
    replies = {}
    for client, (message, sent) in round.outbox().items():
        request = None if sent is None else pack_request("train", sent, "{}", stage.fleet.base)
        content = pack_sealed(Sealed("{}", thread, message, request))
        letter = Message(content, client + 1, "query.secure")
        (replies[client],) = serve(stage.here, lambda m, client=client: client, [letter], vault)  # type: ignore[misc]
    for client, reply in replies.items():
        with suppress(ProtocolError):
            round.receive(client, b"" if kind_of(reply) is None else unpack_reply(reply.content))
    round.close()
    return [kind_of(x) for x in replies.values()]
