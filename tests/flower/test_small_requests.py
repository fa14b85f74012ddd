"""Cores on the wire: they travel in place of factors, whose directions travel once, and a request means the same."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from re import escape
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, bases, same
from fedpeft.errors import ProtocolError
from fedpeft.flower import ClientStore
from fedpeft.flower.packing import Parcel, pack, payload_bytes, unpack
from fedpeft.flower.requests import constants_of, pack_request, unpack_request
from fedpeft.rounds import Done, Failed, Job, Metrics, Trial
from fedpeft.rules import Broadcast, FedSB, MeanRule, Ravan, ServerState, Task
from tests.flower import linear
from tests.flower.grids import first_state, gathered, one_round
from tests.flower.linear import participant

D, K, R, CLIENTS = 30, 20, 6, (0, 1, 2)
RAVAN = Ravan(seed=3, heads=3)
RULES: dict[str, MeanRule] = {"fedsb": FedSB(), "ravan": RAVAN}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def state() -> ServerState:
    rng = np.random.default_rng(0)
    layers = {
        n: LowRank(rng.normal(size=(R, K)).astype(np.float32), rng.normal(size=(D, R)).astype(np.float32), 2.0)
        for n in "qv"
    }
    first = Adapter(layers, {"bias": np.ones(3, np.float32)}, {"drawn": np.arange(5)})
    return ServerState(Task(first.spec, 4), first)


def request(sent: Broadcast, in_full: bool = True) -> Any:
    return pack_request("train", sent, "{}", "base", in_full=in_full)


def near(x: Mapping[str, LowRank], y: Mapping[str, LowRank]) -> None:
    assert x.keys() == y.keys()
    for name, layer in x.items():
        np.testing.assert_array_equal(layer.a, y[name].a)
        np.testing.assert_allclose(layer.b, y[name].b, atol=1e-5)  # fp32, of numbers below 20
        assert (layer.scale, layer.b.dtype) == (y[name].scale, y[name].b.dtype)


@each_rule
@pytest.mark.parametrize("rank", [1, 2, 4, 5, R])
def test_a_request_with_cores_means_what_was_sent(rule: MeanRule, rank: int) -> None:
    sent = rule.send(state(), rank)
    got = unpack_request(request(sent), lambda digest: None).broadcast
    near(got.adapter.layers, sent.adapter.layers)
    near(got.tail, sent.tail)
    assert {n: x.tobytes() for n, x in got.adapter.fixed.items()} == {
        n: x.tobytes() for n, x in sent.adapter.fixed.items()
    }
    np.testing.assert_array_equal(got.adapter.dense["bias"], sent.adapter.dense["bias"])


@each_rule
@pytest.mark.parametrize("rank", [2, 4, R])
def test_down_go_the_cores_the_leaves_and_which_directions_they_are_between(rule: MeanRule, rank: int) -> None:
    sent = rule.send(state(), rank)
    got = unpack(request(sent, in_full=False), "train").tensors
    want: dict[str, tuple[int, ...]] = {"adapter/bias": (3,)}
    for n in "qv":
        at = (rank // 2, 2) if rule is RAVAN else (1, rank)
        want |= {f"adapter/{n}/core": (at[0], at[1], at[1]), f"adapter/{n}/at": at}
        if rank < R:
            behind = (3 - rank // 2, 2) if rule is RAVAN else (1, R)
            want |= {f"tail/{n}/core": (behind[0], behind[1], behind[1]), f"tail/{n}/at": behind}
    assert {n: x.shape for n, x in got.items()} == want
    assert got["adapter/q/core"].dtype == np.float32


@each_rule
def test_what_travels_once_is_the_same_for_clients_of_every_rank_and_in_every_round(rule: MeanRule) -> None:
    now = state()
    found = [constants_of(rule.send(now, rank).adapter, frozenset()) for rank in (1, 4, R)]
    later = replace(now, adapter=rule.send(now, R).adapter, task=Task(now.task.spec, 9))
    found.append(constants_of(rule.send(later, 2).adapter, frozenset()))
    want = {"fixed/drawn", *(f"fixed/{n}/{side}" for n in "qv" for side in ("left", "right"))}
    for x in found:
        assert set(x) == want
        assert all(np.array_equal(x[n], found[0][n]) for n in want)


def test_a_tail_that_lies_elsewhere_travels_as_it_is() -> None:
    other = LowRank(np.ones((2, K), np.float32), np.ones((D, 2), np.float32), 0.5)
    sent = FedSB().send(replace(state(), tail={"q": other, "x": other}), 4)
    got = unpack_request(request(sent), lambda digest: None).broadcast
    assert set(got.tail) == {"q", "x", "v"}
    near(got.tail, sent.tail)
    names = unpack(request(sent), "train").tensors
    assert {"tail/q/a", "tail/q/b", "tail/x/a", "tail/v/core"} <= set(names)
    assert "tail/q/core" not in names


def test_an_adapter_of_plain_factors_travels_as_it_did() -> None:
    now = state()
    plain = Broadcast(now.task, now.adapter, {})
    names = unpack(request(plain), "train").tensors
    assert set(names) == {"adapter/q/a", "adapter/q/b", "adapter/v/a", "adapter/v/b", "adapter/bias", "fixed/drawn"}
    assert same(unpack_request(request(plain), lambda digest: None).broadcast.adapter, now.adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter/q/at": None}, "the message has one of q/core and q/at; want both or neither"),
        ({"adapter/q/core": None}, "the message has one of q/core and q/at; want both or neither"),
        (
            {"adapter/q/at": np.array([[0, 1, 2, 3, 4, R]])},
            "q/core does not fit the directions that were sent: at: got",
        ),
        (
            {"adapter/q/at": np.array([[0, 1, 2, 3, 4, -1]])},
            "q/core does not fit the directions that were sent: at: got",
        ),
        ({"adapter/q/at": np.array([[0, 1]])}, "q/core does not fit the directions that were sent: cores: got"),
        (
            {"adapter/q/core": np.ones((6, 6), np.float32)},
            "q/core does not fit the directions that were sent: cores: got",
        ),
        (
            {"adapter/q/at": np.array([[0, 1]]), "adapter/q/core": np.ones((1, 2, 2), np.float32)},
            "'q/a' is float32 (2, 20); want floating-point (6, 20)",
        ),
        ({"adapter/x/core": np.ones((1, 1, 1), np.float32)}, "the message has tensors that are not wanted"),
    ],
)
def test_cores_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    parcel = unpack(request(FedSB().send(state(), R)), "train")
    tensors = {n: x for n, x in {**parcel.tensors, **change}.items() if x is not None}
    bad = pack(Parcel("train", parcel.facts, tensors))
    with pytest.raises(ProtocolError, match=escape(message)):
        unpack_request(bad, lambda digest: None)


def test_cores_without_directions_are_refused() -> None:
    now = state()
    parcel = unpack(request(Broadcast(now.task, now.adapter, {})), "train")
    tensors = dict(parcel.tensors) | {
        "adapter/q/core": np.ones((1, 1, 1), np.float32),
        "adapter/q/at": np.zeros((1, 1), np.int64),
    }
    with pytest.raises(ProtocolError, match="q/core does not fit the directions that were sent"):
        unpack_request(pack(Parcel("train", parcel.facts, tensors)), lambda digest: None)


# ---- Whole rounds


class CoreTrainer(linear.LinearTrainer):
    """The linear model's trainer, of cores too: a step along the gradient of b, as far as the directions go."""

    def train_many(self, jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        for job in jobs:
            if job.trains in ("core", "heads"):
                yield self._cores(job)
            else:
                yield from super().train_many([job])

    def _cores(self, job: Job) -> Done:
        x, y = linear.data(job.client, "train")
        moved = linear.step(job.start, "b", job.tail, x, y)
        basis, b = bases(job.start)["q"], job.start.layers["q"].b
        change = basis.b(basis.cores(moved.layers["q"].b - b)).astype(np.float32)
        now = moved.put({"q/b": b + change})
        return Done(now, linear.measure(now, job.tail, x, y))


@each_rule
def test_the_directions_go_in_full_when_they_have_changed_and_then_by_their_digest(rule: MeanRule) -> None:
    rule = Ravan(seed=3, heads=3) if rule is RAVAN else rule
    fleet, _, _ = gathered(participant(CoreTrainer(), rule, ClientStore()), len(CLIENTS), rule)
    now, sizes, losses = first_state(), [], []
    ranks = dict(zip(CLIENTS, (3, 1, 3), strict=True))
    for _ in range(6):
        outcome, traffic = one_round(fleet, CLIENTS, now, rule, ranks)
        assert outcome.refused == ()
        now = outcome.state
        sizes.append(traffic.bytes_down)
        losses.append(measured(now))
    assert losses == sorted(losses, reverse=True)
    directions = 4 * 3 * (linear.D + linear.K)
    first = 0 if rule.trains(Task(now.task.spec, 0)) == "heads" else 2
    assert sizes[first] - sizes[first + 1] > len(CLIENTS) * directions
    assert max(sizes[first + 1 :]) - min(sizes[first + 1 :]) < 60  # the manifests' deflated text


def measured(now: ServerState) -> float:
    total = Metrics()
    for client in CLIENTS:
        [found] = CoreTrainer().evaluate_many([Trial(client, "train", now.adapter, now.tail)])
        assert isinstance(found, Metrics)
        total += found
    return total.mean_loss


def test_a_request_of_cores_is_small() -> None:
    sent = FedSB().send(state(), R)
    plain = Broadcast(sent.task, state().adapter, {})
    saved = payload_bytes(request(plain, in_full=False)) - payload_bytes(request(sent, in_full=False))
    assert saved > 0.9 * 2 * (4 * R * (D + K) - 4 * R * R - 8 * R)
