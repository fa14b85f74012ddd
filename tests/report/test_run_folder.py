"""The folder of a run: made once, opened only if it is one, never doubled, never torn."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedpeft.errors import DataError
from fedpeft.report import (
    BaselineRecord,
    ClientData,
    FinalRecord,
    RoundRecord,
    RunFolder,
    RunRecord,
    Score,
    Scores,
    history,
)
from fedpeft.rounds import Metrics


def make(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "seed = 1\n")


def rounds(folder: RunFolder) -> list[int]:
    return [x.round for x in history(folder.path).rounds]


def test_a_new_run_can_be_opened(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert RunFolder.open(folder.path).lock_text == "seed = 1\n"
    assert history(folder.path).rounds == ()


def test_a_folder_with_other_files_is_never_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(DataError, match="holds files that are not a run's"):
            RunFolder.create(tmp_path, "", force)
    assert [x.name for x in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_is_replaced_only_by_force_and_other_files_stay(tmp_path: Path) -> None:
    folder = make(tmp_path)
    folder.append(RoundRecord(round=1))
    (folder.path / "checkpoints").mkdir()
    (folder.path / "checkpoints" / "round-00001.safetensors").write_bytes(b"x")
    (folder.path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds a run already; resume it"):
        RunFolder.create(folder.path, "seed = 2\n")
    again = RunFolder.create(folder.path, "seed = 2\n", force=True)
    assert again.lock_text == "seed = 2\n"
    assert rounds(again) == []
    assert again.checkpoints.files() == []
    assert (folder.path / "notes.txt").read_text() == "mine"


def test_what_is_no_run_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: no such folder"):
        RunFolder.open(tmp_path / "gone")
    with pytest.raises(DataError, match=r"not a run, it has no config\.lock\.toml"):
        RunFolder.open(tmp_path)


def test_every_kind_of_record_comes_back(tmp_path: Path) -> None:
    folder = make(tmp_path)
    score = Score(0.5, 0.75, 12)
    scores = Scores(0.4, 0.8, {3: score, 11: Score(None, None, None)})
    written = (
        RunRecord(
            "wiki",
            {"rule": {"name": "fedit"}},
            {"numpy": "2"},
            {0: ClientData(5, {"a": 2}, "phone", 4, True), 1: ClientData(6)},
            2,
            bytes_per_round=2.5,
            task="lm",
            labels=("a", "b"),
        ),
        RoundRecord(
            2, (1, 3), (3,), ((1, "too late"),), score, scores, score, 10, 20, 1.5, 1.25, ((3, 0.0, 1.0),), 1e9
        ),
        BaselineRecord("local", score, {3: score}, 4.0),
        FinalRecord(2, score, scores, 9.5, "ab12", 10, 20),
    )
    for record in written:
        folder.append(record)
    h = history(folder.path)
    assert (h.run, h.rounds[0], h.baselines["local"], h.final) == written
    assert all(json.loads(x)["schema"] == 1 for x in folder.metrics.read_text().splitlines())


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    folder = make(tmp_path)
    folder.append(RoundRecord(1, train=Score(float("nan"), float("inf")), validation=Scores.of({2: Metrics()})))
    folder.append({"kind": "round", "round": np.int64(2), "central": {"loss": np.float32("nan"), "accuracy": 0.5}})
    text = folder.metrics.read_text()
    for line in text.splitlines():
        json.loads(line, parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    first, second = history(folder.path).rounds
    assert first.train == Score(None, None)
    assert first.validation == Scores(None, None, {2: Score(None, None, 0)})
    assert second.central == Score(None, 0.5)


def test_scores_are_pooled_over_predictions_not_over_clients() -> None:
    found = Scores.of({5: Metrics(8.0, 4, 1, 4), 2: Metrics(1.0, 16, 15, 16)})
    assert (found.loss, found.accuracy) == (9.0 / 20, 16 / 20)
    assert list(found.clients) == [2, 5]
    assert found.clients[5] == Score(2.0, 0.25, 4)


def test_missing_and_unknown_keys_do_no_harm(tmp_path: Path) -> None:
    folder = make(tmp_path)
    lines = [{"kind": "round", "round": 1, "novelty": [1]}, {"kind": "weather"}, {"kind": "final", "rounds": 1}]
    folder.metrics.write_text("".join(json.dumps({"schema": 1, **x}) + "\n" for x in lines))
    h = history(folder.path)
    assert h.rounds == (RoundRecord(1),)
    assert h.final == FinalRecord(1)
    assert h.run.name == "run"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"schema": 2, "kind": "round", "round": 1}', "line 1: has schema 2; this version reads schema 1"),
        ('{"kind": "round", "round": 1}', "line 1: has schema none"),
        ('{"schema": 1, "kind": "round"}', "line 1: no 'round'"),
        ('{"schema": 1, "kind": "round", "round": "x"}', "line 1, round: got 'x'; want a number"),
        ('{"schema": 1, "kind": "round", "round": true}', "line 1, round: got True; want a number"),
        ('{"schema": 1, "kind": "round", "round": 1.5}', "line 1, round: got 1.5; want a whole number"),
        ('{"schema": 1, "kind": "round", "round": 1, "refused": [[1]]}', r"refused: got \[1\]; want a client's number"),
        ('{"schema": 1, "kind": "round", "round": 1, "timeline": [[1, 2]]}', r"timeline: got \[1, 2\]; want 3 numbers"),
        ('{"schema": 1, "kind": "round", "round": 1, "central": 3}', "central: got 3; want an object"),
        (
            '{"schema": 1, "kind": "round", "round": 1, "validation": {"clients": {"x": {}}}}',
            "the key 'x'; want a client",
        ),
        ("[1]", r"line 1: got \[1\]; want an object"),
        ("not json", "line 1: not a record, so the file is damaged"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    folder = make(tmp_path)
    folder.metrics.write_text(line + '\n{"schema": 1, "kind": "round", "round": 9}\n')
    with pytest.raises(DataError, match=said):
        history(folder.path)


@pytest.mark.parametrize(
    "torn", [b'{"schema":1,"kind":"rou', b'{"schema":1,"kind":"round","round":2}', b"\0\0\0\n", b"\xff\n"]
)
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path: Path, torn: bytes) -> None:
    folder = make(tmp_path)
    folder.append(RoundRecord(round=1))
    with folder.metrics.open("ab") as file:
        file.write(torn)
    before = folder.metrics.read_bytes()
    again = RunFolder.open(folder.path)
    assert rounds(again) == [1]
    assert folder.metrics.read_bytes() == before, "reading changes nothing"
    again.append(RoundRecord(round=3))
    assert rounds(again) == [1, 3]
    assert b"\0" not in folder.metrics.read_bytes()


def test_rewinding_forgets_later_rounds_and_the_end_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = make(tmp_path)
    folder.append(RunRecord("wiki"))
    for t in range(1, 5):
        folder.append(RoundRecord(round=t, seconds=1.0))
    folder.append(BaselineRecord("local"))
    folder.append(FinalRecord(4))
    folder.append({"kind": "round", "round": 5})
    folder.rewind(2)
    folder.append(RoundRecord(round=3, seconds=7.0))
    h = history(folder.path)
    assert [(x.round, x.seconds) for x in h.rounds] == [(1, 1.0), (2, 1.0), (3, 7.0)]
    assert h.final is None
    assert h.run.name == "wiki"
    assert "local" in h.baselines


def test_a_record_that_would_not_read_back_is_not_written(tmp_path: Path) -> None:
    folder = make(tmp_path)
    with pytest.raises(ValueError, match="kind: got 'rund'; want run, round"):
        folder.append({"kind": "rund", "round": 1})
    with pytest.raises(DataError, match="the new record: no 'round'"):
        folder.append({"kind": "round"})
    with pytest.raises(ValueError, match="a record holds numbers"):
        folder.append({"kind": "round", "round": 1, "seconds": {1, 2}})  # type: ignore[dict-item]
    assert not folder.metrics.exists()


def test_only_one_process_writes_to_a_run(tmp_path: Path) -> None:
    folder = make(tmp_path)
    script = (
        "import sys; from pathlib import Path; from fedpeft.report import RunFolder\n"
        "try:\n with RunFolder.open(Path(sys.argv[1])).held(): print('free')\n"
        "except ValueError as error: print(error)\n"
    )

    def other() -> str:
        return subprocess.run(
            [sys.executable, "-c", script, str(folder.path)], capture_output=True, text=True, check=True
        ).stdout

    with folder.held():
        assert "another process is writing this run" in other()
    assert other() == "free\n"


def test_an_error_inside_a_held_folder_is_not_mistaken_for_another_writer(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), make(tmp_path).held():
        raise BlockingIOError


def test_other_files_are_put_in_whole(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert folder.write("notes.md", "ü").read_bytes() == "ü".encode()


def test_a_path_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a file")
    with pytest.raises(DataError, match=r"x: not written \(File exists\)"):
        RunFolder.create(tmp_path / "x", "")
    folder = make(tmp_path)
    folder.metrics.mkdir()
    with pytest.raises(DataError, match=r"metrics\.jsonl: can't be read"):
        history(folder.path)
    (folder.path / ".writing").mkdir()
    with pytest.raises(DataError, match=r"\.writing: not written"), folder.held():
        pytest.fail("held")


def test_two_views_of_one_run_do_not_write_over_one_another(tmp_path: Path) -> None:
    one = make(tmp_path)
    two = RunFolder.open(one.path)
    for t, view in enumerate([one, two, two, one], start=1):
        view.append(RoundRecord(round=t))
    assert rounds(one) == [1, 2, 3, 4]
    two.rewind(2)
    one.append(RoundRecord(round=3, seconds=5.0))
    assert rounds(one) == [1, 2, 3]
    assert one.metrics.read_bytes().count(b"\0") == 0
