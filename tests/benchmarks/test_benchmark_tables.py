"""The tables of benchmarks/README.md are what the results say."""

import json

import pytest

from tests.benchmarks.scripts import FOLDER, script

tables = script("tables")
MACHINE = {"processor": "Abacus", "cores": 3, "python": "3.11.7", "versions": {"torch": "2.6"}, "commit": "abc1234"}


def test_the_pages_say_what_the_results_say():
    for file in tables.PAGES:
        page = file.read_text(encoding="utf8")
        assert page == tables.rendered(page, FOLDER / "results"), "run: python benchmarks/tables.py"


def test_every_result_has_a_table():
    page = "".join(x.read_text(encoding="utf8") for x in tables.PAGES)
    kept = {x.stem for x in (FOLDER / "results").glob("*.json")}
    assert kept
    for name in kept:
        assert f"<!-- table {name} -->" in page


def test_a_page_is_filled_with_the_rows_of_a_file(tmp_path):
    rows = [
        {"way": "loop", "tokens/s": 1234.5, "rows": 40960},
        {"way": "cohort", "share of time": 0.4567, "loss": 2e-7},
    ]
    (tmp_path / "one.json").write_text(
        json.dumps({"machine": MACHINE, "command": "make one", "rows": rows, "b": rows[:1]})
    )
    page = "# Title\n\n<!-- table one -->\nold\n<!-- end -->\n\ntext\n\n<!-- table one: b -->\n<!-- end -->\n"
    source = "`make one`, commit abc1234, 3 cores of Abacus, Python 3.11.7, torch 2.6"
    want = (
        "# Title\n\n<!-- table one -->\n\n"
        "| way | tokens/s | rows | share of time | loss |\n| --- | --- | --- | --- | --- |\n"
        "| loop | 1,234 | 40,960 |  |  |\n| cohort |  |  | 45.7 % | 2.0e-07 |\n\n"
        f"{source}\n\n<!-- end -->\n\ntext\n\n"
        "<!-- table one: b -->\n\n| way | tokens/s | rows |\n| --- | --- | --- |\n| loop | 1,234 | 40,960 |\n\n"
        f"{source}\n\n<!-- end -->\n"
    )
    once = tables.rendered(page, tmp_path)
    assert once == want
    assert tables.rendered(once, tmp_path) == want


def test_a_result_that_has_not_been_measured_is_said_to_be_missing(tmp_path):
    page = tables.rendered("<!-- table two -->\n| old |\n<!-- end -->\n", tmp_path)
    assert page == "<!-- table two -->\n\nNot measured yet: `python benchmarks/two.py`\n\n<!-- end -->\n"
    assert tables.missing(page) == ["two"]


@pytest.mark.parametrize(
    ("column", "value", "want"),
    [
        ("x", 0.0, "0"),
        ("x", 3.14159, "3.14"),
        ("x", 999.4, "999"),
        ("x", 123456.7, "123,457"),
        ("x", -0.00002, "-2.0e-05"),
        ("ratio", 2.968, "2.97"),
        ("share", 1.0, "100.0 %"),
        ("x", True, "True"),
        ("x", None, ""),
    ],
)
def test_numbers_are_shown_short(column, value, want):
    assert tables.cell(column, value) == want
