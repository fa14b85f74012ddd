"""The throughput benchmark compares like with like, and stops where it does not."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import BertConfig

FOLDER = Path(__file__).parents[2] / "benchmarks"
LENGTHS = (5, 7, 3)


@pytest.fixture
def throughput(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "throughput", raising=False)
    found = importlib.import_module("throughput")
    config = BertConfig(hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3)
    monkeypatch.setattr(found, "AutoConfig", type("Fake", (), {"from_pretrained": staticmethod(lambda _: config)}))
    return found


def work(throughput: ModuleType) -> dict[str, Any]:
    mine = {"ids": [[1] * n for n in LENGTHS], "targets": [0, 1, 2]}
    return {"task": "classify", "folder": "", "clients": [mine] * throughput.CLIENTS}


def ways(throughput: ModuleType, **changes: Any) -> list[Any]:
    """Plain and two engines with made-up answers; changes: to the last one's."""
    made = []
    for name, seconds in (("plain", 8.0), ("loop", 4.0), ("cohort-bf16", 2.0)):
        check = {"losses": [3.0] * throughput.CHECKED, "passes": [(3, 7)] * throughput.CHECKED}
        check["padded tokens"] = 21 * throughput.CHECKED
        best = {"seconds": seconds, "cpu seconds": 9.0, "peak MB": 1.0, "losses": [3.0] * throughput.CLIENTS}
        best |= {"passes": [(6, 7)] * (throughput.CLIENTS // 2), "padded tokens": 21 * throughput.CLIENTS}
        made.append(throughput.Way(name, None, {"attention": "sdpa"}, check, best))
    made[-1].check |= changes
    return made


def test_a_row_counts_real_tokens_and_pads_apart(throughput):
    plain, _, cohort = ways(throughput)
    row = throughput._row("case", cohort, work(throughput), plain, {"fp32": 1.0, "bf16": 4.0})
    real = sum(LENGTHS) * throughput.CLIENTS
    assert (row["real tokens"], row["padded tokens"]) == (real, 21 * throughput.CLIENTS)
    assert row["tokens/s"] == real / 2.0
    assert row["ratio"] == 4.0
    assert row["loss differs by"] == 0.0
    sizes = throughput.Sizes(2, 12, 20, 2, 12, 12, throughput.RANK, 0)
    needed = sizes.step(LENGTHS * throughput.CLIENTS, 0)
    assert row["share of the roof"] == pytest.approx(needed / 2.0 / 4e9)
    padded = sizes.step([7] * 3 * throughput.CLIENTS, 0)
    assert row["share of the roof, with pads"] == pytest.approx(padded / 2.0 / 4e9)


def test_ways_that_did_the_same_work_pass(throughput):
    throughput._need_same(ways(throughput), work(throughput), 3.0)


def test_losses_that_differ_stop_the_benchmark(throughput):
    off = [3.0] * (throughput.CHECKED - 1) + [3.0 + 3 * 0.11]  # of three rows: 0.11 in the mean
    with pytest.raises(RuntimeError, match=r"cohort-bf16: a client.s mean loss differs by 0\.11"):
        throughput._need_same(ways(throughput, losses=off), work(throughput), 3.0)


def test_another_loss_in_rays_round_stops_the_benchmark(throughput):
    with pytest.raises(RuntimeError, match="FlowerTune"):
        throughput._need_same(ways(throughput), work(throughput), 3.01)


def test_other_padding_in_the_same_order_stops_the_benchmark(throughput):
    made = ways(throughput)
    made[0].check["padded tokens"] += 1
    with pytest.raises(RuntimeError, match="in the same order"):
        throughput._need_same(made, work(throughput), 3.0)
