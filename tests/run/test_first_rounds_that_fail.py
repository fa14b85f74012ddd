"""A rule that finds its directions in its first rounds can't go on without them: the run stops, and is resumed."""

import pytest

import fedpeft.run.coordinate as coordinate
from fedpeft.config import experiment
from fedpeft.errors import ProtocolError
from fedpeft.flower import Traffic
from fedpeft.report import history
from fedpeft.run import Lines, simulate

ROWS = "text,label\n" + "".join(f"{'apple pear' if i % 2 else 'hammer saw'} {i},{'ab'[i % 2]}\n" for i in range(48))


def settings(folder, rule, rounds):
    (folder / "rows.csv").write_text(ROWS, encoding="utf8")
    return {
        "rounds": rounds,
        "model": {"name": "tiny-bert"},
        "data": {"name": str(folder / "rows.csv")},
        "partition": {"name": "iid", "clients": 2},
        "adapter": {"rank": 2},
        "training": {"length": 8, "threads": 1},
        "evaluation": {"every": 9},
        "baselines": {"base": False},
        "rule": {"name": rule},
    }


@pytest.fixture
def silent(monkeypatch):
    """Rounds, counted from 0, in which nobody answers."""
    rounds, drive = set(), coordinate.drive

    def driving(fleet, round, *rest):
        if round.state.task.round not in rounds:
            return drive(fleet, round, *rest)
        while not round.is_over:
            round.close()
        return Traffic()

    monkeypatch.setattr(coordinate, "drive", driving)
    return rounds


@pytest.mark.parametrize("failed", [0, 1])
def test_a_run_of_fedsb_stops_where_one_of_its_first_rounds_fails_and_goes_on_with_it(tmp_path, silent, failed):
    found = experiment(settings(tmp_path, "fedsb", 3))
    silent.add(failed)
    message = rf"^round {failed + 1}: too few answers: got 0; .*\. fedsb finds its directions in the first 2 rounds"
    with pytest.raises(ProtocolError, match=message):
        simulate(found, tmp_path / "run", Lines())
    silent.clear()
    simulate(found, tmp_path / "run", Lines())
    assert [len(x.survivors) for x in history(tmp_path / "run").rounds] == [2, 2, 2]


@pytest.mark.parametrize(("rule", "failed"), [("fedsb", 2), ("ffa", 0)])
def test_any_other_round_can_be_left_out(tmp_path, silent, rule, failed):
    silent.add(failed)
    simulate(experiment(settings(tmp_path, rule, 4)), tmp_path / "run", Lines())
    answers = [len(x.survivors) for x in history(tmp_path / "run").rounds]
    assert answers == [0 if round == failed else 2 for round in range(4)]
