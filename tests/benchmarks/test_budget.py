"""A real model trains within the memory that it may have, and not within half of it."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "budget.py"
SPEC = importlib.util.spec_from_file_location("benchmark_budget", PATH)
assert SPEC is not None
assert SPEC.loader is not None
budget = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = budget  # where its dataclasses look for themselves
SPEC.loader.exec_module(budget)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is the kernel's, and the peak is read from /proc")
def test_torch_trains_smollm2_in_768_mb_and_not_in_half():
    case = replace(next(x for x in budget.CASES if x.name == "torch-int8"), steps=5)
    free = budget.run(case, None)  # which also packs the base, where that was not done before
    within = budget.run(case, case.budget)
    assert case.budget == 768
    assert within.peak <= 768
    assert within.after < within.before - 0.1
    assert (within.before, within.after, within.training) == (free.before, free.after, free.training)
    with pytest.raises(budget.BudgetError, match=r"memory|Error"):
        budget.run(case, case.budget // 2)
