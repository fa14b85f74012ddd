"""A device needs no torch: not to import what it runs, and not to train."""

import json
import subprocess
import sys

from tests.ondevice import small_kit


def test_a_job_is_trained_where_torch_can_not_be_imported(kits):
    program = small_kit.__file__.replace("small_kit", "without_torch")
    found = subprocess.run(
        [sys.executable, program, str(kits["lm"].folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 0, found.stderr
    before, after, imported = json.loads(found.stdout)
    assert imported == []
    assert after < before
