"""How exact aggregation was, through whole runs."""

import json
from pathlib import Path

import pytest

from fedpeft.config import read
from fedpeft.report import history, inexact
from fedpeft.run import Lines, simulate

TINY = Path(__file__).resolve().parents[2] / "simulations" / "tiny.toml"


def ran(path, *changes):
    simulate(read(TINY, ["baselines.base=false", *changes]), path, Lines())
    lines = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if x["kind"] == "round"]


@pytest.mark.parametrize("rule", ["fedit", "ffa", "flora"])
def test_a_run_records_its_error_by_round_and_layer_and_its_report_shows_it(tmp_path, rule):
    rounds = ran(tmp_path / "run", f"rule.name={rule}")
    assert len(rounds) == 2
    for record in rounds:
        found = record["exactness"]
        assert [x.split(".", 4)[-1] for x in found["layers"]] == [
            f"layer.{i}.attention.self.{x}" for i in (0, 1) for x in ("query", "value")
        ]
        for error in (found["overall"], *found["layers"].values()):
            # Adapters and answers are fp32 here; two unequal clients in several local steps.
            assert (0.01 < error < 1) if rule == "fedit" else (error < 1e-6)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "How exact the aggregation was" in page
    assert "Relative error of the server" in page
    assert ("is not the mean of the products" in page) == (rule == "fedit")
    assert ("Exact, but for rounding" in page) == (rule != "fedit")


def test_measured_or_not_a_run_is_the_same_but_for_what_it_sends(tmp_path):
    on, off = ran(tmp_path / "on"), ran(tmp_path / "off", "evaluation.exactness=false")
    for x, y in zip(on, off, strict=True):
        assert "exactness" not in y
        assert x["central"] == y["central"]
        assert x["train"] == y["train"]
        assert x["bytes_up"] > y["bytes_up"]
    a, b = (history(tmp_path / name) for name in ("on", "off"))
    assert a.final.adapter_digest == b.final.adapter_digest
    assert inexact(b) is None
    assert "How exact the aggregation was" not in (tmp_path / "off" / "report.html").read_text()
    # Ranks of 4 on 32 × 32 and more: a sketch of p² numbers for at least 10 p² sent.
    assert a.bytes_up < 1.15 * b.bytes_up
