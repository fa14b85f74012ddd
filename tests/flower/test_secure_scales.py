"""Scales of a session: all clients take those that they have agreed to, and refuse what are none."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fedpeft.channel import RingChannel, Scales
from fedpeft.flower import Terms, drive_secure
from fedpeft.rounds import Outcome, SecureRound
from fedpeft.rules import FactorMean, MeanRule
from fedpeft.secagg import Full, TwoServer
from fedpeft.secagg.protocol import Protocol
from tests.flower.covert import DEADLINE, LARGEST, PATIENCE, RUN, Stage
from tests.flower.grids import first_state
from tests.flower.test_drive_rounds import TwoPasses
from tests.flower.test_secure_rounds import plain
from tests.flower.test_secure_two_servers import two_servers

N = 6
Halvings = tuple[tuple[int, ...], ...]


def lying(stage: Stage, halvings: Halvings) -> SecureRound:
    """A round whose coordinator tells clients of halvings that it couldn't make a grid of."""
    state, ranks = first_state(), {c: stage.rank(c) for c in range(N)}
    ids = {c: stage.ids[c] for c in ranks}
    terms = Terms(RUN, stage.suite, stage.rule, stage.channel, LARGEST, stage.fleet.base, settings="{}")
    params, grid = terms.proposal(stage.protocol, state, ranks, ids, bytes(range(16)))
    session = stage.protocol.server(replace(params, halvings=halvings), stage.roster)
    return SecureRound(state, ranks, ids, 1, grid, session, rule=stage.rule)


def away(got: Outcome, want: Outcome) -> float:
    """How far the largest number of an adapter is from another's."""
    after = want.state.adapter.tensors()
    return max(float(np.abs(x - after[n]).max()) for n, x in got.state.adapter.tensors().items())


@pytest.mark.parametrize("rule", [FactorMean(), TwoPasses()], ids=["one pass", "two passes"])
def test_clients_take_the_scales_that_all_have_agreed_to(rule: MeanRule) -> None:
    stage = Stage(N, rule=rule, channel=RingChannel(range=8.0, modulus=16))
    first = stage.round()
    coarse, _ = stage.run(first)
    halvings = tuple(Scales(x.grid.halvings).after(x).halvings for x in first.seen)
    assert [len(x) for x in halvings] == [len(x.leaves) for x in first.grid]
    again = Stage(N, rule=rule, channel=RingChannel(range=8.0, modulus=16))
    second = again.round(halvings=halvings)
    assert tuple(x.halvings for x in second.grid) == halvings
    fine, _ = again.run(second)
    assert second.saturated == 0
    want = plain(stage, range(N))
    least = min(halvings[-1])
    assert least >= 1
    assert away(fine, want) < away(coarse, want) / 2**least * 2  # rounding is by chance: to a factor of two


def test_with_two_servers_clients_take_them_too() -> None:
    stage, ask = two_servers()
    round = stage.round(halvings=((0, 2, 1),))
    drive_secure(stage.fleet, round, DEADLINE, PATIENCE, ask)
    assert round.saturated == 0
    assert away(round.result(), plain(stage, range(stage.clients))) < 1e-6


@pytest.mark.parametrize("protocol", [Full, TwoServer])
@pytest.mark.parametrize(
    ("channel", "halvings"),
    [
        (RingChannel(), ((0, 0),)),
        (RingChannel(), ((0, 0, 0, 0),)),
        (RingChannel(), ((0, 0, 0), (0, 0, 0))),
        (RingChannel(), ((0, 31, 0),)),
        (RingChannel(scales="one"), ((0, 0, 0),)),
    ],
    ids=["a tensor less", "a tensor more", "a pass more", "too fine", "of a channel with one scale"],
)
def test_a_coordinator_that_tells_of_scales_that_are_none_is_refused_before_anybody_trains(
    protocol: Callable[[], Protocol], channel: RingChannel, halvings: Halvings
) -> None:
    stage = Stage(N, protocol(), "full" if protocol is Full else "twoserver", channel=channel)
    round = lying(stage, halvings)
    drive_secure(stage.fleet, round, DEADLINE, PATIENCE, lambda question: b"")
    assert [(c, why.rpartition(": ")[2]) for c, why in sorted(round.refused)] == [(c, "scales") for c in range(N)]
    assert stage.trainer.seen == []


@pytest.mark.parametrize("halvings", [(), ((0, 30, 7),)])
def test_scales_within_bounds_are_agreed_to(halvings: Halvings) -> None:
    stage = Stage(N)
    round = lying(stage, halvings)
    drive_secure(stage.fleet, round, DEADLINE, PATIENCE)
    assert round.refused == []
    assert round.result().survivors == tuple(range(N))
