"""Plain torch and peft, as the benchmark has them, do the work that our loop does."""

import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from fedpeft.rounds import Done
from fedpeft.training.loop import TorchTrainer

FOLDER = Path(__file__).parents[2] / "benchmarks"
CLIENTS = 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_plain_training_gives_the_loops_losses_and_adapters(tmp_path, monkeypatch):
    for name in ("plain", "work"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(FOLDER))
    plain, work = (importlib.import_module(name) for name in ("plain", "work"))
    case = work.CASES["tiny"]
    work.write(case, tmp_path)
    facts = json.loads((tmp_path / "work.json").read_text())
    loop = work.alone(work.trainer(case, "fp32"))
    assert type(loop) is TorchTrainer
    todo = work.jobs(loop)[:CLIENTS]
    start = load_file(tmp_path / "start.safetensors")
    model = plain.load(facts)
    for mine, job, done in zip(facts["clients"], todo, loop.train_many(todo), strict=False):
        assert isinstance(done, Done)
        state, loss, tokens = plain.fit(model, start, mine, facts, in_plan=True)
        assert len(mine["ids"]) == case.rows
        assert loss == pytest.approx(done.metrics.loss, abs=1e-4)  # sums of fp32 losses in another order
        lengths = [len(ids) for ids in mine["ids"]]
        assert tokens == sum(len(batch) * max(lengths[i] for i in batch) for batch in mine["plan"])
        name = next(n for n in done.trained.layers if n.endswith("query"))
        got = state[f"base_model.model.{name.removeprefix('base_model.model.')}.lora_B.weight"].numpy()
        want = done.trained.layers[name].b
        assert np.abs(want).max() > 1e-4  # it was zero at the start
        np.testing.assert_allclose(got, want, atol=1e-6)  # of steps of 1e-3
        assert loop.rows(job.client, "train").targets.tolist() == mine["targets"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_all_clients_have_the_same_number_of_rows_and_share_none(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    work = importlib.import_module("work")
    whole = work.trainer(work.CASES["tiny"], "fp32")
    rows = np.concatenate([whole.rows(client, "train").index for client in range(work.CLIENTS)])
    assert len(rows) == len(np.unique(rows)) == work.CLIENTS * work.CASES["tiny"].rows


def answers(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The lines of JSON that a worker has printed."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_workers_answer_line_by_line_and_agree(tmp_path, monkeypatch, capsys):
    for name in ("plain", "work", "engines", "measure"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(FOLDER))
    plain, work, engines = (importlib.import_module(name) for name in ("plain", "work", "engines"))
    work.write(work.CASES["tiny"], tmp_path)
    asked = {}
    for way, module, argv in (
        ("plain", plain, ["plain.py", str(tmp_path)]),
        ("loop", engines, ["engines.py", "tiny", "loop"]),
        ("cohort-fp32", engines, ["engines.py", "tiny", "cohort-fp32"]),
    ):
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"plan {CLIENTS}\nrandom {CLIENTS + 1}\n"))
        capsys.readouterr()
        module.main()
        ready, first, second = answers(capsys)
        assert ready["ready"] is True
        assert (len(first["losses"]), len(second["losses"])) == (CLIENTS, CLIENTS + 1)
        assert min(first["seconds"], first["cpu seconds"], first["peak MB"]) > 0
        asked[way] = first
    tokens = {way: sum(rows * length for rows, length in asked[way]["passes"]) for way in ("loop", "cohort-fp32")}
    assert tokens["loop"] == asked["plain"]["padded tokens"]
    assert tokens["cohort-fp32"] >= tokens["loop"]
    assert len(asked["cohort-fp32"]["passes"]) < len(asked["loop"]["passes"])  # clients share passes
    for way in tokens:
        assert asked[way]["losses"] == pytest.approx(asked["plain"]["losses"], abs=1e-4)  # as above
