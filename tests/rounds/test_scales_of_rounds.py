"""What a secure round tells of how fine its grid may be, and the grids that clients and server work out alike."""

import numpy as np
import pytest

from fedpeft.channel import RingChannel, Seen
from fedpeft.rounds import grids
from tests.laws.cohorts import FEDIT
from tests.laws.secure import LARGEST, Heard, drive
from tests.laws.secure import machine as over_mock
from tests.rounds.scripted import CHANNEL, CLIENTS, PAIR, RANKS, STATE, TWO


def sizes(rule, pass_=0):
    return tuple(int(np.prod(shape)) for _, shape in rule.layout(STATE.task).shapes)


def test_a_round_tells_of_each_pass_how_large_its_mean_is_and_how_much_was_cut():
    heard = Heard(TWO)
    m = over_mock(heard, STATE, RANKS, RingChannel(range=2.0))
    drive(m, PAIR, {12: 1})
    assert [x.clients for x in m.seen] == [5, 4]
    assert [x.grid for x in m.seen] == list(m.grid)
    assert sum(x.cut for x in m.seen) == m.saturated > 0
    for seen, mean, lost in zip(m.seen, heard.means, ((), (12,)), strict=True):
        weight = sum(w for c, (_, w) in PAIR.items() if c not in lost)
        flat = np.concatenate([x.ravel() for x in mean.values()])
        assert seen.peaks == pytest.approx(Seen.of(seen.grid, flat, weight, seen.clients, 0).peaks, rel=1e-12)
        assert seen.grid.leaves == tuple(x.size for x in mean.values())


def test_halvings_are_of_the_tensors_of_each_pass():
    layouts = [x.leaves for x in grids(TWO, CHANNEL, STATE.task, 5, LARGEST)]
    assert len(layouts) == 2
    assert all(layouts)
    halvings = tuple(tuple(range(i, i + len(x))) for i, x in enumerate(layouts))
    found = grids(TWO, CHANNEL, STATE.task, 5, LARGEST, halvings=halvings)
    assert tuple(x.halvings for x in found) == halvings
    assert [x.leaves for x in found] == layouts
    assert [(x.size, x.length) for x in found] == [
        (x.size, x.length) for x in grids(TWO, CHANNEL, STATE.task, 5, LARGEST)
    ]
    assert {x.halvings for x in grids(FEDIT, CHANNEL, STATE.task, 5, LARGEST)} == {(0,) * len(sizes(FEDIT))}
    one = RingChannel(range=64.0, scales="one")
    assert [(x.leaves, x.halvings) for x in grids(TWO, one, STATE.task, 5, LARGEST)] == [((), ())] * 2


@pytest.mark.parametrize("halvings", [((0,),), ((), (), ())])
def test_halvings_of_more_or_fewer_passes_are_refused(halvings):
    with pytest.raises(ValueError, match=rf"^halvings: got those of {len(halvings)} passes; want 2, or none$"):
        grids(TWO, CHANNEL, STATE.task, 5, LARGEST, halvings=halvings)


def test_halvings_that_are_not_one_for_each_tensor_are_refused():
    with pytest.raises(ValueError, match=r"^halvings: got 2 for \d leaves; want one for each"):
        grids(FEDIT, CHANNEL, STATE.task, 5, LARGEST, halvings=((1, 2),))


def test_finer_scales_bring_a_round_closer_to_the_mean_of_its_clients():
    """In a ring of 16 bits, whose steps are coarse."""
    channel, off = RingChannel(range=64.0, modulus=16), []
    layout = FEDIT.layout(STATE.task)
    total = sum(w for _, w in CLIENTS.values())
    want = sum(w / total * layout.flatten(FEDIT.encode(u, STATE.task)) for u, w in CLIENTS.values())
    for halvings in ((), ((4,) * len(layout.shapes),)):
        heard = Heard(FEDIT)
        m = over_mock(heard, STATE, RANKS, channel, halvings=halvings)
        drive(m, CLIENTS)
        assert m.saturated == 0
        off.append(np.abs(layout.flatten(heard.means[0]) - want).max())
        assert off[-1] <= max(m.grid[0].errors(len(CLIENTS), total))
    assert off[1] < off[0] / 8  # 16 times finer
