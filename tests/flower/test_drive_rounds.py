"""Rounds over a grid: what is wrong with one client is refused and counted, and changes nothing else."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedpeft.adapters import Layout, Tensors, Update, same
from fedpeft.channel import PlainChannel
from fedpeft.errors import ProtocolError
from fedpeft.flower import ClientStore, drive, evaluate
from fedpeft.flower.answers import Refusal, Term, pack_refusal, pack_term, unpack_term
from fedpeft.rounds import Metrics, SumRound, Trial
from fedpeft.rules import FactorMean, MeanRule, ServerState, Task
from tests.flower.grids import FaultyGrid, first_state, gathered, one_round
from tests.flower.linear import RANK, LinearTrainer, counts, participant, start

CLIENTS = (0, 1, 2, 3, 4)
BAD = 2


def with_term(reply: Message, term: Term) -> Message:
    reply.content = pack_term(term)
    return reply


def entry(value: float) -> Callable[[Message], list[Message]]:
    def change(reply: Message) -> list[Message]:
        term = unpack_term(reply.content)
        vector = term.vector.copy()
        vector[1] = value
        return [with_term(reply, replace(term, vector=vector))]

    return change


def longer(reply: Message) -> list[Message]:
    term = unpack_term(reply.content)
    return [with_term(reply, replace(term, vector=np.append(term.vector, np.float32(0))))]


def heavier(reply: Message) -> list[Message]:
    term = unpack_term(reply.content)
    return [with_term(reply, replace(term, vector=term.vector * np.float32(-1)))]


def older(reply: Message) -> list[Message]:
    return [with_term(reply, replace(unpack_term(reply.content), round=-0 + 7))]


def later_pass(reply: Message) -> list[Message]:
    return [with_term(reply, replace(unpack_term(reply.content), pass_=1))]


def flower_error(reply: Message) -> list[Message]:
    """As Flower reports a node that is gone: with node 1 as its source."""
    reply.metadata.__dict__["_src_node_id"] = 1
    reply.__dict__["_content"] = None
    reply.error = Error(5, "node unavailable")
    return [reply]


def garbled(reply: Message) -> list[Message]:
    reply.content = RecordDict({"loss": ConfigRecord({"loss": 0.5})})
    return [reply]


def damaged(reply: Message) -> list[Message]:
    array = reply.content["buffer"]["0"]  # type: ignore[index]
    array.data = array.data[:-1] + bytes([array.data[-1] ^ 1])
    return [reply]


def refusing(reply: Message) -> list[Message]:
    reply.content = pack_refusal(Refusal("failed", "no battery"))
    return [reply]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (entry(np.nan), "holds NaN or infinity"),
        (entry(-np.inf), "holds NaN or infinity"),
        (entry(3e7), "norm"),
        (longer, "shape"),
        (heavier, "weight"),
        (older, "the answer is for round 7, pass 0; want round 0, pass 0"),
        (later_pass, "the answer is for round 0, pass 1"),
        (flower_error, "Flower's error 5: node unavailable"),
        (garbled, "records"),
        (damaged, "it was damaged"),
        (refusing, "no battery"),
        (lambda reply: [], "no answer before the deadline"),
    ],
)
def test_a_bad_answer_is_refused_and_the_round_ends_as_without_that_client(
    change: Callable[[Message], list[Message]], reason: str
) -> None:
    fleet, grid, clock = gathered(participant(), len(CLIENTS))
    want, _ = one_round(fleet, [c for c in CLIENTS if c != BAD])
    grid.change = lambda client, reply: change(reply) if client == BAD else [reply]
    began = clock.now
    got, _ = one_round(fleet, CLIENTS)
    assert same(got.state.adapter, want.state.adapter)
    assert (got.metrics, got.weight, got.survivors) == (want.metrics, want.weight, want.survivors)
    assert [client for client, _ in got.refused] == [BAD]
    assert reason in got.refused[0][1]
    waited = clock.now - began
    assert waited == pytest.approx(30.0) if "deadline" in reason else waited == 0


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        (LinearTrainer(raises=frozenset({BAD})), "RuntimeError: client 2 broke"),
        (LinearTrainer(fails=frozenset({BAD})), "out of memory"),
        (LinearTrainer(nan=frozenset({BAD})), "holds NaN or infinity"),
    ],
)
def test_a_client_that_fails_is_refused_and_the_others_in_its_process_go_on(
    trainer: LinearTrainer, reason: str
) -> None:
    fleet, _, _ = gathered(participant(), len(CLIENTS))
    want, _ = one_round(fleet, [c for c in CLIENTS if c != BAD])
    fleet, _, _ = gathered(participant(trainer), len(CLIENTS))
    got, _ = one_round(fleet, CLIENTS)
    assert same(got.state.adapter, want.state.adapter)
    assert got.refused == ((BAD, reason if "NaN" not in reason else got.refused[0][1]),)
    assert reason in got.refused[0][1]
    assert trainer.seen == list(CLIENTS)  # each client once, in order


def test_a_client_that_answers_twice_is_counted_once() -> None:
    fleet, grid, _ = gathered(participant(), len(CLIENTS))
    want, _ = one_round(fleet, CLIENTS)
    grid.change = lambda client, reply: [reply, reply] if client == BAD else [reply]
    got, traffic = one_round(fleet, CLIENTS)
    assert same(got.state.adapter, want.state.adapter)
    assert got.refused == ((BAD, "answered twice: the first answer counts"),)
    assert traffic.strays == 0


def test_a_reply_of_an_earlier_round_that_comes_late_is_counted_and_harmless() -> None:
    fleet, grid, _ = gathered(participant(), len(CLIENTS))
    held: list[Message] = []

    def hold(client: int, reply: Message) -> list[Message]:
        if client == BAD:
            held.append(reply)
            return []
        return [reply]

    grid.change = hold
    first, _ = one_round(fleet, CLIENTS)
    assert first.refused == ((BAD, "no answer before the deadline"),)
    grid.change = lambda client, reply: [reply]
    want, _ = one_round(fleet, CLIENTS, first.state)
    grid.change = lambda client, reply: [*held, reply] if client == 0 else [reply]
    got, traffic = one_round(fleet, CLIENTS, first.state)
    assert same(got.state.adapter, want.state.adapter)
    assert got.survivors == CLIENTS
    assert traffic.strays == 1


def test_a_node_with_another_base_is_refused_with_both_named_whenever_it_turns_up() -> None:
    fleet, _, _ = gathered(participant(), len(CLIENTS))
    moved = replace(fleet, base="the run's")
    with pytest.raises(ProtocolError, match="too few answers"):
        one_round(moved, CLIENTS)
    round = SumRound(first_state(), dict.fromkeys(CLIENTS, RANK), 1, rule=FactorMean())
    drive(moved, round, 30.0)
    assert len(round.refused) == len(CLIENTS)
    assert all("are linear-5x4; the run's are the run's" in why for _, why in round.refused)


def test_a_client_without_a_node_or_that_can_not_be_reached_is_refused() -> None:
    fleet, _, _ = gathered(participant(), len(CLIENTS))
    got, _ = one_round(replace(fleet, nodes={0: 1, 2: 3, 3: 77, 4: 5}), CLIENTS)
    assert dict(got.refused) == {1: "has no node", 3: "the message could not be sent"}
    assert got.survivors == (0, 2, 4)


def test_the_same_seed_gives_the_same_adapter_however_clients_are_spread_over_processes() -> None:
    together, _, _ = gathered(participant(), len(CLIENTS))
    other, grid, _ = gathered(participant(), len(CLIENTS))
    apart = replace(other, grid=OneByOne(grid._handler, list(grid._nodes.values())))
    left, right = first_state(), first_state()
    for _ in range(3):
        left, right = one_round(together, CLIENTS, left)[0].state, one_round(apart, CLIENTS, right)[0].state
    assert same(left.adapter, right.adapter)
    assert not same(left.adapter, start())


class OneByOne(FaultyGrid):
    """Calls its handler with one message at a time, as deployed nodes do, and in descending order."""

    def pull_messages(self, message_ids: object) -> list[Message]:
        ids = sorted(message_ids, key=int, reverse=True)  # type: ignore[call-overload]
        queue = dict(self._queue)
        replies = FaultyGrid.pull_messages(self, ids[:1])
        self._queue = {k: v for k, v in queue.items() if k != ids[0]}
        return replies


def test_a_round_closes_once_enough_have_answered_and_not_always_with_the_same_clients() -> None:
    trainer = LinearTrainer()
    fleet, _, _ = gathered(participant(trainer), len(CLIENTS))
    state, cohorts = first_state(), set()
    for _ in range(6):
        trainer.seen.clear()
        outcome, _ = one_round(fleet, CLIENTS, state, enough=3)
        state = outcome.state
        cohorts.add(outcome.survivors)
        assert outcome.refused == ()
        assert len(outcome.survivors) == len(trainer.seen) == 3  # nobody trains for nothing
    assert len(cohorts) > 1


def test_traffic_and_progress_are_told_and_terms_are_not_kept() -> None:
    fleet, _, _ = gathered(participant(), len(CLIENTS))
    told: list[tuple[int, str | None]] = []
    round = SumRound(first_state(), dict.fromkeys(CLIENTS, RANK), 1, rule=FactorMean())
    traffic = drive(fleet, round, 30.0, lambda client, problem: told.append((client, problem)))
    assert told == [(client, None) for client in CLIENTS]
    assert [client for client, _, _ in traffic.timeline] == list(CLIENTS)
    assert all(0 <= sent <= answered for _, sent, answered in traffic.timeline)
    floor = sum(x.nbytes for x in start().tensors().values())
    assert floor * len(CLIENTS) < traffic.bytes_down
    assert (floor + 4 * 5) * len(CLIENTS) < traffic.bytes_up < (floor + 400) * len(CLIENTS)


# What Flower's FedAvg gets wrong


def test_clients_of_unequal_rank_are_padded_and_never_broadcast() -> None:
    ranks = {0: 1, 1: 2, 2: RANK}
    fleet, _, _ = gathered(participant(), 3)
    got, _ = one_round(fleet, ranks, ranks=ranks)
    spec = got.state.adapter.spec
    assert spec == start().spec
    a = got.state.adapter.layers["q"].a - start().layers["q"].a
    lone, _ = one_round(fleet, (2,))  # the third direction is trained by client 2 alone: a weighted third of its change
    share = counts(2).train / sum(counts(c).train for c in ranks)
    alone = lone.state.adapter.layers["q"].a - start().layers["q"].a
    np.testing.assert_allclose(a[2], share * alone[2], rtol=1e-5)


def test_sums_are_fp64_so_that_many_small_changes_are_not_lost() -> None:
    size = 4 * RANK + 5 * RANK + 5
    fleet, grid, _ = gathered(participant(), len(CLIENTS))
    # In fp16 the spacing at 2,048 is 2, and in fp32 at 2^24 it is 2 as well: there the ones would vanish.
    values = [2.0**24, 1.0, 1.0, 1.0, 1.0]

    def change(client: int, reply: Message) -> list[Message]:
        vector = np.full(size + 5, values[client], np.float32)
        vector[size:] = [1, 0, 0, 0, 0]
        return [with_term(reply, Term(0, 0, vector))]

    grid.change = change
    round = SumRound(first_state(), dict.fromkeys(CLIENTS, RANK), 1, PlainChannel(largest_norm=1e9), rule=FactorMean())
    drive(fleet, round, 30.0)
    assert round.refused == []
    np.testing.assert_array_equal(round._sum.total[:size], 2.0**24 + 4)


def test_one_nan_reply_poisons_nothing() -> None:
    fleet, grid, _ = gathered(participant(), len(CLIENTS))
    grid.change = lambda client, reply: entry(np.nan)(reply) if client == BAD else [reply]
    got, _ = one_round(fleet, CLIENTS)
    assert all(np.isfinite(x).all() for x in got.state.adapter.tensors().values())
    assert not same(got.state.adapter, start())


# More than one pass


class TwoPasses(MeanRule):
    """Pass 0 sums the norm of b's change; pass 1 sums a's change, and checks that it heard pass 0's mean."""

    @property
    def passes(self) -> int:
        return 2

    def layout(self, task: Task) -> Layout:
        return Layout((("n", (1,)),)) if task.pass_ == 0 else task.spec.factors("a")

    def encode(self, update: Update, task: Task) -> Tensors:
        change = update.factors("ab", task.spec)
        if task.pass_ == 0:
            return {"n": np.array([np.linalg.norm(change["q/b"])])}
        assert task.shared["mean"].shape == (1,)
        return {"q/a": change["q/a"] * task.shared["mean"][0]}

    def between(self, mean: Tensors, state: ServerState) -> Tensors:
        return {"mean": mean["n"]}

    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        return state.next(state.adapter.moved(mean))


@pytest.mark.parametrize("disk", [False, True])
def test_a_later_pass_encodes_the_kept_update_without_training_again(tmp_path, disk: bool) -> None:
    trainer, rule = LinearTrainer(), TwoPasses()
    store = ClientStore(tmp_path if disk else None)
    fleet, _, _ = gathered(participant(trainer, rule, store), 3, rule)
    got, _ = one_round(fleet, range(3), rule=rule)
    assert trainer.seen == [0, 1, 2]
    assert got.refused == ()
    base, _ = one_round(gathered(participant(), 3)[0], range(3))
    # The mean of a's changes is FedIT's; pass 1 scaled it by the mean norm that pass 0 found.
    ratio = (got.state.adapter.layers["q"].a - start().layers["q"].a) / (
        base.state.adapter.layers["q"].a - start().layers["q"].a
    )
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)
    assert ratio[0, 0] > 0
    assert got.metrics.examples == sum(counts(c).train for c in range(3))


def test_a_client_that_lost_its_update_between_passes_is_refused() -> None:
    rule = TwoPasses()
    store = ClientStore()
    fleet, grid, _ = gathered(participant(rule=rule, store=store), 3, rule)

    def forget(client: int, reply: Message) -> list[Message]:
        store._database.connection.execute("DELETE FROM state WHERE client = 1")
        return [reply]

    grid.change = forget
    got, _ = one_round(fleet, range(3), rule=rule)
    assert got.survivors == (0, 2)
    assert got.refused == ((1, "round 0's update is gone: can't answer pass 1"),)


# Personal parts and constants


def test_personal_tensors_stay_on_the_client_and_go_on_from_round_to_round() -> None:
    rule = FactorMean(("a",), personalised=True)
    store = ClientStore()
    fleet, _, _ = gathered(participant(rule=rule, store=store), 3, rule)
    state = first_state()
    for _ in range(2):
        state = one_round(fleet, range(3), state, rule)[0].state
    b = [store.load(c, 2)["personal/q/b"] for c in range(3)]  # type: ignore[index]
    assert len({x.tobytes() for x in b}) == 3
    assert same(state.adapter.put({"q/a": start().layers["q"].a}), start())  # b and bias never came back
    assert [int(store.load(c, 2)["kept/rounds"][0]) for c in range(3)] == [2, 2, 2]  # type: ignore[index]
    lost = ClientStore()
    other, _, _ = gathered(participant(rule=rule, store=lost), 3, rule)
    again = one_round(other, range(3), one_round(other, range(3), rule=rule)[0].state, rule)[0].state
    assert same(again.adapter, state.adapter)


def test_constants_go_in_full_once_and_again_only_to_a_node_that_lost_them() -> None:
    rule = FactorMean(("b",))
    store = ClientStore()
    fleet, _, _ = gathered(participant(rule=rule, store=store), 3, rule)
    first, cost = one_round(fleet, range(3), rule=rule)
    second, less = one_round(fleet, range(3), first.state, rule)
    saved = start().layers["q"].a.nbytes + start().fixed["fixed"].nbytes
    assert cost.bytes_down - less.bytes_down > 3 * saved
    store._constants.clear()
    store._database.connection.execute("DELETE FROM constants")
    again, more = one_round(fleet, range(3), first.state, rule)
    assert same(again.state.adapter, second.state.adapter)
    assert again.refused == ()
    # All three asked again, were sent the short letter and then the full one, and answered twice.
    assert more.bytes_down == pytest.approx(less.bytes_down + cost.bytes_down, abs=30)
    assert len(more.timeline) == 6


# Evaluation


def test_clients_evaluate_their_own_parts_and_one_the_central_set() -> None:
    fleet, _, _ = gathered(participant(), 3)
    state = first_state()
    parts = {0: ("validation", "test", "central"), 1: ("test",), 2: ("train",)}
    told: list[tuple[int, str | None]] = []
    got = evaluate(fleet, state, dict.fromkeys(parts, RANK), parts, 30.0, lambda c, p: told.append((c, p)))
    assert {c: tuple(x) for c, x in got.answers.items()} == parts
    trainer = LinearTrainer()

    for client, part, trial in (
        (0, "validation", Trial(0, "validation", start())),
        (0, "central", Trial(None, "test", start())),
        (2, "train", Trial(2, "train", start())),
    ):
        assert got.answers[client][part] == next(trainer.evaluate_many([trial]))
    assert got.answers[1]["test"] == Metrics()  # client 1 has no test examples: nothing is evaluated
    assert (got.refused, told) == ((), [(0, None), (1, None), (2, None)])


def test_a_client_of_small_rank_evaluates_its_own_part_with_its_directions_and_the_central_set_with_all() -> None:
    fleet, _, _ = gathered(participant(), 2)
    got = evaluate(fleet, first_state(), {0: 1, 1: RANK}, {0: ("test", "central"), 1: ("central",)}, 30.0)
    assert got.answers[0]["central"] == got.answers[1]["central"]
    full = evaluate(fleet, first_state(), {0: RANK}, {0: ("test",)}, 30.0)
    assert got.answers[0]["test"] != full.answers[0]["test"]


def test_an_evaluation_without_the_central_set_without_a_node_or_without_an_answer_is_refused() -> None:
    fleet, grid, _ = gathered(participant(holds_central=False), 4)
    fleet = replace(fleet, nodes={0: 1, 2: 3, 3: 4})
    grid.change = lambda client, reply: [] if client == 2 else [reply]
    parts = {0: ("central",), 1: ("test",), 2: ("test",), 3: ("test",)}
    got = evaluate(fleet, first_state(), dict.fromkeys(parts, RANK), parts, 5.0)
    assert list(got.answers) == [3]
    assert dict(got.refused) == {
        0: "this node does not hold the central test set",
        1: "has no node",
        2: "no answer before the deadline",
    }


def test_personal_clients_are_evaluated_with_their_own_parts() -> None:
    rule = FactorMean(("a",), personalised=True)
    fleet, _, _ = gathered(participant(rule=rule), 2, rule)
    state = one_round(fleet, range(2), rule=rule)[0].state
    ranks = dict.fromkeys(range(2), RANK)
    parts = dict.fromkeys(range(2), ("train", "central"))
    got = evaluate(fleet, state, ranks, parts, 5.0)
    assert got.answers[0]["central"] == got.answers[1]["central"]  # of the shared adapter
    fresh = evaluate(fleet, replace(state, task=replace(state.task, round=0)), ranks, parts, 5.0)
    assert fresh.answers[0]["train"] != got.answers[0]["train"]  # before round 0 there is no personal part
    assert got.answers[0]["train"].loss < fresh.answers[0]["train"].loss
