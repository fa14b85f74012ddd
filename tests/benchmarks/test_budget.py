"""A real model trains within the memory that it may have, and not within half of it."""

import sys
from dataclasses import replace

import pytest

from tests.benchmarks.scripts import script

budget = script("budget")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is the kernel's, and the peak is read from /proc")
@pytest.mark.parametrize(("name", "limit"), [("torch-int8", 768), ("onnx-int8", 512)])
def test_smollm2_trains_within_its_budget_and_not_in_half_of_it(name, limit, tmp_path):
    case = replace(next(x for x in budget.CASES if x.name == name), steps=5)
    packages = kit = None
    if case.runtime == "onnx":
        packages, kit = budget.without_torch(tmp_path / "packages"), budget.kit_of_case(case)
    free = budget.run(case, None, kit, packages)  # which also packs torch's base, where that was not done before
    within = budget.run(case, case.budget, kit, packages)
    assert case.budget == limit
    assert within.peak <= limit  # with the files that are mapped, which the kernel's limit leaves out
    assert within.after < within.before - 0.1
    assert (within.before, within.after, within.training) == pytest.approx(
        (free.before, free.after, free.training),
        rel=1e-6,  # onnxruntime without its arena may order sums otherwise
    )
    with pytest.raises(budget.BudgetError, match=r"memory|Error|bad_alloc"):
        budget.run(case, case.budget // 2, kit, packages)
