"""The commands as a user types them: what they print, what they refuse, what they leave behind."""

import csv
import json

import pytest
from typer.testing import CliRunner

from fedpeft.cli import app, main
from fedpeft.errors import ConfigError, DataError, ProtocolError

TINY = """
name = "t"
seed = 3
rounds = 2
[model]
name = "tiny-bert"
[data]
name = "{data}"
[partition]
name = "iid"
clients = 3
[adapter]
rank = 3
[training]
batch = 8
length = 12
threads = 1
lr = 5e-3
[baselines]
local = true
central = true
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A user's own CSV and an experiment on it."""
    folder = tmp_path_factory.mktemp("own")
    words = {"fruit": ["apple", "pear", "plum", "fig"], "tool": ["hammer", "saw", "drill", "file"]}
    with (folder / "own.csv").open("w", newline="", encoding="utf8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for i in range(40):
            for label, names in words.items():
                rows.writerow([f"{names[i % 4]} number {i} {names[(i + 1) % 4]}", label])
    path = folder / "own.toml"
    path.write_text(TINY.format(data=folder / "own.csv"), encoding="utf8")
    return path


@pytest.fixture(scope="module")
def done(experiment, tmp_path_factory):
    """The folder of a run that is over."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    result = CliRunner().invoke(app, ["run", str(experiment), "--folder", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "round 2/2" in result.output
    assert "federated" in result.output
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)


@pytest.mark.slow
def test_a_run_leaves_what_the_readme_promises(done):
    for name in ("report.html", "metrics.jsonl", "config.lock.toml", "checkpoints", "adapter/adapter_config.json"):
        assert (done / name).exists()
    records = [json.loads(x) for x in (done / "metrics.jsonl").read_text(encoding="utf8").splitlines()]
    assert {x["schema"] for x in records} == {1}
    assert [x["kind"] for x in records] == ["run", "round", "round", "memory", "final", *["baseline"] * 3]
    assert "torch" in (done / "config.lock.toml").read_text(encoding="utf8")


@pytest.mark.slow
def test_a_finished_run_is_refused_a_second_time_and_resume_changes_nothing(done, experiment):
    with pytest.raises(DataError, match="holds a run already; resume it, name another folder, or use --force"):
        invoke("run", experiment, "--folder", done)
    before = (done / "metrics.jsonl").read_bytes()
    assert invoke("resume", done).exit_code == 0
    assert (done / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_run_can_be_exported_for_peft_and_transformers(done, tmp_path):
    assert invoke("export", done, "--to", "peft", "--out", tmp_path / "a").exit_code == 0
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        done / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert invoke("export", done, "--to", "merged", "--out", tmp_path / "m").exit_code == 0
    assert (tmp_path / "m" / "config.json").is_file()
    assert (tmp_path / "m" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_a_run_can_be_exported_for_onnxruntime(done):
    result = invoke("export", done, "--to", "onnx")
    assert result.exit_code == 0
    assert "".join(result.output.split()) == "".join(f"written: {done / 'onnx'}".split())
    names = {x.name for x in (done / "onnx").iterdir()}
    assert {"model.onnx", "README.md", "labels.json", "tokenizer.json"} <= names


@pytest.mark.slow
def test_a_classifier_is_refused_for_llama_cpp(done):
    with pytest.raises(ConfigError, match=r"llama.cpp runs language models: export to onnx or merged"):
        invoke("export", done, "--to", "gguf")
    assert not (done / "gguf").exists()


def test_export_teaches_what_each_format_is_for():
    said = " ".join(invoke("export", "--help").output.split())
    for words in ("onnxruntime", "llama.cpp", "transformers", "peft", "Llama", "GPT-2", "1e-4", "fedpeft[onnx]"):
        assert words in said


@pytest.mark.slow
def test_runs_are_compared_in_a_table_and_a_page(done, experiment, tmp_path):
    other = tmp_path / "two"
    assert invoke("run", experiment, "--folder", other, "-c", "rule.name=ffa", "-c", "name=ffa").exit_code == 0
    result = invoke("compare", done, other, "--out", tmp_path / "c")
    assert result.exit_code == 0
    assert "ffa" in result.output
    assert list((tmp_path / "c").glob("*.html"))


def test_check_says_what_a_run_takes(experiment):
    result = invoke("check", experiment)
    assert result.exit_code == 0
    for words in ("clients", "trained numbers", "up", "down", "memory"):
        assert words in result.output
    assert 'name = "fedit"' in result.output
    assert "at most" not in result.output
    assert "at most" in invoke("check", experiment, "-c", "ranks={name='levels',levels=[1,2]}").output


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ("adapter.rank=4000", ConfigError, "adapter.rank"),
        ("adapter.targets=['nowhere']", ConfigError, "adapter.targets"),
        ("adapter.method=nothing", ConfigError, "adapter.method"),
        ("model.name=./nowhere", ConfigError, "model.name"),
        ("data.name=nowhere.csv", DataError, "nowhere.csv"),
        ("data.label=colour", ConfigError, "data.label"),
        ("partition.clients=4000", ConfigError, "partition"),
        ("training.length=100000", ConfigError, "training.length"),
        ("rule.name=fedavg", ConfigError, "rule.name"),
    ],
)
def test_check_refuses_what_cannot_run_and_names_the_key(experiment, change, kind, message):
    with pytest.raises((ConfigError, DataError)) as error:
        invoke("check", experiment, "-c", change)
    assert type(error.value) is kind
    assert message in str(error.value)


def test_check_refuses_a_run_that_is_larger_than_the_machine(experiment, monkeypatch):
    machine = {"total": 200_000_000, "available": 100_000_000}  # less than Python and torch take by themselves
    monkeypatch.setattr("fedpeft.training.environment.memory", lambda: machine)
    with pytest.raises(ConfigError, match=r"^training\.batch: got 8, with which the run takes about .* has 0\.2 GB"):
        invoke("check", experiment)


def test_a_class_that_no_client_trains_on_is_refused(experiment, tmp_path):
    file = tmp_path / "rare.csv"
    rows = [f"word {i},{'ab'[i % 2]}" for i in range(60)] + ["alone,rare"]
    file.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf8")
    changes = ["-c", f"data.name={file}", "-c", "data.classes=['a','b','rare']"]
    seeds = [x for seed in range(8) for x in [seed]]
    said = []
    for seed in seeds:  # the one row of the class is in the central test set or a client's held-out rows for some seed
        try:
            invoke("check", experiment, *changes, "-c", f"seed={seed}", "-c", "split.central=0.45")
        except ConfigError as error:
            said.append(str(error))
    assert said
    assert all("no client trains on 1 of the classes: rare" in x for x in said)


@pytest.mark.parametrize("command", ["run", "check", "resume", "compare", "export", "sweep", "doctor", "demo"])
def test_every_command_explains_itself(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
    assert len(result.output.splitlines()) > 5


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["fedpeft", "run", str(tmp_path / "none.toml")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "none.toml: no such file" in said
    assert "Traceback" not in said


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys, experiment):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedpeft.run.simulate", stop)
    monkeypatch.setattr("sys.argv", ["fedpeft", "run", str(experiment)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert "`fedpeft resume RUN` goes on from the last checkpoint" in capsys.readouterr().err


def test_a_protocol_error_ends_the_command_with_its_reason(monkeypatch, capsys, experiment):
    def fail(*arguments, **options):
        raise ProtocolError("too few answers: got 1; want at least 2")

    monkeypatch.setattr("fedpeft.run.simulate", fail)
    monkeypatch.setattr("sys.argv", ["fedpeft", "run", str(experiment)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "too few answers: got 1" in capsys.readouterr().err
