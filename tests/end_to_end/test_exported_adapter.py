"""The exported adapter, loaded without any of our code, has the test metric that the report shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft.config import experiment
from fedpeft.report import history
from fedpeft.run import Lines, simulate
from fedpeft.run.workshop import workshop

SETTINGS = {
    "rounds": 2,
    "model": {"name": "minilm"},
    "data": {"name": "wiki11", "examples": 260},
    "partition": {"name": "iid", "clients": 3},
    "adapter": {"rank": 5, "targets": ["query", "value"]},
    "training": {"batch": 8, "length": 20, "lr": 5e-3},
    "evaluation": {"every": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_plain_peft_gives_the_reports_metric(tmp_path, method):
    targets = {"lora": {}, "ia3": {"targets": ["query", "value"]}}[method]
    found = experiment(SETTINGS | {"adapter": {"method": method, **(targets or SETTINGS["adapter"])}})
    folder = simulate(found, tmp_path / "run", Lines())
    here = workshop(found.settings_json)
    central = here.federation.part(None, "test")
    rows = {"texts": list(central.texts), "labels": central.labels.tolist(), "classes": list(central.classes)}
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf8")
    script = Path(__file__).with_name("plain_evaluation.py")
    done = subprocess.run(
        [sys.executable, script, here.trainer.frozen.origin, folder / "adapter", tmp_path / "rows.json", "20"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plain = json.loads(done.stdout.splitlines()[-1])
    ours = history(folder).final.central
    assert ours.accuracy == pytest.approx(plain["accuracy"], abs=1e-6)
    # Rows are evaluated one by one there and in padded batches here: fp32 sums in another order.
    assert ours.loss == pytest.approx(plain["loss"], abs=1e-6 * max(1.0, plain["loss"]))
