"""What a client keeps of secure sessions, and what it will not do whoever asks."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedpeft.errors import ProtocolError
from fedpeft.flower import ClientStore, Journal, Vault, client_app, drive_secure, in_process, serve
from fedpeft.flower.inprocess import NodeConfig
from fedpeft.flower.member import is_last_word, params_of
from fedpeft.flower.packing import Parcel, apart, pack, payload_bytes, together
from fedpeft.flower.post import Leg, Traffic
from fedpeft.flower.requests import pack_request
from fedpeft.flower.sealed import Sealed, pack_reply, pack_sealed, unpack_reply, unpack_sealed
from fedpeft.rules import FactorMean
from fedpeft.secagg import Policy
from fedpeft.secagg.messages import Envelope, Kind, enclose
from tests.flower.covert import DEADLINE, PATIENCE, RUN, Stage, kind_of, when
from tests.flower.grids import first_state
from tests.flower.linear import RANK, LinearTrainer
from tests.flower.test_drive_rounds import TwoPasses
from tests.flower.test_secure_rounds import check

N = 6


# Journal


def test_a_journal_knows_sessions_and_rounds_after_a_restart_by_client_and_run(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.begin(3, "ab" * 16)
    first.gave(3, "r", 4)
    assert first.complete(3, "r", 4, "ab" * 16)
    first.gave(3, "r", 7)
    first.gave(3, "r", 7)
    first.gave(4, "r", 9)
    journal = Journal(tmp_path)
    history = journal.history(3, "r", 8)
    assert ("ab" * 16 in history.sessions, "ac" * 16 in history.sessions, 7 in history.sessions) == (True, False, False)
    assert (history.last_round, history.rounds) == (4, 2)  # 7 was not unmasked
    assert journal.history(3, "r", 7).rounds == 1  # another attempt of a round is not another round
    assert "ab" * 16 not in journal.history(4, "r", 0).sessions
    assert journal.history(4, "r", 0).last_round == -1
    other = journal.history(3, "another", 0)
    assert ("ab" * 16 in other.sessions, other.last_round, other.rounds) == (True, -1, 0)
    assert journal.complete(3, "r", 7, "ac" * 16)
    assert journal.complete(3, "r", 7, "ac" * 16)  # of its second pass
    assert not journal.complete(3, "r", 7, "ad" * 16)
    assert journal.complete(4, "r", 7, "ad" * 16)  # another client, round or run is another matter
    assert journal.complete(3, "r", 8, "ad" * 16)
    assert journal.complete(3, "s", 7, "ad" * 16)
    assert [journal.answers(3, "ab", x) for x in ("KEYS 0", "KEYS 0", "KEYS 1")] == [True, False, True]
    assert (journal.answers(4, "ab", "KEYS 0"), journal.answers(3, "ac", "KEYS 0")) == (True, True)
    assert not Journal(tmp_path).answers(3, "ab", "KEYS 1")
    journal.gave(3, "r", 7)  # what is done stays done
    assert Journal(tmp_path).history(3, "r", 9).last_round == 8


def test_a_client_takes_part_in_no_more_rounds_than_its_policy_has() -> None:
    stage = Stage(N, policy=Policy(max_rounds=2))
    first, _ = stage.run()
    second, _ = stage.run(state=first.state)
    round = stage.round(state=second.state)
    drive_secure(stage.fleet, round, DEADLINE, PATIENCE)
    assert {why.rpartition(": ")[2] for _, why in round.refused} == {"budget"}


# Vault


def test_a_vault_holds_one_session_a_client_and_shows_nothing_of_it() -> None:
    cells: dict[str, bytes] = {}
    vault = Vault(cells)
    vault.write(1, "a", b"secret\nof a")
    vault.write(2, "a", b"other")
    assert (vault.read(1, "a"), vault.read(1, "b"), vault.read(3, "a")) == (b"secret\nof a", b"", b"")
    assert "secret" not in repr(vault)
    vault.write(1, "b", b"new")
    assert (vault.read(1, "a"), vault.read(1, "b")) == (b"", b"new")
    vault.wipe(1, "a")  # which is not there any more
    assert vault.read(1, "b") == b"new"
    vault.wipe(1, "b")
    vault.wipe(1, "b")
    assert (vault.read(1, "b"), list(cells)) == (b"", ["2"])


def test_a_vault_lies_in_the_state_of_flowers_context() -> None:
    state = RecordDict()
    Vault.within(state).write(1, "a", b"x")
    assert isinstance(state["fedpeft.secure"], ConfigRecord)
    assert Vault.within(copy.deepcopy(state)).read(1, "a") == b"x"
    Vault.within(state).wipe(1, "a")
    assert Vault.within(state).read(1, "a") == b""


@pytest.mark.parametrize("passes", [1, 2])
def test_nodes_that_are_a_new_process_for_each_message_keep_what_it_takes_in_their_context(
    passes: int, tmp_path: Path
) -> None:
    stage = Stage(N, rule=TwoPasses() if passes == 2 else FactorMean(), journal=Journal(tmp_path))
    contexts = {node: Context(1, node, dict(config), RecordDict(), {}) for node, config in stage.grid._nodes.items()}
    largest = 0

    def handle(messages: Sequence[Message], nodes: Mapping[int, NodeConfig]) -> Iterator[Message]:
        nonlocal largest
        for message in messages:
            fresh = replace(stage.here, store=ClientStore(tmp_path), secure=stage.secure())
            context = contexts[message.metadata.dst_node_id]
            context = copy.deepcopy(context)  # as what comes from a SuperNode, and goes back to it
            contexts[message.metadata.dst_node_id] = context
            yield client_app(lambda settings, config, fresh=fresh: fresh)(message, context)
            largest = max(largest, sum(len(x) for x in context.state["fedpeft.secure"].values()))  # type: ignore[union-attr,arg-type]

    stage.grid._handler = handle
    got, _ = stage.run()
    check(stage, got, tuple(range(N)))
    assert stage.trainer.seen == list(range(N))
    assert all(dict(x.state["fedpeft.secure"]) == {} for x in contexts.values())  # type: ignore[call-overload]
    assert 0 < largest < 20_000


def test_a_client_whose_process_has_lost_its_session_is_out_and_the_others_go_on() -> None:
    stage = Stage(N)
    vaults = {kind: Vault() for kind in ("first", "second")}

    def handle(messages: Sequence[Message], nodes: Mapping[int, NodeConfig]) -> Iterator[Message]:
        for message in messages:
            client = message.metadata.dst_node_id - 1
            asked = Envelope.open(unpack_sealed(message.content).message).kind
            vault = vaults["second" if client == 3 and asked == Kind.ASK_VECTOR else "first"]
            yield from serve(stage.here, lambda m: m.metadata.dst_node_id - 1, [message], vault)

    stage.grid._handler = handle
    got, _ = stage.run()
    check(stage, got, (0, 1, 2, 4, 5))
    assert [(c, why.rpartition(": ")[2]) for c, why in got.refused] == [(3, "session")]


def test_a_client_that_is_done_or_out_of_a_session_has_wiped_what_it_kept() -> None:
    stage, vault = Stage(N, trainer=LinearTrainer(fails=frozenset({2}))), Vault(cells := {})

    def handle(messages: Sequence[Message], nodes: Mapping[int, NodeConfig]) -> Iterator[Message]:
        for message in messages:
            yield from serve(stage.here, lambda m: m.metadata.dst_node_id - 1, [message], vault)

    stage.grid._handler = handle
    seen: dict[Kind | None, set[str]] = {}

    def note(client: int, reply: Message) -> list[Message]:
        seen[kind_of(reply)] = set(cells)
        return [reply]

    stage.grid.change = note  # type: ignore[assignment]
    stage.run()
    assert seen[Kind.KEYS] == set("012345")
    assert seen[Kind.SHARES] == seen[Kind.VECTOR] == seen[Kind.SURVIVORS] == set("01345")
    assert cells == {}


# Many messages at once


def test_vectors_of_clients_in_one_process_are_made_one_by_one() -> None:
    """Memory does not grow with the clients that a process has."""
    stage = Stage(N)
    likely, made = stage.grid._handler, list[int]()
    gave = Journal.gave

    def handle(messages: Sequence[Message], nodes: Mapping[int, NodeConfig]) -> Iterator[Message]:
        for number, reply in enumerate(likely(messages, nodes)):
            if kind_of(reply) == Kind.VECTOR:
                made.append(vectors - number)
            yield reply

    vectors = 0

    def count(self: Journal, client: int, run: str, round: int) -> None:
        nonlocal vectors
        vectors += 1
        gave(self, client, run, round)

    stage.grid._handler = handle
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "gave", count)
        stage.run()
    assert made == [1] * N


def test_of_two_questions_in_one_batch_that_ask_for_both_shares_of_a_client_one_is_answered() -> None:
    """The same process gets them together: what the first has used up, the second does not find."""
    stage = Stage(N)
    vault = Vault()
    answers: list[Kind | None] = []

    def handle(messages: Sequence[Message], nodes: Mapping[int, NodeConfig]) -> Iterator[Message]:
        asked = Envelope.open(unpack_sealed(messages[0].content).message).kind
        twice = asked == Kind.ASK_UNMASK
        batch = [m for m in messages for _ in range(2 if twice else 1)]
        found = list(serve(stage.here, lambda m: m.metadata.dst_node_id - 1, batch, vault))
        answers.extend(kind_of(x) for x in found if twice)
        yield from found[:: 2 if twice else 1]

    stage.grid._handler = handle
    got, _ = stage.run()
    check(stage, got, tuple(range(N)))
    assert answers == [Kind.UNMASK, Kind.ABORT] * N


def test_a_vector_is_scaled_by_what_its_own_session_agreed_on() -> None:
    """A coordinator could tell one client of a smaller cohort in a session that it lets lie, whose finer grid would
    make that client's numbers stand out in the sum of another one."""
    stage = Stage(N)
    small, large = stage.round(range(5)), stage.round(range(N))
    vault, thread = Vault(), "one"

    def ask(round, client: int) -> Message:  # type: ignore[no-untyped-def]
        (message, _) = round.outbox()[client]
        sealed = Message(pack_sealed(Sealed("{}", thread, message)), client + 1, "query.secure")
        (reply,) = serve(stage.here, lambda m: client, [sealed], vault)
        return reply

    assert kind_of(ask(small, 0)) == Kind.KEYS
    held = vault.read(0, thread)
    assert kind_of(ask(large, 0)) == Kind.KEYS
    new = vault.read(0, thread)
    assert (b'"n":5' in held, b'"n":5' in new, b'"n":6' in new) == (True, False, True)
    assert kind_of(ask(small, 0)) == Kind.ABORT  # the session was seen


# A coordinator that is not honest


def test_a_session_of_another_run_is_refused() -> None:
    stage = Stage(N)
    stage.here = replace(stage.here, secure=replace(stage.secure(), run="another"))
    stage.grid._handler = _handler_of(stage)
    round = stage.round()
    drive_secure(stage.fleet, round, DEADLINE, PATIENCE)
    assert {why for _, why in round.refused} == {f"the session is of run {RUN!r}; want 'another'"}


def test_another_model_to_one_client_is_refused_before_it_trains() -> None:
    stage = Stage(N)
    likely = stage.grid._handler
    state = first_state()
    moved = replace(state, adapter=state.adapter.put({"bias": np.full(5, 1e-6, np.float32)}))
    lie = pack_request("train", stage.rule.send(moved, RANK), "{}", stage.fleet.base)

    def handle(messages: Sequence[Message], nodes: Mapping[int, NodeConfig]) -> Iterator[Message]:
        for message in messages:
            sealed = unpack_sealed(message.content)
            if message.metadata.dst_node_id == 3 and sealed.request is not None:
                message.content = pack_sealed(replace(sealed, request=lie))
        yield from likely(messages, nodes)

    stage.grid._handler = handle
    got, _ = stage.run()
    assert [(c, why.rpartition(": ")[2]) for c, why in got.refused] == [(2, "model")]
    assert stage.trainer.seen == [0, 1, 3, 4, 5]
    check(stage, got, (0, 1, 3, 4, 5))


def test_a_roster_that_is_no_longer_in_force_stops_a_client_at_once() -> None:
    stage = Stage(N)

    def stale():  # type: ignore[no-untyped-def]
        raise ProtocolError("roster: version 1 has expired")

    stage.here = replace(stage.here, secure=replace(stage.secure(), roster=stale))
    stage.grid._handler = _handler_of(stage)
    round = stage.round()
    drive_secure(stage.fleet, round, DEADLINE, PATIENCE)
    assert {why for _, why in round.refused} == {"roster: version 1 has expired"}
    assert stage.trainer.seen == []


def _handler_of(stage: Stage):  # type: ignore[no-untyped-def]
    here = stage.here
    return in_process(lambda settings, config: here, stage.clients)._handler


# Messages


def test_a_message_with_a_request_and_one_without_come_back_as_they_were_sent() -> None:
    inner = pack(Parcel("train", {"settings": "{}"}, {"x": np.arange(3.0)}))
    alone, both = Sealed("{}", "ab1", b"\x00\xff"), Sealed("{}", "ab1", b"", inner)
    got = unpack_sealed(pack_sealed(alone))
    assert (got.settings, got.thread, got.message, got.request) == ("{}", "ab1", b"\x00\xff", None)
    content = pack_sealed(both)
    back = unpack_sealed(content).request
    assert back is not None
    assert (back["buffer"] is inner["buffer"], back["manifest"] is inner["manifest"]) == (True, True)  # no copies
    assert payload_bytes(content) == payload_bytes(inner) + payload_bytes(pack_sealed(Sealed("{}", "ab1", b"")))
    assert apart(inner) == (inner, None)
    assert sorted(together(inner, inner)) == ["beside/buffer", "beside/manifest", "buffer", "manifest"]


@pytest.mark.parametrize(
    ("parcel", "reason"),
    [
        (Parcel("secure", {"settings": "{}"}, {"message": np.zeros(1, np.uint8)}), "has no thread"),
        (Parcel("secure", {"settings": "{}", "thread": ""}, {"message": np.zeros(1, np.uint8)}), "want 1 to 64"),
        (Parcel("secure", {"settings": "{}", "thread": "a\n"}, {"message": np.zeros(1, np.uint8)}), "want 1 to 64"),
        (Parcel("secure", {"settings": "{}", "thread": "a" * 65}, {"message": np.zeros(1, np.uint8)}), "want 1 to 64"),
        (Parcel("secure", {"settings": "{}", "thread": "a"}, {}), "want one vector of uint8"),
        (Parcel("secure", {"settings": "{}", "thread": "a"}, {"message": np.zeros(1)}), "want one vector of uint8"),
        (
            Parcel("secure", {"settings": "{}", "thread": "a"}, {"message": np.zeros((1, 1), np.uint8)}),
            "want one vector",
        ),
        (
            Parcel(
                "secure", {"settings": "{}", "thread": "a"}, {x: np.zeros(1, np.uint8) for x in ("message", "loss")}
            ),
            "want one vector",
        ),
        (Parcel("term", {}, {}), "want 'secure'"),
    ],
)
def test_a_message_that_no_coordinator_would_send_is_refused(parcel: Parcel, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        unpack_sealed(pack(parcel))


@pytest.mark.parametrize(
    ("parcel", "reason"),
    [
        (Parcel("secured", {"num_examples": 3}, {"message": np.zeros(1, np.uint8)}), "facts that are not known"),
        (Parcel("secured", {}, {"message": np.zeros(1, np.uint8), "loss": np.zeros(1)}), "want one vector of uint8"),
        (Parcel("term", {}, {"message": np.zeros(1, np.uint8)}), "want 'secured'"),
    ],
)
def test_an_answer_with_anything_beside_the_protocols_bytes_is_refused(parcel: Parcel, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        unpack_reply(pack(parcel))
    stage = Stage(N)

    def talk(reply: Message) -> list[Message]:
        reply.content = pack(parcel)
        return [reply]

    stage.grid.change = when({1}, Kind.VECTOR, talk)  # type: ignore[assignment]
    got, _ = stage.run()
    check(stage, got, (0, 2, 3, 4, 5))


def test_parameters_are_read_from_what_opens_a_session_and_from_nothing_else() -> None:
    stage = Stage(N)
    stage.round()
    (params,) = stage.sessions.values()
    session, told = bytes.fromhex(params.session), params.to_json()
    assert params_of(enclose(Kind.ASK_KEYS, session, 0, told)) == params
    assert params_of(enclose(Kind.ASK_VECTOR, session, 0, told)) == params  # two servers: asked for at once
    assert params_of(enclose(Kind.ASK_VECTOR, session, 0, b"\x01" + told)) is None
    assert params_of(enclose(Kind.ASK_SHARES, session, 0, told)) is None
    assert params_of(b"") is None
    with pytest.raises(ProtocolError, match="of another session"):
        params_of(enclose(Kind.ASK_KEYS, bytes(16), 0, told))
    with pytest.raises(ProtocolError, match="params"):
        params_of(enclose(Kind.ASK_KEYS, session, 0, json.dumps({}).encode()))
    last = [kind for kind in Kind if is_last_word(enclose(kind, session, 0, b"\x01"))]
    assert last == [Kind.ASK_UNMASK]
    assert is_last_word(enclose(Kind.ASK_VECTOR, session, 0, told))
    assert not is_last_word(b"")


def test_the_cost_of_two_sessions_adds_up() -> None:
    leg = Leg("keys", 0, 1.0, 3, 4)
    one = Traffic(10, 5, ((2, 0.0, 1.0),), 1, {2: (10, 5)}, (leg,))
    two = Traffic(7, 6, ((2, 0.5, 1.0), (3, 0.0, 2.0)), 2, {2: (3, 3), 3: (4, 3)}, (leg, leg))
    got = one.then(two, 30.0)
    assert got == Traffic(
        17, 11, ((2, 0.0, 1.0), (2, 30.5, 31.0), (3, 30.0, 32.0)), 3, {2: (13, 8), 3: (4, 3)}, (leg,) * 3
    )
    assert Traffic().then(one, 0.0) == one
    assert one.then(Traffic(), 9.0) == one


def test_an_answer_is_the_bytes_that_were_put_in() -> None:
    for message in (b"", b"\x00" * 5, bytes(range(256))):
        assert unpack_reply(pack_reply(message)) == message
