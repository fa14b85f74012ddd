"""Nodes with data sets of their own, served one message at a time as deployed ones are."""

from collections.abc import Iterator

import pytest
import tomli_w

from fedpeft.flower import InProcessGrid, answer
from fedpeft.report import history
from fedpeft.run import export_run, participant, serve_run


@pytest.mark.slow
def test_nodes_with_data_of_their_own_train_together_and_the_coordinator_exports_the_adapter(tmp_path, capsys):
    for c in range(3):
        rows = [f"{'apple pear' if i % 2 else 'hammer saw'} number {i} of {c},{'ab'[i % 2]}" for i in range(20 + c)]
        (tmp_path / f"{c}.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf8")
    experiment = {
        "rounds": 1,
        "model": {"name": "tiny-bert"},
        "data": {"name": "each node's own", "classes": ["a", "b"]},
        "fleet": {"own_data": True, "nodes": 4, "wait": 20.0},
        "evaluation": {"central": False},
        "training": {"length": 8, "threads": 1},
    }
    (tmp_path / "own.toml").write_text(tomli_w.dumps(experiment), encoding="utf8")

    def handle(messages, nodes) -> Iterator:
        for message in messages:
            yield from answer(participant, [message], nodes)

    nodes = [
        {"partition-id": c, "data": str(tmp_path / f"{c}.csv"), "state": str(tmp_path / "state")} for c in range(3)
    ]
    run = tmp_path / "run"
    config = {"experiment": str(tmp_path / "own.toml"), "folder": str(run)}
    serve_run(InProcessGrid(handle, nodes), config)
    found = history(run)
    assert found.rounds[0].survivors == (0, 1, 2)
    assert sorted(found.final.test.clients) == [0, 1, 2]
    assert "beginning with 3 of 4 clients: 3 can't take part" in capsys.readouterr().out
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    out = export_run(run, "peft", tmp_path / "again")
    assert (out / "adapter_model.safetensors").read_bytes() == weights
