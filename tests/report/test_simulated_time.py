"""Runs in virtual time: what is recorded, drawn, said and compared."""

import json
from dataclasses import replace

import pytest

from fedpeft.report import (
    ClientData,
    FinalRecord,
    RoundRecord,
    RunFolder,
    RunRecord,
    Score,
    arrival_table,
    compare,
    history,
    write_comparison,
    write_report,
)
from fedpeft.report.arrival import levels, mean_arrival, reached
from fedpeft.report.compare import arrivals, record
from fedpeft.report.simulated import kinds_of, learning, schedule, simulated_seconds
from fedpeft.rounds import Visit

VISITS = (
    Visit(0, 0.0, 0.0, 20.0, "done"),
    Visit(1, 0.0, 10.0, 60.0, "late"),
    Visit(2, 0.0, 0.0, 5.0, "lost"),
    Visit(3, 0.0, 30.0, 30.0, "away"),
)


def written(path, name="run", pace=100.0, accuracies=(0.2, 0.5, 0.7), buffered=False, clients=4):
    folder = RunFolder.create(path, f'name = "{name}"\n')
    terms = {"name": "buffered", "buffer": 2, "concurrency": 3} if buffered else {"name": "synchronous"}
    people = {c: ClientData(5, {"a": 5}, "phone" if c % 2 else "board") for c in range(clients)}
    folder.append(RunRecord(name=name, settings={"name": name, "seed": 1, "schedule": terms}, clients=people))
    for t, accuracy in enumerate(accuracies, start=1):
        shift = pace * (t - 1)
        visits = tuple(replace(v, asked=v.asked + shift, began=v.began + shift, ended=v.ended + shift) for v in VISITS)
        more = tuple(replace(VISITS[0], client=c, asked=shift, began=shift, ended=shift + 9) for c in range(4, clients))
        folder.append(
            RoundRecord(
                round=t,
                asked=(0, 1, 2, 3),
                survivors=(0,),
                central=Score(1.0, accuracy, 10),
                staleness=(t - 1,),
                simulated=pace * t,
                bytes_up=10,
                visits=visits + more,
            )
        )
    folder.append(FinalRecord(len(accuracies), Score(1.0, accuracies[-1], 10)))
    return path


def test_visits_and_times_are_read_back_as_they_were_written(tmp_path):
    h = history(written(tmp_path / "run"))
    assert h.rounds[0].visits == VISITS
    assert [x.simulated for x in h.rounds] == [100.0, 200.0, 300.0]
    assert [x.staleness for x in h.rounds] == [(0,), (1,), (2,)]
    assert h.run.clients[1] == ClientData(5, {"a": 5}, "phone")


def test_a_record_of_real_time_has_none_of_it_and_is_read(tmp_path):
    line = RoundRecord(round=1).json()
    assert not {"visits", "simulated", "staleness"} & set(line)
    assert RunRecord("x", clients={0: ClientData(3)}).json()["clients"] == {"0": {"examples": 3, "labels": {}}}
    folder = RunFolder.create(tmp_path / "run", 'name = "x"\n')
    folder.append(RoundRecord(round=1, timeline=((0, 0.0, 1.0),), seconds=1.0))
    h = history(tmp_path / "run")
    assert (simulated_seconds(h), schedule(h), learning(h), kinds_of(h)) == (None, "", "", [])
    assert "simulated" not in write_report(tmp_path / "run").read_text(encoding="utf8")


def test_each_kind_of_device_is_accounted_for(tmp_path):
    board, phone = kinds_of(history(written(tmp_path / "run")))
    assert (board.name, board.clients, board.done, board.late, board.lost, board.away) == ("board", 2, 3, 0, 3, 0)
    assert board.busy == pytest.approx((20 + 5) / (2 * 100))
    assert (phone.name, phone.clients, phone.done, phone.late, phone.lost, phone.away) == ("phone", 2, 0, 3, 0, 3)
    assert phone.busy == pytest.approx(50 / (2 * 100))


def test_the_report_shows_the_schedule_and_the_learning_by_simulated_time(tmp_path):
    text = write_report(written(tmp_path / "run")).read_text(encoding="utf8")
    for said in (
        "Devices at work",
        "Accuracy by simulated time",
        "simulated minutes",
        "5 min 0 s</b>simulated time",
        "board (2)",
        "board: 3 answers from 2 clients, 0 too late, 3 lost, 0 never begun, at work 12 % of the time",
    ):
        assert said in text


def test_of_many_clients_some_of_each_kind_are_drawn(tmp_path):
    svg = schedule(history(written(tmp_path / "run", clients=130)))
    assert "Clients, 60 of 130, each a row" in svg
    assert "board (65)" in svg


def test_when_an_accuracy_is_reached(tmp_path):
    fast, slow = history(written(tmp_path / "a", pace=10.0)), history(written(tmp_path / "b", accuracies=(0.2, 0.4)))
    assert reached(fast, 0.5, True) == (2, 20.0)
    assert reached(slow, 0.5, True) is None
    assert mean_arrival([fast, slow], 0.4, True) == (2.0, 110.0)
    assert mean_arrival([fast, slow], 0.5, True) is None
    assert levels([fast, slow], True) == pytest.approx([0.25, 0.35, 0.45, 0.6, 0.7])
    assert levels([slow], True) == pytest.approx([0.25, 0.3, 0.35, 0.4])


def test_a_comparison_has_simulated_time_and_the_time_to_accuracies(tmp_path):
    paths = [written(tmp_path / "a", "calm"), written(tmp_path / "b", "quick", pace=10.0, buffered=True)]
    c = compare(paths)
    assert [row.simulated for row in c.rows] == [300.0, 30.0]
    assert c.keys == ("schedule.name",)  # which says all that differs
    times = {level: seconds for level, (_, seconds) in arrivals(c, c.groups[0]).items()}
    assert times == {0.25: 200, 0.35: 200, 0.45: 200, 0.6: 300, 0.7: 300}
    assert record(c)["groups"][1]["reached"][0] == {"accuracy": 0.25, "rounds": 2.0, "simulated": 20.0}
    page = write_comparison(c, tmp_path / "out").read_text(encoding="utf8")
    assert "The same, by simulated minutes" in page
    assert "3 min 20 s (2)" in page
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"][1]["simulated"] == 30.0
    assert arrival_table(c).row_count == 2


def test_a_comparison_with_a_run_in_real_time_has_no_figure_of_simulated_time(tmp_path):
    folder = RunFolder.create(tmp_path / "real", 'name = "real"\n')
    folder.append(RunRecord(name="real", settings={"name": "real", "seed": 1, "schedule": {"name": "other"}}))
    folder.append(RoundRecord(round=1, central=Score(1.0, 0.3, 10), bytes_up=5))
    c = compare([written(tmp_path / "a"), tmp_path / "real"])
    page = write_comparison(c, tmp_path / "out").read_text(encoding="utf8")
    assert "by simulated" not in page
    assert arrivals(c, c.groups[1]) == {}
