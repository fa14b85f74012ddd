"""What the coordinator sees of clients whose run is secure: every message, every field, every byte of it."""

import json
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from flwr.app import Message

from fedpeft.flower import drive, drive_secure, evaluate, in_process, muster
from fedpeft.flower.packing import Parcel, unpack
from fedpeft.rounds import Metrics, SumRound
from fedpeft.secagg import Mock
from fedpeft.secagg.messages import Envelope, Kind
from tests.flower.covert import Stage, identity
from tests.flower.grids import FaultyGrid, first_state
from tests.flower.linear import RANK, LinearTrainer, counts
from tests.flower.test_drive_rounds import TwoPasses

N = 20
KINDS = ("secured", "capabilities", "error", "term", "metrics")
CAPABILITIES = {"client", "base", "examples", "central", "holds", "start", "rank", "identity"}


@dataclass
class Ear:
    """Hears all that clients answer."""

    heard: list[tuple[int, str, Parcel]] = field(default_factory=list)

    def __call__(self, client: int, reply: Message) -> list[Message]:
        assert reply.has_content()
        assert set(reply.content) == {"buffer", "manifest"}
        buffer, manifest = reply.content["buffer"]["0"], reply.content["manifest"]["0"]  # type: ignore[index]
        assert json.loads(zlib.decompress(manifest)).keys() == {"schema", "kind", "facts", "tensors", "digest"}  # type: ignore[arg-type]
        assert buffer.stype == "fedpeft"  # type: ignore[union-attr]
        self.heard.append((client, reply.metadata.message_type, unpack(reply.content, *KINDS)))
        return [reply]


def heard(stage: Stage) -> Ear:
    ear = Ear()
    stage.grid.change = ear  # type: ignore[assignment]
    stage.run()
    return ear


@pytest.mark.parametrize("protocol", ["mock", "full"])
def test_nothing_but_the_protocols_bytes_leaves_a_client(protocol: str) -> None:
    stage = Stage(N, rule=TwoPasses()) if protocol == "full" else Stage(N, Mock(), "mock", rule=TwoPasses())
    ear = heard(stage)
    assert len(ear.heard) == N * (8 if protocol == "full" else 2)
    for _, kind, parcel in ear.heard:
        assert kind in ("query.secure", "train.secure")
        assert (parcel.kind, dict(parcel.facts), list(parcel.tensors)) == ("secured", {}, ["message"])
        assert (parcel.tensors["message"].dtype, parcel.tensors["message"].ndim) == (np.uint8, 1)


def test_the_protocols_bytes_have_the_sizes_that_follow_from_the_cohort_alone() -> None:
    """Whatever a client's data, rank and training: so sizes tell nothing of it."""
    ranks = {c: (1, 2, RANK)[c % 3] for c in range(N)}
    ear = heard(Stage(N, ranks=ranks))
    sizes: dict[Kind, set[int]] = {}
    for _, _, parcel in ear.heard:
        message = parcel.tensors["message"].tobytes()
        sizes.setdefault(Envelope.open(message).kind, set()).add(len(message))
    assert {kind: len(x) for kind, x in sizes.items()} == dict.fromkeys(sizes, 1)
    assert sizes.keys() == {Kind.KEYS, Kind.SHARES, Kind.VECTOR, Kind.SURVIVORS, Kind.UNMASK}


def test_masked_vectors_look_like_noise_byte_by_byte() -> None:
    """20 vectors of equal clients, each byte of a word by itself: chi-square of 255 degrees of freedom, below 400 but
    for one time in 10^8."""
    ear = heard(Stage(N))
    bytes_ = []
    for _, _, parcel in ear.heard:
        envelope = Envelope.open(parcel.tensors["message"].tobytes())
        if envelope.kind == Kind.VECTOR:
            bytes_.append(np.frombuffer(envelope.body[64:], np.uint8).reshape(-1, 4))
    words = np.concatenate(bytes_)
    assert len(words) > 20 * 32
    for column in words.T:
        seen = np.bincount(column, minlength=256)
        assert ((seen - len(column) / 256) ** 2).sum() / (len(column) / 256) < 400


def test_no_loss_count_or_weight_is_in_the_clear() -> None:
    """As fp32, fp64 or text, in any message."""
    told: list[Metrics] = []

    class Telling(LinearTrainer):
        def _train(self, job):  # type: ignore[no-untyped-def]
            done = LinearTrainer._train(self, job)
            told.append(done.metrics)
            return done

    ear = heard(Stage(N, trainer=Telling()))
    assert len(told) == N
    for _, _, parcel in ear.heard:
        message = parcel.tensors["message"].tobytes()
        for x in told:
            for secret in (np.float32(x.loss).tobytes(), np.float64(x.loss).tobytes(), repr(x.loss).encode()):
                assert secret not in message


def test_who_takes_part_says_who_it_is_and_nothing_of_its_examples() -> None:
    ear, stage = Ear(), Stage(3)
    grid = FaultyGrid(stage.grid._handler, list(stage.grid._nodes.values()))
    grid.change = ear  # type: ignore[assignment]
    fleet = muster(grid, stage.rule, "{}", 3, 10.0, True, stage.clock, stage.clock.sleep, identified=True)
    assert [fleet.registry.identity(c) for c in range(4)] == [identity(c).id for c in range(3)] + [None]
    assert [fleet.registry.counts(c) for c in range(3)] == [None] * 3
    assert [fleet.registry.knows(c) for c in range(4)] == [True, True, True, False]
    for client, _, parcel in ear.heard:
        assert set(parcel.facts) == CAPABILITIES
        assert (parcel.facts["examples"], parcel.facts["identity"]) == (None, identity(client).id.hex())


FAILURES: dict[str, dict[str, object]] = {
    "a broken trainer": {"trainer": LinearTrainer(raises=frozenset({2}))},
    "a trainer that gives up": {"trainer": LinearTrainer(fails=frozenset({2}))},
    "training that diverges": {"trainer": LinearTrainer(nan=frozenset({2}))},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_client_that_can_not_train_does_not_say_why(failure: str, caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage(7, **FAILURES[failure])  # type: ignore[arg-type]
    ear = heard(stage)
    errors = [(c, kind, dict(x.facts)) for c, kind, x in ear.heard if x.kind == "error"]
    assert errors == [(2, "train.secure", {"cause": "failed", "reason": "this client could not train"})]
    assert [m.partition(":")[0] for m in caplog.messages] == ["client 2 takes no part in round 0"]


def test_a_client_without_examples_does_not_say_so() -> None:
    stage = Stage(7)
    empty = replace(stage.here, examples=lambda c: replace(counts(c), train=0) if c == 2 else counts(c))
    ear = Ear()
    again = restaged(stage, empty)
    again.grid.change = ear  # type: ignore[assignment]
    got, _ = again.run()
    assert got.survivors == (0, 1, 3, 4, 5, 6)
    errors = [dict(x.facts) for _, _, x in ear.heard if x.kind == "error"]
    assert errors == [{"cause": "failed", "reason": "this client could not train"}]


def test_a_client_whose_disk_fails_does_not_say_more_than_that() -> None:
    stage = Stage(7)
    broken = replace(stage.here, examples=fails_for(2))
    again, ear = restaged(stage, broken), Ear()
    again.grid.change = ear  # type: ignore[assignment]
    again.run()
    errors = [dict(x.facts) for _, _, x in ear.heard if x.kind == "error"]
    assert errors == [{"cause": "failed", "reason": "this client could not answer"}]


def fails_for(client: int):  # type: ignore[no-untyped-def]
    def examples(c: int):  # type: ignore[no-untyped-def]
        if c == client:
            raise OSError("mine.jsonl: 12 rows, and a broken disk")
        return counts(c)

    return examples


def restaged(stage: Stage, here: object) -> Stage:
    """The same run with another participant."""
    stage.here = here  # type: ignore[assignment]
    stage.grid._handler = in_process(lambda settings, config: here, stage.clients)._handler  # type: ignore[arg-type,return-value]
    return stage


def test_clients_of_a_secure_run_answer_nothing_in_the_clear() -> None:
    stage, ear = Stage(5), Ear()
    stage.grid.change = ear  # type: ignore[assignment]
    round = SumRound(first_state(), dict.fromkeys(range(5), RANK), 1, rule=stage.rule)
    drive(stage.fleet, round, 30.0)
    assert Counter(x.kind for _, _, x in ear.heard) == {"error": 5}
    assert all("this client's run is secure" in why for _, why in round.refused)
    assert stage.trainer.seen == []
    ear.heard.clear()
    ranks = dict.fromkeys(range(5), RANK)
    parts: dict[int, Iterable[str]] = {0: ("train",), 1: ("validation",), 2: ("test",), 3: ("test", "central")}
    got = evaluate(stage.fleet, first_state(), ranks, parts, 30.0)  # type: ignore[arg-type]
    assert got.answers == {}
    assert all("this client's run is secure" in why for _, why in got.refused)
    central = evaluate(stage.fleet, first_state(), ranks, {4: ("central",)}, 30.0)
    assert list(central.answers) == [4]  # of everybody's rows, by everybody's adapter


def test_a_client_that_was_told_of_no_secure_run_gives_a_secure_round_nothing() -> None:
    stage = Stage(5)
    plain = restaged(stage, replace(stage.here, secure=None))
    round = plain.round()
    drive_secure(plain.fleet, round, 30.0, 7.0)
    assert round.is_over
    assert all("has no identity for secure aggregation" in why for _, why in round.refused)
    assert stage.trainer.seen == []
