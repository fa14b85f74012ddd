"""What clients come to by training for themselves after a run: recorded, read again, told."""

import json
from pathlib import Path

import pytest

from fedpeft.report import FinalRecord, RunFolder, RunRecord, Score, Scores, compare, history, write_report
from fedpeft.report.side_by_side import as_csv, table
from fedpeft.report.summary import gains, standings, tuned
from fedpeft.terminal import headline

TEST = Scores(0.6, 0.7, {1: Score(0.6, 0.7), 2: Score(0.5, 0.9), 3: Score(0.4, 0.5), 5: Score(0.4, None)})
TUNED = Scores(0.5, 0.8, {1: Score(0.6, 0.8), 2: Score(0.5, 0.85), 3: Score(0.4, 0.75), 4: Score(0.4, 0.0)})


def run(path: Path, own: Scores | None = TUNED, dual: bool = False) -> RunFolder:
    folder = RunFolder.create(path, "")
    folder.append(RunRecord(path.name, {"personal": {"finetune": 2, "dual": dual}, "rounds": 1, "name": path.name}))
    folder.append(FinalRecord(1, Score(0.6, 0.8), TEST, 75.0, "f00d", 1000, 3000, own))
    return folder


def test_scores_come_back_and_a_run_without_them_is_written_as_before(tmp_path: Path) -> None:
    final = history(run(tmp_path / "a").path).final
    assert final is not None
    assert final.tuned == TUNED
    assert final.test == TEST
    bare = run(tmp_path / "b", None)
    final = history(bare.path).final
    assert final is not None
    assert final.tuned is None
    assert "tuned" not in json.loads(bare.metrics.read_text().splitlines()[-1])


@pytest.mark.parametrize(("dual", "label"), [(False, "tuned by each client"), (True, "with a personal adapter")])
def test_the_report_tells_both_and_what_was_gained(tmp_path: Path, dual: bool, label: str) -> None:
    folder = run(tmp_path / "a", dual=dual)
    text = write_report(folder.path).read_text(encoding="utf-8")
    assert f"Federated, {label}</th>" in text
    mean, worst = 100 * (0.8 + 0.85 + 0.75) / 4, 0.0  # of the four that trained, one of which is the lowest tenth
    assert f'<td class="n">{mean:.1f} %</td><td class="n">{worst:.1f} %</td>' in text
    # Of clients 1, 2 and 3, which have both: +10, −5 and +25 points.
    assert "(2 epochs, which nobody else sees), 2 of 3 clients do better on their own test sets and 1 worse" in text
    assert "mean gain +10.0 points, smallest −5.0." in text


def test_one_epoch_is_one_and_what_has_no_central_score_has_no_bar(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a", "")
    folder.append(RunRecord("a", {"personal": {"finetune": 1}}))
    folder.append(FinalRecord(1, Score(0.6, 0.8), TEST, 75.0, "f00d", 1000, 3000, TUNED))
    text = write_report(folder.path).read_text(encoding="utf-8")
    assert "(1 epoch, which nobody else sees)" in text
    assert text.count('<td class="bar"><i') == 1
    assert text.count('<td class="bar"></td>') == 1


def test_a_terminal_shows_them_beside_the_shared_ones(tmp_path: Path) -> None:
    rows = [list(x.cells) for x in headline(run(tmp_path / "a").path).columns]
    assert rows[0] == ["federated", "federated, tuned"]
    assert rows[1] == ["0.8000", "-"]
    assert rows[3] == ["0.7000", "0.6000"]  # of three with an accuracy, and of all four
    assert list(headline(run(tmp_path / "b", None).path).columns[0].cells) == ["federated"]


def test_without_them_nothing_is_told(tmp_path: Path) -> None:
    h = history(run(tmp_path / "a", None).path)
    assert (tuned(h), gains(h)) == ([], "")
    assert [x.name for x in standings(h)] == ["federated"]
    none = history(run(tmp_path / "b", Scores(0.5, None, {1: Score(0.5, None)})).path)
    assert gains(none) == ""
    assert [x.name for x in standings(none)] == ["federated", "tuned"]


def test_a_comparison_has_them_as_measures(tmp_path: Path) -> None:
    c = compare([run(tmp_path / "a").path, run(tmp_path / "b", None).path])
    (first, second) = c.rows
    assert first.tuned == pytest.approx(0.6)
    assert first.tuned_worst == 0.0
    assert (second.tuned, second.tuned_worst) == (None, None)
    assert "tuned,tuned_worst" in as_csv(c).splitlines()[0]
    assert "tuned client %" in [x.header for x in table(c).columns]
