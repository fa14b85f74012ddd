"""What is known of the core's mutants saves time, and hides no survivor."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ledger import Ledger, digest, keys, sample

HERE = Path(__file__).parent


def test_a_ledger_is_read_as_it_was_written(tmp_path):
    killers = {"b.py": {"01": "tests/t.py::one[é]", "03": "tests/t.py::one[é]", "02": "tests/t.py::a"}, "a.py": {}}
    Ledger("d", killers).write(tmp_path / "x.json")
    assert Ledger.read(tmp_path / "x.json") == Ledger("d", killers)
    lines = {"a.py": {}, "b.py": {"tests/t.py::a": "02", "tests/t.py::one[é]": "01 03"}}
    assert json.loads((tmp_path / "x.json").read_text()) == {"digest": "d", "files": lines}


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"digest": "d", "files": [1]}', '{"digest": "d"}'])
def test_nothing_is_known_where_there_is_no_ledger(tmp_path, text):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    assert Ledger.read(tmp_path / "x.json") == Ledger("", {})


def test_a_killer_that_is_not_known_is_empty():
    ledger = Ledger("d", {"a.py": {"01": "t"}})
    assert (ledger.killer("a.py", "01"), ledger.killer("a.py", "02"), ledger.killer("b.py", "01")) == ("t", "", "")


def test_only_a_whole_try_that_no_mutant_outlives_sets_the_digest():
    before = Ledger("old", {"a.py": {"01": "t"}, "b.py": {"02": "t"}, "gone.py": {"03": "t"}})
    files, found = ["a.py", "b.py"], {"a.py": {"04": "u"}}
    kept = {"a.py": {"04": "u"}, "b.py": {"02": "t"}}
    assert before.after("new", found, files, whole=True, alive=0) == Ledger("new", kept)
    assert before.after("new", found, files, whole=False, alive=0) == Ledger("old", kept)
    assert before.after("new", found, files, whole=True, alive=1) == Ledger("", kept)
    assert before.after("old", found, files, whole=False, alive=1) == Ledger("", kept)


def test_a_mutants_key_depends_on_what_it_changes_and_which_of_equal_ones_it_is():
    one, two, three = keys([("f", "a → b"), ("f", "a → b"), ("g", "a → b")])
    assert len({one, two, three}) == 3
    assert keys([("g", "a → b"), ("f", "a → c"), ("f", "a → b")])[::2] == [three, one]


def test_the_digest_is_of_every_name_and_byte_and_fact(tmp_path):
    def made(files: dict[str, str], *facts: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return digest(folder, facts)

    first = made({"a/x.py": "1", "b.py": "2"}, "numpy 2")
    assert made({"b.py": "2", "a/x.py": "1", "a/__pycache__/x.pyc": "3"}, "numpy 2") == first
    others = [
        made({"a/x.py": "1", "b.py": "3"}, "numpy 2"),
        made({"a/x.py": "1", "c.py": "2"}, "numpy 2"),
        made({"a/x.py": "2", "b.py": "1"}, "numpy 2"),
        made({"a/x.py": "1", "b.py": "2", "c.py": ""}, "numpy 2"),
        made({"a/x.py": "1", "b.py": "2"}, "numpy 3"),
    ]
    assert len({first, *others}) == 6


def test_another_day_is_another_sample_and_the_same_day_the_same():
    tasks = list(range(500))
    assert sample(tasks, 100, "2026-01-02") == sample(tasks, 100, "2026-01-02")
    assert sample(tasks, 100, "2026-01-02") != sample(tasks, 100, "2026-01-03")
    assert sorted(set(sample(tasks, 100, "x"))) == sample(tasks, 100, "x")
    assert len(sample(tasks, 100, "x")) == 100
    assert sample([3, 1], 100, "x") == [3, 1]


def test_what_has_not_changed_is_sampled_and_a_test_that_is_weaker_lets_a_mutant_live(tmp_path):
    rooms = [f"fedpeft/{x}" for x in ("adapters", "rules", "channel", "rounds", "secagg", "testing")]
    rooms += [f"tests/{x}" for x in ("adapters", "channel", "rules", "oracles", "laws", "rounds")]
    for room in rooms:
        (tmp_path / room).mkdir(parents=True)
        (tmp_path / room / "__init__.py").touch() if room.startswith("fedpeft") else None
    for name in ("mutants.py", "mutations.py", "trials.py", "ledger.py"):
        shutil.copy(HERE / name, tmp_path / "tests" / name)
    shutil.copy(HERE.parent / "pyproject.toml", tmp_path)
    (tmp_path / "fedpeft/__init__.py").touch()
    (tmp_path / "fedpeft/errors.py").touch()
    (tmp_path / "fedpeft/rules/plus.py").write_text("SHIFT = 3\n\n\ndef plus(x):\n    return x + SHIFT\n")
    asks = "from fedpeft.rules.plus import plus\n\n\ndef test_it():\n    assert plus({}) == {}\n"

    def tried(x: int, *options: str) -> tuple[int, str]:
        (tmp_path / "tests/rules/test_plus.py").write_text(asks.format(x, x + 3))
        ended = subprocess.run(
            [sys.executable, "tests/mutants.py", *options], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return ended.returncode, ended.stdout

    code, said = tried(5)
    assert code == 0, said
    assert "0 by the test that did last time" in said
    assert "commit it" in said
    total = said.split(" of ")[0].split()[-1]
    code, said = tried(5)
    assert code == 0, said
    assert f"since all {total} died: these are the sample of" in said
    assert f"{total} by the test that did last time" in said
    assert "commit it" not in said
    code, said = tried(0)
    assert code == 1, said
    assert "SURVIVED fedpeft/rules/plus.py:5 plus: x + SHIFT  →  SHIFT" in said
    assert Ledger.read(tmp_path / "tests/mutants.json").digest == ""
