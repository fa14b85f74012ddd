"""What the benchmark of secure aggregation times is a whole session with an exact sum, and counts are counts."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedpeft.secagg import finish
from fedpeft.secagg.full import Full

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "sessions", raising=False)
    return importlib.import_module("sessions")


def test_a_timed_session_takes_off_each_survivors_mask_and_those_with_the_lost(sessions):
    before = (finish.combine, finish.add_masks)
    row = sessions.session(sessions.Case(Full(), 9, 33, 2, m=24, bits=12))
    assert (row["clients"], row["neighbours"], row["threshold"], row["lost"]) == (9, 8, 7, 2)
    assert row["masks taken off"] == 7 + 2 * 7
    assert row["its bytes up"] * 9 > 7 * (33 * 3 + 64)  # seven masked vectors with a signature, and all else
    assert all(value > 0 for value in row.values())
    assert (finish.combine, finish.add_masks) == before


def test_the_cases_that_are_reported_can_be_run(sessions):
    for case in sessions.CASES.values():
        threshold = case.protocol.threshold(case.clients)
        assert threshold <= case.clients - case.lost
        assert case.clients * (2 ** (case.bits - 1) - 1) < 2 ** (case.m - 1)
