"""Rounds in virtual time, over the real messages: who arrives when, who is trained, and what a replay gives."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import same
from fedpeft.errors import ProtocolError
from fedpeft.flower import Fleet, Flow, VirtualGrid, drive, evaluate, in_process, muster
from fedpeft.flower.inprocess import Alike
from fedpeft.rounds import Buffer, Buffered, Device, Population, SumRound, Visit
from fedpeft.rules import FactorMean, ServerState
from tests.flower.grids import first_state
from tests.flower.linear import RANK, LinearTrainer, participant

N = 6
FAST = "1000Gbit/s"  # so that bytes take no time worth counting


def devices(speeds: Mapping[int, float], **options: object) -> Population:
    """Client c trains on 100 tokens at ``speeds[c]`` a second, and is reached at once."""
    kinds = tuple(Device(tokens_per_second=s, up=FAST, down=FAST, latency=0.0, **options) for s in speeds.values())
    names = tuple(str(c) for c in speeds)
    return Population(names, kinds, np.arange(len(speeds)), tuple(speeds.values()), seed=3)


def fleet_of(
    population: Population, trainer: LinearTrainer | None = None, problem: int = -1, batch: int | None = None
) -> tuple[Fleet, VirtualGrid, list[list[int]]]:
    """The fleet, its grid, and the clients of each call of the handler with messages to train."""
    someone = participant(trainer)
    like = in_process(lambda settings, config: someone, N)
    calls: list[list[int]] = []

    def handler(messages, nodes):
        if messages[0].metadata.message_type == "train":
            calls.append([m.metadata.dst_node_id - 1 for m in messages])
        return like._handler(messages, nodes)

    def errand(client: int, round: int, pass_: int) -> tuple[float, float, str]:
        return 100.0, 1000.0, "out of memory" if client == problem else ""

    clients = len(population.kinds)
    grid = VirtualGrid(handler, Alike({}, clients), population, errand, batch)
    fleet = muster(grid, FactorMean(), "{}", clients, 10.0, clock=grid.clock, sleep=grid.sleep)
    assert grid.clock() == 0.0  # to ask what nodes can do takes no time
    return fleet, grid, calls


def a_round(fleet: Fleet, deadline: float, enough: int | None = None, state: ServerState | None = None) -> SumRound:
    clients = range(fleet.known)
    state = state or first_state()
    round = SumRound(state, dict.fromkeys(clients, RANK), 1, rule=FactorMean(), enough=enough)
    drive(fleet, round, deadline)
    return round


def about(x: float) -> object:
    return pytest.approx(x, abs=1e-3)  # the bytes that are sent take microseconds


def test_a_deadline_drops_exactly_those_who_are_late_and_they_are_not_trained() -> None:
    trainer = LinearTrainer()
    fleet, grid, calls = fleet_of(devices({0: 10, 1: 50, 2: 5, 3: 20, 4: 1, 5: 25}), trainer)
    round = a_round(fleet, deadline=10.5)  # they take 10, 2, 20, 5, 100, 4 seconds
    assert round.result().survivors == (0, 1, 3, 5)
    assert round.refused == [(c, "no answer before the deadline") for c in (2, 4)]
    assert grid.clock() == about(10.5)
    assert calls == [[1, 5, 3, 0]]  # together, in the order of arrival
    ended = {v.client: (v.ended, v.fate) for v in grid.take_visits()}
    assert ended == {
        0: (about(10), "done"),
        1: (about(2), "done"),
        2: (about(20), "late"),
        3: (about(5), "done"),
        4: (about(100), "late"),
        5: (about(4), "done"),
    }


def test_a_round_that_everybody_finishes_ends_with_the_last() -> None:
    fleet, grid, _ = fleet_of(devices({0: 10, 1: 50, 2: 5}))
    traffic = drive(fleet, round := SumRound(first_state(), dict.fromkeys(range(3), 9), 1, rule=FactorMean()), 1e6)
    assert round.result().survivors == (0, 1, 2)
    assert grid.clock() == about(20)
    assert traffic.timeline == ((1, 0.0, about(2)), (0, 0.0, about(10)), (2, 0.0, about(20)))


def test_a_round_closes_with_the_answers_that_suffice() -> None:
    trainer = LinearTrainer()
    fleet, grid, calls = fleet_of(devices({0: 10, 1: 50, 2: 5, 3: 20}), trainer, batch=1)
    assert a_round(fleet, 1e6, enough=2).result().survivors == (1, 3)
    assert grid.clock() == about(5)
    assert calls == [[1], [3]]  # one at a time, so that nobody is trained for nothing


def test_a_straggler_goes_on_and_is_late_again() -> None:
    fleet, grid, _ = fleet_of(devices({0: 10, 1: 50, 2: 4}))
    first = a_round(fleet, 12.0)
    assert first.result().survivors == (0, 1)
    second = a_round(fleet, 12.0, state=first.result().state)  # client 2 is busy until 25, which is after 24
    assert second.result().survivors == (0, 1)
    assert grid.clock() == about(24)
    third = a_round(fleet, 12.0, state=second.result().state)  # free at 25: 25 more seconds are too many
    assert third.result().survivors == (0, 1)
    mine = [(v.asked, v.began, v.ended, v.fate) for v in grid.take_visits() if v.client == 2]
    assert mine == [
        (0.0, 0.0, about(25), "late"),
        (about(12), about(24), about(24), "away"),
        (about(24), about(25), about(50), "late"),
    ]


def test_who_goes_away_in_the_middle_loses_its_work_and_answers_again_when_it_is_back() -> None:
    hours = ((0.0, 15 / 3600), (30 / 3600, 60 / 3600))
    population = devices({0: 50, 1: 5}, online_hours=hours)
    fleet, grid, calls = fleet_of(population)
    first = a_round(fleet, 28.0)
    assert first.result().survivors == (0,)
    assert calls == [[0]]
    second = a_round(fleet, 28.0, state=first.result().state)  # at 28 both are away until 30
    assert second.result().survivors == (0, 1)
    assert grid.clock() == about(50)
    assert [(v.client, v.began, v.ended, v.fate) for v in grid.take_visits()] == [
        (0, 0.0, about(2), "done"),
        (1, 0.0, about(15), "lost"),
        (0, about(30), about(32), "done"),
        (1, about(30), about(50), "done"),
    ]


def test_a_device_with_too_little_memory_says_so_and_is_not_trained() -> None:
    trainer = LinearTrainer()
    fleet, grid, _ = fleet_of(devices({0: 10, 1: 50}), trainer, problem=1)
    round = a_round(fleet, 60.0)
    assert round.refused == [(1, "out of memory")]
    assert (trainer.seen, grid.clock()) == ([0], about(10))


def test_the_adapter_is_the_one_of_a_round_in_real_time() -> None:
    fleet, _, _ = fleet_of(devices({0: 10, 1: 50, 2: 5}))
    plain = muster(in_process(lambda settings, config: participant(), 3), FactorMean(), "{}", 3, 10.0)
    left = a_round(fleet, 100.0).result().state.adapter
    right = a_round(plain, 100.0).result().state.adapter
    for name, x in right.tensors().items():  # fp64 sums in another order, stored in fp32
        np.testing.assert_allclose(left.tensors()[name], x, rtol=1e-6, atol=1e-7)


def test_evaluation_takes_no_time_even_while_others_are_at_work() -> None:
    fleet, grid, calls = fleet_of(devices({0: 10, 1: 50, 2: 5, 3: 20, 4: 1, 5: 25}))
    flow = flow_of(fleet, buffer=2, concurrency=4)
    flow.fill()
    flow.buffer.step()
    now, done = grid.clock(), len(calls)
    got = evaluate(fleet, flow.buffer.state, dict.fromkeys(range(6), RANK), {c: ["test"] for c in range(6)}, 5.0)
    assert sorted(got.answers) == list(range(6))
    assert (grid.clock(), len(calls)) == (now, done)
    flow.fill()  # and those at work go on
    assert flow.buffer.step().state.task.round == 2


def flow_of(fleet: Fleet, deadline: float = 1000.0, seed: int = 3, **terms: int) -> Flow:
    buffer = Buffer(first_state(), FactorMean(), Buffered(**terms), rank=lambda client, round: RANK)
    return Flow(fleet, buffer, seed, deadline)


def steps(flow: Flow, count: int) -> list[tuple[float, tuple[int, ...], tuple[int, ...]]]:
    told = []
    for _ in range(count):
        flow.fill()
        outcome = flow.buffer.step()
        told.append((flow.fleet.clock(), outcome.survivors, outcome.staleness))
    return told


def test_a_buffered_schedule_by_hand() -> None:
    # All three are always asked. Client 0 takes 2 s, client 1 takes 5 s, client 2 takes 11 s; a step takes two answers.
    fleet, grid, _ = fleet_of(devices({0: 50, 1: 20, 2: 100 / 11}))
    flow = flow_of(fleet, buffer=2, concurrency=3)
    # 2: client 0 answers, and waits, since it would compute the same again. 5: client 1 answers: step 1, both begin.
    # 7: client 0 answers. 10: client 1 answers: step 2, both begin. 11: client 2's answer of round 0 comes, and it
    # begins again. 12: client 0 answers: step 3.
    told = steps(flow, 3)
    assert told == [
        (about(5), (0, 1), (0, 0)),
        (about(10), (0, 1), (0, 0)),
        (about(12), (0, 2), (0, 2)),
    ]
    assert dict(flow.buffer.at_work) == {1: 2, 2: 2}
    asked = [(v.client, v.asked) for v in grid.take_visits()]
    assert asked[:3] == [(0, 0.0), (1, 0.0), (2, 0.0)]
    assert sorted(asked[3:5]) == [(0, about(5)), (1, about(5))]
    assert asked[7:] == [(2, about(11))]


def test_clients_whose_answers_are_due_are_trained_together() -> None:
    trainer = LinearTrainer()
    fleet, _, calls = fleet_of(devices({0: 50, 1: 20, 2: 10, 3: 5}), trainer)
    flow = flow_of(fleet, buffer=3, concurrency=4)
    flow.fill()
    assert calls == [[0, 1, 2, 3]]


def test_who_is_lost_or_too_slow_holds_a_place_until_the_deadline_and_stops_nothing() -> None:
    fleet, grid, _ = fleet_of(devices({0: 50, 1: 25, 2: 100 / 90}, online_hours=((0, 1),)))
    flow = flow_of(fleet, buffer=2, concurrency=3, deadline=30.0)
    flow.fill()
    flow.buffer.step()
    while grid.clock() < 30:
        flow.fill()
        refused = flow.buffer.step().refused
    assert (2, "no answer before the deadline") in refused
    assert next(v.fate for v in grid.take_visits() if v.client == 2) == "late"


def test_clients_that_fail_or_diverge_or_are_not_there_do_not_stop_the_flow() -> None:
    trainer = LinearTrainer(fails=frozenset({0}), nan=frozenset({1}), raises=frozenset({2}))
    fleet, _, _ = fleet_of(devices({0: 50, 1: 20, 2: 10, 3: 5, 4: 4, 5: 3}), trainer)
    flow = flow_of(fleet, buffer=2, concurrency=5)
    for _ in range(3):
        flow.fill()
        outcome = flow.buffer.step()
        assert set(outcome.survivors) <= {3, 4, 5}
        assert all(np.isfinite(x).all() for x in outcome.state.adapter.tensors().values())
        assert {c for c, _ in outcome.refused} <= {0, 1, 2}


def test_a_flow_with_nobody_left_to_ask_ends_and_says_so() -> None:
    fleet, _, _ = fleet_of(devices({0: 50, 1: 20, 2: 10}), LinearTrainer(fails=frozenset({0, 1, 2})))
    flow = flow_of(fleet, buffer=2, concurrency=2)
    flow.fill()
    with pytest.raises(ProtocolError, match="too few answers: got 0; want 2"):
        flow.buffer.step()
    assert sorted(flow.buffer.take_refused()) == [(c, "out of memory") for c in range(3)]


def test_a_buffer_of_all_is_the_synchronous_run() -> None:
    speeds = dict.fromkeys(range(5), 10.0)
    fleet, grid, _ = fleet_of(devices(speeds))
    flow = flow_of(fleet, buffer=5, concurrency=5)
    told = steps(flow, 3)
    other, other_grid, _ = fleet_of(devices(speeds))
    state = first_state()
    for _ in range(3):
        state = a_round(other, 1000.0, state=state).result().state
    assert same(flow.buffer.state.adapter, state.adapter)
    assert grid.clock() == other_grid.clock() == told[-1][0]


def jittery(seed: int) -> Population:
    return replace(devices({0: 50, 1: 20, 2: 10, 3: 5, 4: 40, 5: 30}, jitter=0.5), seed=seed)


def replay(seed: int, count: int) -> tuple[object, tuple[Visit, ...], Flow, VirtualGrid]:
    fleet, grid, _ = fleet_of(jittery(seed))
    flow = flow_of(fleet, buffer=2, concurrency=4, seed=seed)
    told = steps(flow, count)
    return told, grid.take_visits(), flow, grid


def test_the_same_seed_gives_the_same_schedule_and_adapter_bit_for_bit() -> None:
    told, visits, flow, _ = replay(1, 6)
    again, same_visits, other, _ = replay(1, 6)
    assert (told, visits) == (again, same_visits)
    assert same(flow.buffer.state.adapter, other.buffer.state.adapter)
    assert replay(2, 6)[1] != visits


def test_a_flow_that_is_taken_up_again_goes_on_as_if_it_had_not_been_cut_off() -> None:
    told, visits, flow, _ = replay(1, 6)
    first, early, half, grid = replay(1, 3)
    assert first == told[:3]
    now, free = grid.time
    at_work = [(c, r, *grid.begun(c)) for c, r in half.buffer.at_work.items()]
    assert at_work
    assert any(r < 3 for _, r, _, _ in at_work)  # on older adapters too
    past = [first_state()]
    fresh, _, scratch = replay_states(1, 3)
    past += fresh
    fleet, new_grid, _ = fleet_of(jittery(1))
    rest = flow_of(fleet, buffer=2, concurrency=4, seed=1)
    rest.buffer.state = scratch
    rest.buffer.restore([(c, r) for c, r, _, _ in at_work], half.buffer.draws)
    new_grid.restore(now, free)
    for client, round, asked, was_free in at_work:
        with new_grid.as_of(client, asked, was_free):
            rest.again(client, past[round])
    new_grid.restore(now, free)
    assert steps(rest, 3) == told[3:]
    assert early + new_grid.take_visits() == visits
    assert same(rest.buffer.state.adapter, flow.buffer.state.adapter)


def replay_states(seed: int, count: int) -> tuple[list[ServerState], Flow, ServerState]:
    fleet, _, _ = fleet_of(jittery(seed))
    flow = flow_of(fleet, buffer=2, concurrency=4, seed=seed)
    states = []
    for _ in range(count):
        flow.fill()
        states.append(flow.buffer.step().state)
    return states, flow, states[-1]


def test_buffered_rounds_run_over_a_grid_in_real_time() -> None:
    fleet = muster(in_process(lambda settings, config: participant(), 5), FactorMean(), "{}", 5, 10.0)
    flow = flow_of(fleet, buffer=2, concurrency=4, deadline=60.0)
    told = steps(flow, 4)
    assert all(len(survivors) == 2 for _, survivors, _ in told)
    assert max(age for *_, ages in told for age in ages) >= 1
