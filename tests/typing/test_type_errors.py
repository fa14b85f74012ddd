"""What the types alone must forbid."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_a_list_rule_in_a_sum_round_does_not_type_check():
    files = [HERE / "list_rule_in_sum_round.py", HERE / "mean_rule_in_sum_round.py"]
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file",
        os.devnull,
        "--no-error-summary",
        *map(str, files),
    ]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1, done.stdout + done.stderr  # and none in the twin, nor in the library
    where, what = errors[0].split(": error: ")
    line = int(re.search(r"list_rule_in_sum_round\.py:(\d+)", where)[1])
    assert "rule=Median()" in files[0].read_text().splitlines()[line - 1]
    assert what == 'Argument "rule" to "SumRound" has incompatible type "Median"; expected "MeanRule"  [arg-type]'
