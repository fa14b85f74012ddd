"""Runs side by side: what differs is found, seeds are taken together."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedpeft import cli
from fedpeft.errors import DataError
from fedpeft.report import (
    BaselineRecord,
    FinalRecord,
    RoundRecord,
    RunFolder,
    RunRecord,
    Score,
    Scores,
    compare,
    table,
    write_comparison,
)
from fedpeft.report.compare import Spread, short
from fedpeft.report.side_by_side import as_csv, figure, told

Make = Callable[..., RunFolder]


def small(path: Path, accuracy: float | None, seed: int = 1, **settings: object) -> Path:
    folder = RunFolder.create(path, "")
    folder.append(
        {"kind": "run", "name": path.name, "settings": {"name": path.name, "seed": seed, "rounds": 2, **settings}}  # type: ignore[dict-item]
    )
    for t in (1, 2):
        folder.append(
            RoundRecord(
                t, bytes_up=100 * t, bytes_down=10, central=Score(1.0, None if accuracy is None else accuracy / 2)
            )
        )
    test = Scores(0.5, 0.5, {n: Score(0.5, n / 20) for n in range(1, 21)})
    folder.append(BaselineRecord("base", Score(3.0, 0.125)))
    folder.append(FinalRecord(2, Score(0.5, accuracy), test, 12.5, "", 300, 20))
    return path


def test_what_differs_is_found_and_seeds_are_taken_together(tmp_path: Path) -> None:
    runs = [
        small(tmp_path / "a1", 0.50, 1, rule={"name": "fedit"}, training={"lr": 0.1, "steps": 5}),
        small(tmp_path / "b1", 0.90, 1, rule={"name": "ffa"}, training={"lr": 0.1, "steps": 5}),
        small(tmp_path / "a2", 0.60, 2, rule={"name": "fedit"}, training={"lr": 0.1, "steps": 5}),
        small(tmp_path / "a3", 0.70, 3, rule={"name": "fedit"}, training={"lr": 0.1, "steps": 5}),
    ]
    c = compare(runs)
    assert c.keys == ("rule.name",)
    assert c.shared == {"rounds": "2", "training.lr": "0.1", "training.steps": "5"}
    assert [(g.label, len(g.rows)) for g in c.groups] == [("fedit", 3), ("ffa", 1)]
    found = c.groups[0].measures["accuracy"]
    np.testing.assert_allclose([found.mean, found.deviation], [0.6, 0.1], rtol=1e-12)  # 0.5, 0.6, 0.7: n − 1
    assert found.n == 3
    assert c.groups[1].measures["accuracy"] == Spread(0.9, None, 1)
    assert [h.run.name for h in c.members(c.groups[0])] == ["a1", "a2", "a3"]
    row = c.rows[0]
    assert (row.mean, row.worst) == (pytest.approx(0.525), pytest.approx(0.075))  # of 1..20 twentieths; the lowest two
    assert (row.bytes_up, row.bytes_down, row.seconds, row.is_complete) == (300, 20, 12.5, True)
    assert row.baselines == {"base": 0.125}


def test_a_setting_that_one_run_lacks_differs(tmp_path: Path) -> None:
    c = compare([small(tmp_path / "a", 0.5, channel={"clip": 1.0}), small(tmp_path / "b", 0.5)])
    assert c.keys == ("channel.clip",)
    assert [g.differs for g in c.groups] == [{"channel.clip": "1.0"}, {"channel.clip": "–"}]


def test_settings_have_short_names_where_that_is_plain() -> None:
    assert short(["rule.name", "training.lr", "adapter.rank"]) == {
        "rule.name": "rule",
        "training.lr": "lr",
        "adapter.rank": "rank",
    }
    assert short(["training.lr", "server.lr"]) == {"training.lr": "training.lr", "server.lr": "server.lr"}


def test_a_measure_that_a_run_lacks_is_left_out_of_the_mean(tmp_path: Path) -> None:
    c = compare([small(tmp_path / "a", 0.5, 1), small(tmp_path / "b", None, 2)])
    assert c.groups[0].measures["accuracy"] == Spread(0.5, None, 1)
    assert c.groups[0].measures["seconds"] == Spread(12.5, 0.0, 2)
    assert "local" not in c.groups[0].measures


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    run = small(tmp_path / "a", 0.5)
    with pytest.raises(ValueError, match="folders: got none"):
        compare([])
    with pytest.raises(ValueError, match="named twice"):
        compare([run, tmp_path / "b" / ".." / "a"])
    with pytest.raises(DataError, match="b: no such folder"):
        compare([run, tmp_path / "b"])


def test_the_table_shows_mean_and_deviation(tmp_path: Path) -> None:
    c = compare(
        [small(tmp_path / "a", 0.5, 1, rule={"name": "[red]x"}), small(tmp_path / "b", 0.6, 2, rule={"name": "[red]x"})]
    )
    console = Console(width=200, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as shown:
        console.print(table(c))
    assert "55.0 ± 7.1" in shown.get()
    assert told("accuracy", None) == "–"
    assert told("bytes_up", Spread(3e6, 2.0, 2)) == "3 MB"
    assert told("loss", Spread(0.5, 0.0125, 2)) == "0.500 ± 0.013"


def test_no_cell_is_cut_in_a_narrow_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "console", Console(width=40))
    runs = [str(small(tmp_path / name, 0.5, 1, rule={"name": name})) for name in ("fedit", "flexlora")]
    shown = CliRunner().invoke(cli.app, ["compare", *runs, "--out", str(tmp_path / "c")]).output
    assert "accuracy %" in shown
    assert "flexlora" in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines()[-6:-1])) <= 40  # what the heads mean is broken where the terminal ends


def test_files_agree_with_one_another_and_are_the_same_each_time(tmp_path: Path, run: Make) -> None:
    runs = [run(rule=rule, seed=seed, clients=4, rounds=3).path for rule in ("fedit", "ffa") for seed in (1, 2)]
    c = compare(runs)
    page = write_comparison(c, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    lines = list(csv.DictReader((tmp_path / "out" / "comparison.csv").read_text().splitlines()))
    assert (
        [float(x["accuracy"]) for x in lines] == [x["accuracy"] for x in found["runs"]] == [x.accuracy for x in c.rows]
    )
    assert [x["rule.name"] for x in lines] == ["fedit", "fedit", "ffa", "ffa"]
    assert found["groups"][0]["measures"]["accuracy"]["n"] == 2
    assert found["groups"][0]["runs"] == [x.name for x in runs[:2]]
    text = page.read_text()
    assert "4 runs compared" in text
    assert "Accuracy on the central test set, by round" in text
    write_comparison(compare(runs), tmp_path / "again")
    for name in ("comparison.json", "comparison.csv", "comparison.html"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_comparison_is_escaped_and_works_without_rounds(tmp_path: Path) -> None:
    evil = "<b>x</b>"
    folder = RunFolder.create(tmp_path / "a", "")
    folder.append(RunRecord(evil, {"rule": {"name": evil}}))
    c = compare([folder.path, small(tmp_path / "b", 0.5, rule={"name": "fedit"})])
    assert evil not in write_comparison(c, tmp_path / "out").read_text()
    alone = compare([folder.path])
    assert figure(alone) == ""
    assert as_csv(alone).splitlines()[1].startswith(f"a,{evil},,0,false,,")
    assert evil not in write_comparison(alone, tmp_path / "out").read_text()


def test_more_groups_than_colours_are_drawn_grey(run: Make) -> None:
    c = compare([run(lr=lr / 1000, clients=2, rounds=2, baselines=False).path for lr in range(1, 11)])
    assert "grey: the other runs" in figure(c)


def test_what_leaves_a_run_the_same_sets_no_group_apart(tmp_path: Path) -> None:
    runs = [
        small(tmp_path / "a", 0.5, 1, run="0f3a", baselines={"base": True}, partition={"seed": 4}),
        small(tmp_path / "b", 0.7, 2, run="77c1", baselines={"base": False}, partition={"seed": 5}),
    ]
    c = compare(runs)
    assert c.keys == ()
    assert len(c.groups) == 1
    assert c.groups[0].measures["accuracy"].mean == pytest.approx(0.6)


def test_groups_go_by_the_names_of_their_runs_if_those_tell_them_apart(tmp_path: Path) -> None:
    runs = []
    for name, lr in (("slow", 0.1), ("fast", 0.4)):
        for seed in (1, 2):
            folder = RunFolder.create(tmp_path / f"{name}-{seed}", "")
            folder.append(RunRecord(name, {"name": name, "seed": seed, "training": {"lr": lr}}))
            runs.append(folder.path)
    c = compare(runs)
    assert [g.label for g in c.groups] == ["slow", "fast"]
    assert [g.differs for g in c.groups] == [{"training.lr": "0.1"}, {"training.lr": "0.4"}]
    assert [x.header for x in table(c).columns][:3] == ["run", "lr", "n"]
    assert [g.label for g in compare(runs[:2]).groups] == ["slow"]
