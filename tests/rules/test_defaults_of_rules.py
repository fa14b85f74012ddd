"""What a rule does where its settings are left out."""

from dataclasses import asdict

import pytest

from fedpeft.rules import (
    FactorMean,
    FedEx,
    FedKSeed,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    Krum,
    LoRAFair,
    Scaffold,
    Subspace,
    TrimmedMean,
)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (FactorMean(), {"cycle": ("ab",), "personalised": False, "owners": False, "rest": "frozen"}),
        (FedEx(), {"energy": 1.0, "largest": None}),
        (FedKSeed(seed=3), {"seed": 3, "size": 1024, "epsilon": 1e-3}),
        (FlexLoRA(), {"form": "drift"}),
        (FLoRA(seed=3), {"seed": 3, "energy": 1.0, "largest": None}),
        (HetLoRA(), {"gamma": 0.99, "penalty": 1e-3}),
        (Krum(), {"share": 0.3, "many": False}),
        (LoRAFair(), {"ridge": 0.01}),
        (Scaffold(), {"of": "fedit", "rest": "frozen"}),
        (Subspace(seed=3), {"seed": 3, "oversampling": 8, "one_pass": False, "warm": True}),
        (TrimmedMean(), {"share": 0.3}),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_setting_that_is_left_out_has_this_value(rule, settings):
    assert asdict(rule) == settings
