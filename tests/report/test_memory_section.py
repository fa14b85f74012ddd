"""What a report says of the memory of devices, and what a run's file keeps of it."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedpeft.errors import DataError
from fedpeft.report import (
    DeviceRecord,
    FinalRecord,
    MemoryRecord,
    RoundRecord,
    RunFolder,
    RunRecord,
    compare,
    exceeded,
    history,
    write_report,
)
from fedpeft.report.memory import devices

MB = 1_000_000


def device(*clients: int, predicted: int | None = 500, measured: int | None = 510, **more: object) -> DeviceRecord:
    sizes = [None if x is None else x * MB for x in (predicted, measured)]
    made = DeviceRecord(clients, 8, "torch", "none", None, *sizes)
    return DeviceRecord(**{name: getattr(made, name) for name in DeviceRecord.__slots__} | more)


def rows(found: MemoryRecord) -> list[list[str]]:
    """The cells of the table, its head first."""
    lines = re.findall("<tr>(.*?)</tr>", devices(found))
    return [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", line) for line in lines]


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "")
    whole = MemoryRecord(
        (
            device(3, rank=2, runtime="onnx", quantise="int4", budget=9, gpu=4),
            device(0, 1, measured=None, predicted=None),
        ),
        ((5, "no answer"),),
        (("the simulation", 7), ("worker 1", 8)),
    )
    assert history(folder.path).memory is None
    folder.append(MemoryRecord((device(1),)))
    folder.append(whole)  # of a run whose end was done again
    assert history(folder.path).memory == whole


def test_a_run_that_goes_on_forgets_what_its_devices_said_at_the_end(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "")
    for record in (RoundRecord(1), MemoryRecord((device(0),)), FinalRecord(1)):
        folder.append(record)
    folder.rewind(1)
    assert (history(folder.path).memory, len(history(folder.path).rounds)) == (None, 1)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "")
    folder.append(MemoryRecord((device(0),)))
    folder.metrics.write_text(folder.metrics.read_text().replace('"rank":8', '"rank":"8"') + "\n")
    with pytest.raises(DataError, match=r"line 1, devices, rank: got '8'; want a number"):
        history(folder.path)


def test_alike_devices_are_one_row_with_their_ranges() -> None:
    some = [device(n, measured=510 + n) for n in range(7)]
    small = {"rank": 2, "runtime": "onnx", "quantise": "int8", "predicted": 200}
    other = [device(9, budget=300 * MB, measured=180, **small), device(7, budget=300 * MB, measured=190, **small)]
    found = MemoryRecord((*some, *other))
    assert rows(found) == [
        ["Clients", "Rank", "Runtime", "Budget", "Predicted", "Measured", "Measured / predicted"],
        ["clients 7, 9", "2", "onnx int8", "300 MB", "200 MB", "180 MB to 190 MB", "0.90 to 0.95"],
        ["7 clients", "8", "torch", "–", "500 MB", "510 MB to 516 MB", "1.02 to 1.03"],
    ]
    assert "notice" not in devices(found)
    assert "Not known" not in devices(found)
    assert "Measured: the peak of the process that trained" in devices(found)


def test_ranges_are_in_order_of_size_and_what_is_not_known_has_a_dash() -> None:
    found = MemoryRecord(
        (device(0, measured=1200, predicted=None), device(1, measured=900, predicted=None, gpu=2_000 * MB))
    )
    assert rows(found) == [
        ["Clients", "Rank", "Runtime", "Predicted", "Measured", "Measured / predicted", "On GPUs"],
        ["clients 0, 1", "8", "torch", "–", "900 MB to 1.2 GB", "–", "2 GB"],
    ]


def test_a_simulation_says_what_its_processes_took_and_that_it_is_no_devices() -> None:
    alike = (device(0, 2, measured=None), device(1, measured=None, rank=4, budget=400 * MB))
    one = MemoryRecord(alike, processes=(("the simulation", 1200 * MB),))
    assert rows(one) == [
        ["Clients", "Rank", "Runtime", "Budget", "Predicted"],
        ["client 1", "4", "torch", "400 MB", "500 MB"],
        ["clients 0, 2", "8", "torch", "–", "500 MB"],
    ]
    said = "Nothing was measured on a device: the clients were simulated"
    assert said in devices(one)
    assert "took <b>1.2 GB</b> at its peak.</p>" in devices(one)
    assert "Measured:" not in devices(one)
    workers = (("worker 1", 600 * MB), ("worker 2", 700 * MB))
    two = MemoryRecord(alike, processes=(("the simulation", 1200 * MB), *workers))
    assert "at its peak, and its 2 worker processes 700 MB each at most.</p>" in devices(two)
    three = MemoryRecord(alike, processes=(("the simulation", 1200 * MB), *workers[:1]))
    assert "at its peak, and its 1 worker process 600 MB.</p>" in devices(three)


def test_clients_of_which_nothing_is_known_are_told_with_the_reasons_the_commonest_first() -> None:
    some = (*((n, "no answer") for n in range(10, 17)), (3, "a < b"), (5, "a < b"))
    text = devices(MemoryRecord((), some))
    assert "Not known: 7 clients (no answer); clients 3, 5 (a &lt; b).</p>" in text
    assert "<table" not in text
    assert "Measured" not in text


def test_of_very_many_reasons_the_commonest_are_told() -> None:
    some = [(n, f"reason {n:02}") for n in range(20)] + [(n, "no answer") for n in range(20, 22)]
    text = devices(MemoryRecord((), tuple(some)))
    assert "Not known: clients 20, 21 (no answer); client 0 (reason 00); " in text
    assert text.endswith("; client 4 (reason 04); 15 more, for other reasons.</p>")


def test_a_run_whose_devices_said_nothing_has_no_section() -> None:
    assert devices(None) == ""
    assert devices(MemoryRecord(processes=(("the simulation", 5),))) == ""


@pytest.mark.parametrize(
    ("some", "said"),
    [
        ([device(0, measured=550)], ""),  # ten per cent, and no more
        ([device(0, measured=551)], "Client 0 (torch, rank 8) took 551 MB at its peak, 1.10 times the 500 MB that "),
        (
            [device(0, measured=560), device(4, measured=600, quantise="nf4"), device(5, measured=300)],
            "Client 4 (torch nf4, rank 8) took 600 MB at its peak, 1.20 times the 500 MB that were foretold; 1 more "
            "took more than was foretold or than their budget.",
        ),
        (
            [device(2, budget=509 * MB)],
            "Client 2 (torch, rank 8) took 510 MB at its peak, 1.02 times the 500 MB that were foretold and more than "
            "its budget of 509 MB.",
        ),
        (
            [device(2, predicted=None, budget=509 * MB)],
            "Client 2 (torch, rank 8) took 510 MB at its peak, more than its budget of 509 MB.",
        ),
        ([device(2, budget=510 * MB)], ""),
        ([device(2, measured=None, budget=1)], ""),
        ([], ""),
    ],
)
def test_the_device_that_took_most_above_what_was_foretold_is_named(some: Sequence[DeviceRecord], said: str) -> None:
    text = exceeded(MemoryRecord(tuple(some)))
    assert text.startswith(said)
    assert bool(text) == bool(said)
    assert ("notice" in devices(MemoryRecord(tuple(some)))) == bool(said)


def test_a_report_and_a_comparison_of_runs_with_and_without_it(tmp_path: Path) -> None:
    old, new = (RunFolder.create(tmp_path / name, "") for name in ("old", "new"))
    for folder in (old, new):
        folder.append(RunRecord("x"))
    new.append(MemoryRecord((device(0),)))
    assert "Memory of devices" not in write_report(old.path).read_text(encoding="utf8")
    assert "<h2>Memory of devices</h2>" in write_report(new.path).read_text(encoding="utf8")
    assert [x.rounds for x in compare([old.path, new.path]).rows] == [0, 0]
