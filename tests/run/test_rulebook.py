"""The table of rules: every rule in it, its page, bytes of a model, and docs/rules.md, which is made from it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedpeft.cli import app
from fedpeft.config import experiment, known_rules
from fedpeft.config.rules import RULES
from fedpeft.errors import ConfigError
from fedpeft.run import rulebook as book
from fedpeft.run.rulebook import HEADS, LEGEND, describe, facts, make, markdown, page, rulebook

DOCS = Path(__file__).parents[2] / "docs" / "rules.md"
SETTINGS = {
    "model": {"name": "tiny-bert"},
    "data": {"name": "wiki11", "examples": 60},
    "partition": {"name": "iid", "clients": 2},
    "adapter": {"rank": 4, "targets": ["query", "intermediate.dense"]},
}


@pytest.fixture(scope="module", autouse=True)
def _facts_once():
    """The facts of a rule are tried out, which takes seconds for all of them: once for all tables made here."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(book, "facts", lambda rule: found.get(repr(rule)) or found.setdefault(repr(rule), facts(rule)))
        yield


@pytest.fixture(scope="module")
def rows():
    return rulebook()


def test_every_rule_is_in_the_table_with_what_it_does_and_its_papers(rows):
    assert [x.name for x in rows] == sorted(known_rules()) == sorted(RULES)
    for row in rows:
        assert row.problem == ""
        assert row.facts is not None
        assert row.sources, f"{row.name}: its docstring names no paper (arXiv:…)"
        assert row.about.endswith("."), row.name
        assert "varies" not in (row.up, row.down), row.name
        assert len(row.cells()) == len(HEADS)
    assert len({x.about for x in rows}) == len(rows)


def test_the_page_of_rules_has_the_table_as_it_is_now(rows):
    text = DOCS.read_text(encoding="utf8")
    fresh = "run `fedpeft rules --markdown` and put its table in place of the one in docs/rules.md"
    assert markdown(rows) in text, fresh
    for line in LEGEND:
        assert line in text


def test_names_of_one_class_have_lines_of_their_own():
    assert describe(RULES["ffa"]) == ("Average the change of b; a stays as it was drawn.", ("arXiv:2403.12313",))
    assert describe(RULES["rolora"])[1] == ("arXiv:2409.02346",)
    about, sources = describe(RULES["fedrot"])
    assert about == "Average the change of both factors, each client's turned towards what it received."
    assert sources == ("arXiv:2602.23638",)


def test_a_rules_page_has_its_settings_and_defaults():
    text = page("flora")
    for line in ('name = "flora"', "energy = 1.0", "# largest is not set", "# down: R(d + k) + tail"):
        assert line in text.splitlines()
    assert "# seed = …  # the experiment's seed" in text
    assert "cycle" not in page("fedit").split("[rule]")[1]
    assert 'rest = "frozen"' in page("fedit")
    with pytest.raises(ConfigError, match=r"rule\.name: got 'fedavg'; want one of fedex, fedit"):
        page("fedavg")


def test_a_page_has_a_line_for_each_paragraph_and_says_nothing_twice():
    lines = page("subspace").splitlines()
    assert lines[0] == f"subspace: {describe(RULES['subspace'])[0]}"
    (step,) = (x for x in lines if x.startswith("2. "))
    assert step.endswith("where its rank is at most w.")
    assert sum("Add the mean change of ΔW" in x for x in lines) == 1
    assert sum(x.startswith("Sources: ") for x in lines) == 1
    assert lines[1:3] == ["", lines[2].strip()]
    assert "Average both factors, each direction over those who hold it." in page("rbla").splitlines()[0]
    assert "" not in page("rbla").split("[rule]")[1].splitlines()[1:]


def test_a_narrow_terminal_leaves_out_what_rules_do(monkeypatch, rows):
    from rich.console import Console

    from fedpeft import cli

    monkeypatch.setattr(book, "rulebook", lambda found: rows)
    for width, is_told in ((139, False), (140, True)):
        monkeypatch.setattr(cli, "console", Console(width=width))
        shown = CliRunner().invoke(app, ["rules"]).output
        assert ("what it does" in shown) is is_told
        assert "numbers of one layer (d × k, rank R)" in shown
        assert "bytes of one client" not in shown
        assert ("`fedpeft rules NAME`" in shown) is not is_told


def test_with_an_experiment_the_command_speaks_of_bytes(monkeypatch, rows, tmp_path):
    monkeypatch.setattr(book, "rulebook", lambda found: rows if found.adapter.rank == 3 else [])
    (tmp_path / "x.toml").write_text("[data]\nname = 'wiki11'\n[adapter]\nrank = 3\n", encoding="utf8")
    shown = CliRunner().invoke(app, ["rules", str(tmp_path / "x.toml")]).output
    assert "bytes of one client" in shown
    assert "numbers of one layer of the experiment's model" in shown


def test_bytes_are_those_of_the_model_at_hand():
    found = experiment(SETTINGS | {"rule": {"name": "fedit"}})
    by_name = {x.name: x for x in rulebook(found)}
    layers = {"query": (24, 24), "intermediate.dense": (40, 24)}
    head = 11 * 24 + 11
    wide, tall = (4 * sum(sum(x) for x in layers.values()) // 2, 4 * sum(d for d, _ in layers.values()) // 2)
    both, left = 4 * wide + head, 4 * tall + head  # two blocks, each with both layers
    assert by_name["fedit"].up == f"{wide}, {4 * both / 1e3:.3g} kB" == by_name["fedit"].down
    assert by_name["ffa"].up == f"{tall}, {4 * left / 1e3:.3g} kB" == by_name["ffa"].down
    assert by_name["rolora"].up == f"{wide // 2}, {4 * (both + head) / 2 / 1e3:.3g} kB"
    assert by_name["flora"].down == f"{wide}, {4 * both / 1e3:.3g} kB + tail"
    exact = {x.name: x for x in rulebook(experiment(SETTINGS | {"channel": {"exact": True}}))}
    assert exact["fedit"].up == f"{wide}, {8 * both / 1e3:.3g} kB"


def test_the_command_prints_the_table_and_pages():
    run = CliRunner()
    shown = run.invoke(app, ["rules"], env={"COLUMNS": "250"})
    assert shown.exit_code == 0, shown.output
    for name in RULES:
        assert name in shown.output
    assert run.invoke(app, ["rules", "--markdown"]).output == markdown(rulebook())
    assert 'name = "fedsvd"' in run.invoke(app, ["rules", "fedsvd"]).output
    wrong = run.invoke(app, ["rules", "fedavg"])
    assert isinstance(wrong.exception, ConfigError)


def test_a_rule_that_needs_settings_has_a_row_that_says_so(monkeypatch):
    from dataclasses import dataclass

    from fedpeft.config.schema import Choice
    from fedpeft.rules import FedSVD
    from fedpeft.run import rulebook as book

    @dataclass(frozen=True, slots=True)
    class Needy(FedSVD):
        """Needs a width."""

        width: int

    @dataclass(frozen=True, slots=True)
    class NoRule:
        pass

    monkeypatch.setattr(book, "known_rules", lambda: {"needy": Choice(Needy), "other": Choice(NoRule)})
    needy, other = book.rulebook()
    assert needy.problem == "rule.width: is missing; want a whole number"
    assert needy.cells() == ("needy", "Needs a width.", needy.problem, "", "", "", "", "")
    assert "rule.name: other is a NoRule; want a MeanRule or a ListRule" in other.problem
    assert "width = …  # no default" in book.page("needy")
    assert "rule.width: is missing" in book.page("needy")


def test_rules_are_made_with_a_seed():
    assert make("flora").seed == 0
