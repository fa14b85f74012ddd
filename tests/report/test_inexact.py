"""How exact a run's rule was: in its records, its report and in comparisons."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fedpeft.errors import DataError
from fedpeft.report import RoundRecord, RunFolder, RunRecord, compare, history, inexact, table, write_comparison
from fedpeft.report.inexact import errors, meaning
from fedpeft.rounds import Exactness

Make = Callable[..., RunFolder]
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.v_proj", "head")


def recorded(path: Path, overall: list[float | None], rule: str = "fedit", layers: int = 3, **settings: object) -> Path:
    folder = RunFolder.create(path, "")
    folder.append(RunRecord(path.name, {"rule": {"name": rule}, "seed": 1, **settings}))
    for round_, x in enumerate(overall, start=1):
        each = {n: (i + 1) * (x or 0) for i, n in enumerate(LAYERS[:layers])}
        folder.append(RoundRecord(round_, exactness=None if x is None else Exactness(x, each)))
    return folder.path


def test_errors_come_back_with_four_digits_and_only_where_there_are_any(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a", [0.123456, None, 3.00004e-8])
    first, second, third = history(path).rounds
    assert first.exactness == Exactness(0.1235, {LAYERS[0]: 0.1235, LAYERS[1]: 0.2469, LAYERS[2]: 0.3704})
    assert second.exactness is None
    assert third.exactness is not None
    assert third.exactness.overall == 3e-8
    lines = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
    assert "exactness" not in lines[2]
    assert list(lines[1]["exactness"]) == ["overall", "layers"]


def test_a_record_from_before_there_were_errors_loads_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a", "")
    folder.metrics.write_text('{"schema":1,"kind":"round","round":1}\n')
    assert history(folder.path).rounds == (RoundRecord(1),)
    folder.metrics.write_text(
        '{"schema":1,"kind":"round","round":1,"exactness":{"overall":0.5,"layers":{"q":"x"}}}\n\n'
    )
    with pytest.raises(DataError, match=r"line 1, exactness, layers, q: got 'x'; want a number"):
        history(folder.path)


def test_a_runs_error_is_the_mean_of_the_rounds_that_have_one(tmp_path: Path) -> None:
    assert inexact(history(recorded(tmp_path / "a", [0.1, None, 0.4]))) == pytest.approx(0.25)
    assert inexact(history(recorded(tmp_path / "b", [None]))) is None


@pytest.mark.parametrize(
    ("rule", "overall", "said"),
    [
        (
            "fedit",
            [0.1, 0.3],
            "by 20 % of its length (mean of the rounds; 30 % at most): the product of",
        ),
        (
            "ffa",
            [4e-8, 2e-8],
            "Exact, but for rounding (3e-08 on average): each step was the mean of the clients’ changes, since clients",
        ),
        ("ffa", [9e-4], "Exact, but for rounding (9e-04 on average)"),  # half precision may be as coarse
        ("fedit", [9e-4], "by 0.09 % of its length"),
        (
            "fedit",
            [9e-6],
            "Exact, but for rounding (9e-06 on average): each step was the mean of the clients’ changes. ",
        ),
        ("ravan", [1e-8], "clients train cores between factors that all share"),
        ("ravan", [0.5], "each core is averaged over those who train it"),
        ("mine", [0.0010001], "by 0.1 % of its length (mean of the rounds; 0.1 % at most). From sketches"),
        ("flexlora", [0.0], "each step was the mean of the clients’ changes. From sketches"),
        ("ffa", [0.5], "by 50 % of its length (mean of the rounds; 50 % at most). From sketches"),
    ],
)
def test_a_sentence_says_what_the_error_means_for_this_rule(
    tmp_path: Path, rule: str, overall: list[float | None], said: str
) -> None:
    assert said in meaning(history(recorded(tmp_path / "a", overall, rule)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"server": {"name": "averaging", "lr": 1.0}, "channel": {"clip": None}}, ""),
        ({"server": {"name": "averaging", "lr": 0.5}}, "What the server’s optimiser changed is part of it."),
        ({"server": {"name": "adam", "lr": 1.0}}, "What the server’s optimiser changed is part of it."),
        ({"channel": {"clip": 2.0}}, "What the clip changed is part of it."),
        (
            {"server": {"name": "adam"}, "channel": {"clip": 2.0}},
            "What the server’s optimiser and the clip changed is part of it.",
        ),
    ],
)
def test_it_says_what_else_is_in_the_error(tmp_path: Path, settings: dict[str, object], said: str) -> None:
    text = meaning(history(recorded(tmp_path / "a", [0.2], **settings)))
    assert (said in text) if said else ("part of it" not in text)


def test_the_figure_names_all_layers_together_the_best_and_the_worst(tmp_path: Path) -> None:
    svg = errors(history(recorded(tmp_path / "a", [0.1, 0.2, None, 0.3])))
    assert "Relative error of the server's change" in svg
    for label in ("all layers", "layers.0.self_attn.q_proj", "head"):
        assert f">{label}<" in svg
    assert "v_proj" not in svg
    assert ">0.1<" in svg
    assert ">1<" in svg
    assert "mathdefault" not in svg


@pytest.mark.parametrize("overall", [[0.0], [0.0, 0.0], [1e-7], [0.1] * 40, [3.0, 1e-8]])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_the_figure_is_drawn_whatever_the_errors_are(tmp_path: Path, overall: list[float | None], layers: int) -> None:
    svg = errors(history(recorded(tmp_path / "a", overall, layers=layers)))
    assert svg.startswith("<svg")
    assert "all layers" in svg
    assert "nan" not in svg.lower()


def test_without_errors_there_is_neither_figure_nor_sentence(run: Make) -> None:
    h = history(run(clients=2, rounds=2).path)
    assert errors(h) == ""
    assert meaning(h) == ""


def test_a_comparison_has_a_column_for_it_and_measuring_it_sets_no_run_apart(tmp_path: Path) -> None:
    runs = [
        recorded(tmp_path / "a", [0.1, 0.3], "fedit", evaluation={"exactness": True}),
        recorded(tmp_path / "b", [2e-8], "ffa", evaluation={"exactness": True}),
        recorded(tmp_path / "c", [None], "ffa", evaluation={"exactness": False}),
    ]
    c = compare(runs)
    assert c.keys == ("rule.name",)
    assert [x.inexact for x in c.rows] == [pytest.approx(0.2), 2e-8, None]
    assert c.groups[1].measures["inexact"].n == 1
    console = Console(width=200, quiet=False, force_terminal=False)
    with console.capture() as shown:
        console.print(table(c))
    assert "inexact %" in shown.get()
    assert " 20.0 " in shown.get()
    page = write_comparison(c, tmp_path / "out").read_text()
    assert "inexact %" in page
    lines = list(csv.DictReader((tmp_path / "out" / "comparison.csv").read_text().splitlines()))
    assert [x["inexact"] for x in lines] == ["0.2", "2e-08", ""]
