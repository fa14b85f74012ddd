"""report.html: self-contained, escaped, the same every time, for runs of every size."""

import re
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedpeft.report import (
    BaselineRecord,
    FinalRecord,
    RoundRecord,
    RunFolder,
    RunRecord,
    Score,
    Scores,
    history,
    recipe,
    write_report,
)

Make = Callable[..., RunFolder]
EMPTY_TAGS = {"meta", "br", "path", "use", "rect", "image", "stop", "col"}


class Tree(HTMLParser):
    """Checks that tags nest, and keeps texts, tags and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v for k, v in attrs if v and k in ("href", "src", "xlink:href")]
        if tag not in EMPTY_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v for k, v in attrs if v and k in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY_TAGS:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(folder: RunFolder) -> tuple[str, Tree]:
    text = write_report(folder.path).read_text(encoding="utf-8")
    tree = Tree()
    tree.feed(text)
    assert tree.open == []
    return text, tree


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"clients": 1, "rounds": 1, "fraction": 1.0},
        {"clients": 20, "rounds": 1},
        {"clients": 1000, "rounds": 3, "fraction": 0.1},
        {"clients": 45, "rounds": 2, "baselines": False},
        {"task": "lm", "clients": 5},
        {"rounds_recorded": 0},
        {"rounds_recorded": 3, "baselines": False},
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) or "demo",
)
def test_a_report_of_any_size_is_whole_and_fetches_nothing(run: Make, facts: dict[str, object]) -> None:
    text, tree = read(run(**facts))
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in tree.links)
    assert "script" not in tree.tags
    assert "link" not in tree.tags
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text)) <= set(ids)
    assert "nan" not in re.findall(r"\w+", tree.text.lower().replace("holds nan", ""))
    assert len(text) < 1_500_000


def test_the_headline_states_the_result_against_each_baseline(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "wiki", "")
    folder.append(RunRecord("wiki", {"model": {"name": "minilm"}, "seed": 7}, {"numpy": "2.4.6"}))
    folder.append(BaselineRecord("base", Score(2.0, 0.10), {1: Score(2.0, 0.2), 2: Score(2.0, 0.1)}))
    folder.append(BaselineRecord("local", Score(1.0, 0.5004), {1: Score(1.0, 0.6), 2: Score(1.0, 0.9)}))
    folder.append(BaselineRecord("central-training", Score(0.5, 0.85)))
    folder.append(RoundRecord(1, (1, 2), (1,), ((2, "late"),), bytes_up=1000, bytes_down=3000, seconds=2.0))
    test = Scores(0.6, 0.8, {1: Score(0.6, 0.7), 2: Score(0.5, 0.95)})
    folder.append(FinalRecord(1, Score(0.6, 0.8), test, 75.0, "f00d", 1000, 3000))
    text = read(folder)[1].text
    assert (
        "80.0 % accuracy on the central test set: 70.0 points above the base model, 30.0 points above the mean" in text
    )
    assert "5.0 points below training on all the data in one place" in text
    assert "Federated (this run)80.0 %0.60082.5 %70.0 %" in text
    assert "2 of 2 clients do better than alone; mean gain +7.5 points, smallest +5.0." in text
    assert "A client sends 1 kB and receives 1.5 kB" in text
    assert "1 of 2; each round went on without them: late (1)." in text
    assert "1 min 15 s" in text
    assert "fedpeft run wiki/config.lock.toml" in text
    assert "f00d" in text
    assert "numpy 2.4.6" in text


def test_a_run_without_central_scores_is_told_by_its_mean_client(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "x", "")
    folder.append(RoundRecord(1, validation=Scores(0.5, 0.6, {1: Score(0.5, 0.5), 2: Score(0.5, 0.9)})))
    text = read(folder)[1].text
    assert "reaches 70.0 % accuracy on the mean client's own test set." in text
    assert "This run is not complete: 1 round recorded" in text


def test_everything_a_user_wrote_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('&')</script>$x^2$"
    folder = RunFolder.create(tmp_path / "x", "")
    settings = {"model": {"name": evil}, evil: {evil: [evil]}, "seed": evil, "rule": {"name": evil}}
    clients = {str(n): {"examples": 3, "labels": {evil: 2, "b": 1}} for n in range(3)}
    folder.append(
        {"kind": "run", "name": evil, "settings": settings, "versions": {evil: evil, "fedpeft": evil}}
        | {"clients": clients, "command": evil, "labels": [evil]}
    )
    folder.append(RoundRecord(1, (1,), (), ((1, evil),), train=Score(1.0, 0.5), timeline=((1, 0.0, 1.0),)))
    folder.append(FinalRecord(1, adapter_digest=evil))
    text, tree = read(folder)
    assert "<script" not in text
    assert tree.text.count(evil) >= 10
    assert "script" not in tree.tags


def test_the_same_records_give_the_same_page_in_another_process(run: Make) -> None:
    folder = run(clients=6, rounds=3)
    here = write_report(folder.path).read_bytes()
    script = (
        "import sys; from pathlib import Path; from fedpeft.report import write_report; write_report(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", script, str(folder.path)], check=True, env={"PYTHONHASHSEED": "5"})
    assert (folder.path / "report.html").read_bytes() == here


def test_the_snippet_names_the_base_and_head_of_the_exported_adapter(run: Make) -> None:
    folder = run(clients=3, rounds=1)
    assert "fedpeft export" in recipe.use(history(folder.path))
    (folder.path / "adapter").mkdir()
    config = '{"base_model_name_or_path": "models/minilm", "task_type": "SEQ_CLS"}'
    (folder.path / "adapter" / "adapter_config.json").write_text(config)
    text = unescape(recipe.use(history(folder.path)))
    assert "AutoModelForSequenceClassification.from_pretrained('models/minilm', num_labels=" in text
    assert f"PeftModel.from_pretrained(base, '{folder.path.name}/adapter')" in text
    assert "fedpeft export" not in text


def test_importing_the_room_loads_no_matplotlib_and_no_torch() -> None:
    script = "import sys, fedpeft.report; print(sorted({'matplotlib', 'torch', 'flwr'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
