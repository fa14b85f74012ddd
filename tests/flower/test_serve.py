"""The client's side: whatever goes wrong for one client, the others in its process are answered."""

import sqlite3
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Message

from fedpeft.adapters import Adapter, LowRank, Update
from fedpeft.channel import PlainChannel
from fedpeft.errors import DataError
from fedpeft.flower import ClientStore, Counts, evaluate, serve
from fedpeft.flower.answers import unpack_refusal, unpack_term
from fedpeft.flower.packing import glance
from fedpeft.flower.requests import pack_request
from fedpeft.rounds import Done, Failed, Job, Metrics, Trial, contribute, derive
from fedpeft.rules import Broadcast, Examples, FactorMean, Task
from tests.flower.grids import first_state, gathered, one_round
from tests.flower.linear import RANK, LinearTrainer, counts, participant, start


class Short(LinearTrainer):
    """Gives no result for client 1 and those after it; fails to evaluate client 1."""

    def train_many(self, jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        for job in jobs:
            if job.client == 1:
                return
            yield from LinearTrainer.train_many(self, [job])

    def evaluate_many(self, trials: Sequence[Trial]) -> Iterator[Metrics | Failed]:
        for trial in trials:
            if trial.client == 1:
                yield Failed("too long a text")
            else:
                yield from LinearTrainer.evaluate_many(self, [trial])


class Wrong(LinearTrainer):
    """Gives client 1 an adapter of another scale than the one it got."""

    def train_many(self, jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        for job, done in zip(jobs, LinearTrainer.train_many(self, jobs), strict=True):
            layers = {n: LowRank(x.a, x.b, 9.0 if job.client == 1 else x.scale) for n, x in done.trained.layers.items()}  # type: ignore[union-attr]
            yield replace(done, trained=Adapter(layers, done.trained.dense))  # type: ignore[union-attr,arg-type]


def message(client: int, base: str = "linear-5x4") -> Message:
    gathered(participant(), 1)  # gives messages an identity
    broadcast = Broadcast(Task(start().spec, 2), start(), {})
    return Message(pack_request("train", broadcast, "{}", base), client + 1, "train")


def test_what_a_client_sends_is_what_the_rule_and_the_channel_make_of_its_training() -> None:
    (reply,) = serve(participant(), lambda m: 4, [message(4)])
    job = Job(4, 2, derive(3, "train", 2, 4), start())
    (done,) = LinearTrainer().train_many([job])
    assert isinstance(done, Done)
    weight = Examples().weight(counts(4).train)
    want = contribute(
        FactorMean(), PlainChannel(), Update(start(), done.trained), weight, done.metrics, Task(start().spec, 2)
    )
    np.testing.assert_array_equal(unpack_term(reply.content).vector, want)
    assert (reply.metadata.message_type, reply.metadata.dst_node_id) == ("train", 1)


def test_a_trainer_that_gives_no_result_for_a_client_is_asked_for_the_others_again() -> None:
    replies = list(serve(participant(Short()), lambda m: m.metadata.dst_node_id - 1, [message(c) for c in (0, 1, 2)]))
    assert [glance(r.content)[0] for r in replies] == ["term", "error", "term"]
    assert unpack_refusal(replies[1].content).reason == "the trainer gave no result"


def test_an_adapter_of_another_scale_is_the_clients_failure_and_not_the_rounds() -> None:
    fleet, _, _ = gathered(participant(Wrong()), 3)
    got, _ = one_round(fleet, range(3))
    assert got.survivors == (0, 2)
    assert "factors have scale 9.0; want the server's 2.0" in got.refused[0][1]


def test_a_part_that_can_not_be_evaluated_refuses_that_client_alone() -> None:
    fleet, _, _ = gathered(participant(Short()), 3)
    ranks = dict.fromkeys(range(3), RANK)
    got = evaluate(fleet, first_state(), ranks, dict.fromkeys(range(3), ("train", "central")), 5.0)
    assert list(got.answers) == [0, 2]
    assert got.refused == ((1, "too long a text"),)


def test_a_client_without_training_examples_says_so_and_is_not_trained() -> None:
    trainer = LinearTrainer()
    empty = replace(participant(trainer), examples=lambda client: Counts(0 if client == 1 else 5))
    fleet, _, _ = gathered(empty, 3)
    got, _ = one_round(fleet, range(3))
    assert got.refused == ((1, "this client has no training examples"),)
    assert trainer.seen == [0, 2]


def test_a_damaged_state_is_that_clients_failure_and_names_the_file(tmp_path) -> None:
    rule = FactorMean(("a",), personalised=True)
    fleet, _, _ = gathered(participant(rule=rule, store=ClientStore(tmp_path)), 3, rule)
    state = one_round(fleet, range(3), rule=rule)[0].state
    with sqlite3.connect(tmp_path / "state.sqlite") as other:
        other.execute("UPDATE state SET content = substr(content, 1, 40) WHERE client = 1")
    got, _ = one_round(fleet, range(3), state, rule)
    assert got.survivors == (0, 2)
    assert "state.sqlite, client 1, round 0: can't be read" in got.refused[0][1]


def test_examples_that_can_not_be_counted_are_that_clients_failure() -> None:
    def examples(client: int) -> Counts:
        if client == 1:
            raise DataError("mine.jsonl: line 3 is not JSON")
        return counts(client)

    fleet, _, _ = gathered(participant(), 3)
    broken, _, _ = gathered(participant(), 3)
    want, _ = one_round(fleet, (0, 2))
    broken.grid._handler = gathered(replace(participant(), examples=examples), 1)[1]._handler  # type: ignore[attr-defined]
    got, _ = one_round(broken, range(3))
    assert got.survivors == want.survivors
    assert got.refused == ((1, "DataError: mine.jsonl: line 3 is not JSON"),)


@pytest.mark.parametrize("shares", [True, False])
def test_messages_that_share_their_content_are_unpacked_once(monkeypatch: pytest.MonkeyPatch, shares: bool) -> None:
    module = sys.modules["fedpeft.flower.jobs"]
    calls: list[int] = []
    unpack = module.unpack_request
    monkeypatch.setattr(module, "unpack_request", lambda *a: calls.append(1) or unpack(*a))
    first = message(0)
    others = [Message(first.content, c + 1, "train") if shares else message(c) for c in (1, 2)]
    list(serve(participant(), lambda m: m.metadata.dst_node_id - 1, [first, *others]))
    assert len(calls) == (1 if shares else 3)
