"""Scales of a run under secure aggregation: each round's from the round before that summed the same tensors."""

from pathlib import Path

import pytest

from fedpeft.channel import RingChannel, Scales
from fedpeft.errors import ProtocolError
from fedpeft.flower.member import params_of
from fedpeft.rounds import SecureRound
from fedpeft.run.secure import rescaled, secrecy
from tests.laws.secure import drive
from tests.laws.secure import machine as over_mock
from tests.rounds.scripted import CHANNEL, PAIR, RANKS, STATE, TWO
from tests.run.secured import Wire, ended, rows, run_of

COARSE = {"modulus": 16}


def told(wire: Wire) -> list[tuple[tuple[int, ...], ...]]:
    """The halvings of each round, in order; all clients of a round are told the same."""
    found = [x for message in wire.asked if (x := params_of(message)) is not None]
    sessions = {x.session: x.halvings for x in found}
    assert all(sessions[x.session] == x.halvings for x in found)
    return list(sessions.values())


def test_a_run_halves_ranges_from_round_to_round_tensors_by_tensors(tmp_path: Path, monkeypatch) -> None:
    """RoLoRA's rounds train a and b in turn: the third goes on from the first, and the fourth from the second."""
    table = rows(tmp_path / "own.csv", (6, 7, 8, 9, 10))
    wire = Wire().tap(monkeypatch)
    found = run_of(table, rounds=4, rule={"name": "rolora"}, secagg={"name": "full"}, channel=COARSE)
    rounds = ended(found, tmp_path / "run").history.rounds
    first, second, third, fourth = told(wire)
    assert (first, second) == ((), ())
    for (halvings,) in (third, fourth):
        assert len(halvings) > 4
        assert max(halvings) == 4  # four at most in one round
    assert [x.secure.cut for x in rounds if x.secure is not None] == [0] * 4


@pytest.mark.parametrize(("channel", "is_scaled"), [(COARSE, True), (COARSE | {"scales": "one"}, False)])
def test_a_run_says_whether_its_grid_becomes_finer(tmp_path: Path, channel: dict[str, object], is_scaled: bool) -> None:
    found = run_of(rows(tmp_path / "own.csv", (6,) * 20), secagg={"name": "full"}, channel=channel)
    said = dict(secrecy(found, 20))["a number"]
    end = ", and finer for tensors of small changes after the first round" if is_scaled else ""
    assert said == "11 bits of a ring of 16, in steps of 0.0039 up to 4 (times weight / 15)" + end


def machine(channel: RingChannel = CHANNEL, **options: object) -> SecureRound:
    return over_mock(TWO, STATE, RANKS, channel, **options)


def test_after_a_round_of_two_passes_each_has_scales_of_its_own() -> None:
    m = machine(RingChannel(range=2.0**14, modulus=16))
    drive(m, PAIR)
    got = rescaled(m, ())
    assert got == tuple(Scales(x.grid.halvings).after(x) for x in m.seen)
    assert [len(x.halvings) for x in got] == [len(x.leaves) for x in m.grid]
    assert min(max(x.halvings) for x in got) > 0
    again = machine(RingChannel(range=2.0**14, modulus=16), halvings=tuple(x.halvings for x in got))
    drive(again, PAIR)
    had = tuple(Scales(x.halvings, 3) for x in got)
    assert rescaled(again, had) == tuple(x.after(seen) for x, seen in zip(had, again.seen, strict=True))


def test_after_a_round_that_failed_the_scales_are_those_that_it_had() -> None:
    m = machine(quorum=4)
    with pytest.raises(ProtocolError, match=r"^too few answers: got 3; want at least 4$"):
        drive(m, PAIR, {10: 1, 11: 1})
    assert len(m.seen) == 1
    had = tuple(Scales(x.halvings, 1) for x in m.grid)
    assert rescaled(m, had) == had
    assert rescaled(m, ()) == ()


def test_a_channel_of_one_scale_never_gets_another() -> None:
    m = machine(RingChannel(range=2.0**14, modulus=16, scales="one"))
    drive(m, PAIR)
    assert len(m.seen) == 2
    assert rescaled(m, ()) == ()
