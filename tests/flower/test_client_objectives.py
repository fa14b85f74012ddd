"""Rules with a half on the client: what it keeps by them between rounds, and after a run that was cut off."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest

from fedpeft.adapters import same
from fedpeft.flower import ClientStore, Participant, drive, evaluate
from fedpeft.flower.store import State
from fedpeft.report.checkpoint import decode, encode
from fedpeft.rounds import Done, Job, Outcome, SumRound
from fedpeft.rules import FactorMean, HetLoRA, MeanRule, Scaffold, ServerState, Uniform, personal
from tests.flower.grids import first_state, gathered
from tests.flower.linear import RANK, STEPS, LinearTrainer, data, measure, participant, step

LR = 0.01
CLIENTS = 4


@dataclass(frozen=True, slots=True)
class Obedient(LinearTrainer):
    """Adds the objective's shift to its gradients, and says how far it went; client 2 lets tails shrink, if asked."""

    shrinks: bool = False

    def _train(self, job: Job) -> Done:
        x, y = data(job.client, "train")
        now, shift = job.start, job.objective.shift
        for _ in range(STEPS):
            change = {n: -LR * v for n, v in shift.items()}
            now = step(now, job.trains, job.tail, x, y).moved(change)
        if self.shrinks and job.client == 2:
            cut = job.objective.cuts.get("q", 99)
            b = now.layers["q"].b.copy()
            b[:, cut:] = job.start.layers["q"].b[:, cut:] / 2
            now = now.put({"q/b": b})
        return Done(now, measure(now, job.tail, x, y), {}, STEPS * LR)


def serving(rule: MeanRule, trainer: LinearTrainer, store: ClientStore) -> Participant:
    return replace(participant(trainer, rule, store), weighting=Uniform())


def go(
    who: Participant, rule: MeanRule, state: ServerState, chosen: Iterable[int], ranks: Mapping[int, int] | None = None
) -> Outcome:
    fleet, _, _ = gathered(who, CLIENTS, rule)
    round = SumRound(state, ranks or dict.fromkeys(chosen, RANK), 1, rule=rule, clients=CLIENTS)
    drive(fleet, round, 30.0)
    return round.result()


def kept(store: ClientStore, client: int) -> State:
    state = store.load(client, 10**6)
    return {} if state is None else {n.removeprefix("rule/"): x for n, x in state.items() if n.startswith("rule/")}


COHORTS = [(0, 1, 2), (1, 3), (0, 1, 2, 3), (2, 0)]


def test_the_servers_variate_is_the_mean_of_those_that_clients_keep() -> None:
    rule, store, state = Scaffold(), ClientStore(), first_state()
    for chosen in COHORTS:
        outcome = go(serving(rule, Obedient(), store), rule, state, chosen)
        assert outcome.refused == ()
        assert outcome.survivors == tuple(sorted(chosen))
        state = outcome.state
        assert state.share == len(chosen) / CLIENTS
        for name, c in state.memory.items():
            mean = sum(kept(store, i).get(name, np.zeros_like(c)) for i in range(CLIENTS)) / CLIENTS
            np.testing.assert_allclose(c, mean, atol=1e-5)  # of numbers near 10, in fp32, added up in four rounds
    assert set(state.memory) == {"control/q/a", "control/q/b", "control/bias"}
    assert all(np.abs(c).max() > 0.01 for c in state.memory.values())


def test_corrections_reach_the_trainer() -> None:
    rule, store = Scaffold(), ClientStore()
    state = go(serving(rule, Obedient(), store), rule, first_state(), (0, 1)).state
    seen: list[Job] = []

    class Spy(LinearTrainer):
        def _train(self, job: Job) -> Done:
            seen.append(job)
            return Obedient()._train(job)

    go(serving(rule, Spy(), store), rule, state, (1, 3))
    for job, own in zip(seen, (kept(store, 1), {}), strict=True):
        assert job.kept == {}
        past = store.at(job.client, 0) or {}
        for name in ("q/a", "q/b", "bias"):
            key = f"control/{name}"
            want = state.memory[key].astype(np.float64) - past.get(f"rule/{key}", 0.0)
            np.testing.assert_array_equal(job.objective.shift[name], want)
        assert bool(past) is bool(own)


@pytest.mark.parametrize(
    "rule", [Scaffold(), Scaffold("rolora"), HetLoRA(0.7), personal(Scaffold(), ("bias",))], ids=repr
)
def test_a_run_that_was_cut_off_within_a_round_ends_in_the_same_bits(rule: MeanRule, tmp_path) -> None:
    whole, broken = ClientStore(tmp_path / "whole"), ClientStore(tmp_path / "broken")
    state = first_state()
    for chosen in COHORTS:
        state = go(serving(rule, Obedient(shrinks=True), whole), rule, state, chosen).state
    again = first_state()
    for chosen in COHORTS[:2]:
        again = go(serving(rule, Obedient(shrinks=True), broken), rule, again, chosen).state
    checkpoint = encode(again, {})
    go(serving(rule, Obedient(shrinks=True), broken), rule, again, COHORTS[2])  # and the server forgets this
    again, _ = decode(checkpoint)
    store = ClientStore(tmp_path / "broken")
    for chosen in COHORTS[2:]:
        again = go(serving(rule, Obedient(shrinks=True), store), rule, again, chosen).state
    assert same(again.adapter, state.adapter)
    assert again.memory.keys() == state.memory.keys()
    assert all(np.array_equal(x, state.memory[n]) for n, x in again.memory.items())
    assert any(kept(whole, i) for i in range(CLIENTS))
    for client in range(CLIENTS):
        left, right = kept(whole, client), kept(store, client)
        assert left.keys() == right.keys()
        assert all(np.array_equal(x, right[n]) for n, x in left.items())


def test_a_trainer_that_does_not_say_how_far_it_went_is_refused() -> None:
    fleet, _, _ = gathered(participant(LinearTrainer(), Scaffold()), 2, Scaffold())
    round = SumRound(first_state(), dict.fromkeys(range(2), RANK), 1, rule=Scaffold())
    drive(fleet, round, 30.0)
    assert len(round.refused) == 2
    assert "SCAFFOLD needs steps along gradients" in round.refused[0][1]


def test_a_client_that_cut_its_rank_begins_and_is_evaluated_with_that_one_ever_after() -> None:
    rule, store, state = HetLoRA(0.7), ClientStore(), first_state()
    ranks: list[tuple[int, int]] = []

    class Watched(LinearTrainer):
        def _train(self, job: Job) -> Done:
            ranks.append((job.client, job.start.layers["q"].rank))
            return Obedient(shrinks=True)._train(job)

        def evaluate_many(self, trials):
            trials = list(trials)
            ranks.extend((-1 if x.client is None else x.client, x.adapter.layers["q"].rank) for x in trials)
            return LinearTrainer.evaluate_many(self, trials)

    who = serving(rule, Watched(), store)
    assert RANK == 3
    for want in ([(1, 3), (2, 3)], [(1, 3), (2, 2)], [(1, 3), (2, 1)], [(1, 3), (2, 1)]):
        ranks.clear()
        state = go(who, rule, state, (1, 2)).state
        assert ranks == want
    ranks.clear()
    fleet, _, _ = gathered(who, CLIENTS, rule)
    evaluate(fleet, state, {1: RANK, 2: RANK}, {1: ["validation", "central"], 2: ["validation"]}, 30.0)
    assert sorted(ranks) == [(-1, 3), (1, 3), (2, 1)]
    assert kept(store, 2)["q/rank"] == 1.0
    go(who, rule, state, (1, 2), {1: 2, 2: 2})
    assert ranks[-2:] == [(1, 2), (2, 1)], "one that the server gives a lower rank has the lower of the two"


def test_a_round_at_a_lower_rank_takes_nothing_of_what_a_client_keeps_of_its_own() -> None:
    rule, store, state = FactorMean(("a",), personalised=True), ClientStore(), first_state()
    who, b = serving(rule, LinearTrainer(), store), []
    for rank in (RANK, 1, RANK):
        state = go(who, rule, state, (0, 1), {0: rank, 1: RANK}).state
        b.append((store.load(0, 10**6) or {})["personal/q/b"])
    np.testing.assert_array_equal(b[1][:, 1:], b[0][:, 1:])
    assert b[0].shape == b[1].shape == b[2].shape
    assert all(np.abs(after - before).max(axis=0)[0] > 0 for before, after in pairwise(b))
    assert (np.abs(b[2] - b[1]).max(axis=0) > 0).all()


def test_a_rule_without_a_clients_half_keeps_nothing() -> None:
    store = ClientStore()
    go(serving(FactorMean(), Obedient(), store), FactorMean(), first_state(), (0, 1))
    assert store.load(0, 10**6) is None
