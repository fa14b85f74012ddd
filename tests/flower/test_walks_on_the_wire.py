"""Walks on the wire: moves go up and down, the start goes once, and the server replays what each client trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from re import escape
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import MOVES, Array, Update, flat, places, same, walk_of
from fedpeft.errors import ProtocolError
from fedpeft.flower import ClientStore
from fedpeft.flower.kept import recall, remember
from fedpeft.flower.packing import Parcel, pack, unpack
from fedpeft.flower.requests import constants_of, model_digest, pack_request, unpack_request
from fedpeft.report.checkpoint import decode, encode
from fedpeft.rounds import Done, Failed, Job, Metrics, Trial
from fedpeft.rules import FedKSeed, ServerState
from tests.flower import linear
from tests.flower.grids import first_state, gathered, one_round
from tests.flower.linear import participant

CLIENTS = (0, 1, 2)
RULE = FedKSeed(seed=3, size=50)
REPLAY = 1e-6
"""fp32 of numbers below 4, rounded once on each side."""


@dataclass(frozen=True, slots=True)
class Walker(linear.LinearTrainer):
    """The linear model's trainer, by forward passes alone; it notes what it was asked and what came of it."""

    done: list[tuple[Job, Done]] = field(default_factory=list)

    def train_many(self, jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        for job in jobs:
            found = self._walk(job)
            self.done.append((job, found))
            yield found

    def _walk(self, job: Job) -> Done:
        assert job.pool is not None
        x, y = linear.data(job.client, "train")
        place, now, moves = places(job.start.tensors()), flat(job.start.tensors()), np.zeros(job.pool.size)

        def loss(values: Array) -> float:
            tensors = {n: v.astype(np.float32) for n, v in place.unflatten(values).items()}
            return linear.measure(job.start.put(tensors), job.tail, x, y).mean_loss

        rng = np.random.default_rng(job.seed)
        for _ in range(8):
            j = int(rng.integers(job.pool.size))
            z = job.pool.direction(j, now.size)
            slope = (loss(now + 1e-3 * z) - loss(now - 1e-3 * z)) / 2e-3
            now, moves[j] = now - 0.003 * slope * z, moves[j] - 0.003 * slope
        trained = job.start.put({n: v.astype(np.float32) for n, v in place.unflatten(now).items()})
        return Done(trained, linear.measure(trained, job.tail, x, y), moves=moves)


def rounds(count: int, store: ClientStore | None = None) -> tuple[list[ServerState], list[Any], Walker]:
    walker = Walker()
    fleet, _, _ = gathered(participant(walker, RULE, store or ClientStore()), len(CLIENTS), RULE)
    states, costs = [first_state()], []
    for _ in range(count):
        outcome, traffic = one_round(fleet, CLIENTS, states[-1], RULE, dict.fromkeys(CLIENTS, linear.RANK))
        assert outcome.refused == ()
        states.append(outcome.state)
        costs.append(traffic)
    return states, costs, walker


def measured(now: ServerState) -> float:
    total = Metrics()
    for client in CLIENTS:
        [found] = linear.LinearTrainer().evaluate_many([Trial(client, "train", now.adapter, now.tail)])
        assert isinstance(found, Metrics)
        total += found
    return total.mean_loss


def test_clients_start_from_the_servers_adapter_to_the_bit_and_the_server_replays_what_they_trained() -> None:
    states, _, walker = rounds(4)
    assert len(walker.done) == 12
    for number, state in enumerate(states[:-1]):
        some = walker.done[3 * number : 3 * number + 3]
        for job, done in some:
            assert same(job.start, RULE.send(state, linear.RANK).adapter)
            assert job.pool == RULE.pool
            moved = RULE.pool.moved(job.start.tensors(), done.moves.astype(np.float32))
            for n, x in done.trained.tensors().items():
                assert np.abs(moved[n] - x).max() <= REPLAY
        weights = np.array([linear.counts(c).train for c in CLIENTS], np.float64)
        mean = {
            n: sum(w * d.trained.tensors()[n].astype(np.float64) for w, (_, d) in zip(weights, some, strict=True))
            / weights.sum()
            for n in state.adapter.tensors()
        }
        for n, x in states[number + 1].adapter.tensors().items():
            np.testing.assert_allclose(x, mean[n], atol=2 * REPLAY)
    losses = [measured(x) for x in states]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_after_the_first_round_nothing_but_moves_travels() -> None:
    states, costs, _ = rounds(3)
    for state in states[1:]:
        sent = RULE.send(state, linear.RANK)
        parcel = unpack(pack_request("train", sent, "{}", "base", in_full=False), "train")
        assert {n: (x.shape, x.dtype) for n, x in parcel.tensors.items()} == {
            f"adapter/{MOVES}": ((50,), np.dtype(np.float32))
        }
    once = {"fixed/fixed", "fixed/walk/seed", *(f"fixed/walk/start/{n}" for n in first_state().adapter.tensors())}
    held = [constants_of(RULE.send(x, 1).adapter, frozenset()) for x in states]
    for x in held:
        assert set(x) == once
        assert all(np.array_equal(x[n], held[0][n]) for n in once)
    assert costs[0].bytes_down > costs[1].bytes_down
    assert max(costs[1].bytes_down, costs[2].bytes_down) < len(CLIENTS) * (4 * 50 + 700)  # the manifest and settings
    assert max(x.bytes_up for x in costs) < len(CLIENTS) * (4 * 50 + 500)


def test_a_request_means_what_was_sent_and_its_digest_is_of_what_travels() -> None:
    states, _, _ = rounds(2)
    sent = RULE.send(states[2], linear.RANK)
    content = pack_request("train", sent, "{}", "base")
    got = unpack_request(content, lambda digest: None)
    assert same(got.broadcast.adapter, sent.adapter)
    assert got.model == model_digest(sent) != model_digest(RULE.send(states[1], linear.RANK))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"adapter/{MOVES}": np.zeros(49, np.float32)}, "walk/moves does not fit the start that was sent: moves: got"),
        ({f"adapter/{MOVES}": np.zeros((5, 10), np.float32)}, "walk/moves does not fit the start that was sent"),
        ({"adapter/bias": np.zeros(5, np.float32)}, "walk/moves came with 'bias'; want the one or the other"),
        ({f"tail/{MOVES}": np.zeros(50, np.float32)}, "the message has tensors that are not wanted"),
    ],
)
def test_moves_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    parcel = unpack(pack_request("train", RULE.send(first_state(), 3), "{}", "base"), "train")
    bad = pack(Parcel("train", parcel.facts, {**parcel.tensors, **change}))
    with pytest.raises(ProtocolError, match=escape(message)):
        unpack_request(bad, lambda digest: None)


def test_moves_without_a_start_are_refused() -> None:
    now = first_state()
    plain = pack_request("train", replace(RULE.send(now, 3), adapter=now.adapter), "{}", "base")
    parcel = unpack(plain, "train")
    tensors = {n: x for n, x in parcel.tensors.items() if not n.startswith("adapter/")}
    bad = pack(Parcel("train", parcel.facts, {**tensors, f"adapter/{MOVES}": np.zeros(50, np.float32)}))
    with pytest.raises(ProtocolError, match=escape("walk/moves does not fit the start that was sent: 'walk/seed'")):
        unpack_request(bad, lambda digest: None)


def test_what_a_client_keeps_of_a_walk_has_its_moves() -> None:
    _, _, walker = rounds(1)
    job, done = walker.done[0]
    update = Update(job.start, done.trained, 0.0, done.moves)
    found = recall(remember(update, done.metrics))
    assert found is not None
    np.testing.assert_array_equal(found[0].moves, done.moves)
    again = recall({n: x for n, x in remember(update, done.metrics).items() if n != "update/moves"})
    assert again is not None
    assert again[0].moves is None
    assert "update/moves" not in remember(replace(update, moves=None), done.metrics)


def test_a_checkpoint_has_the_start_and_the_moves() -> None:
    states, _, _ = rounds(1)
    held, _ = decode(encode(states[1], {}))
    assert same(held.adapter, states[1].adapter)
    moves = walk_of(held.adapter)
    assert moves is not None
    assert np.count_nonzero(moves) > 8
