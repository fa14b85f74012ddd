"""The numpy optimisers are torch's, step by step, and so are clipping, the proximal term and a rule's additions."""

import numpy as np
import pytest
import torch

from fedpeft.adapters import Adapter, LowRank
from fedpeft.ondevice.objective import Extra
from fedpeft.ondevice.optimise import clip, optimiser, proximal
from fedpeft.rules import Objective
from fedpeft.training import objectives
from fedpeft.training.settings import Training

SHAPES = {"a": (3, 7), "b": (5, 3), "bias": (4,)}
CLOSE = {"rtol": 1e-6, "atol": 1e-7}  # a few units in the last place of fp32: sums are in another order


def drawn(seed: int) -> dict[str, np.ndarray]:
    """Numbers of both signs and of several sizes."""
    rng = np.random.default_rng(seed)
    return {n: (rng.standard_normal(s) * 10.0 ** rng.uniform(-3, 1, s)).astype(np.float32) for n, s in SHAPES.items()}


def parameters(values: dict[str, np.ndarray]) -> dict[str, torch.nn.Parameter]:
    return {n: torch.nn.Parameter(torch.tensor(x)) for n, x in values.items()}


@pytest.mark.parametrize(
    "training",
    [
        Training(lr=0.03),
        Training(lr=0.3, weight_decay=0.2),
        Training("sgd", lr=0.03),
        Training("sgd", lr=0.03, momentum=0.7),
        Training("sgd", lr=0.03, momentum=0.7, weight_decay=0.2),
    ],
)
def test_each_step_of_an_optimiser_is_torchs(training):
    mine, theirs = drawn(0), parameters(drawn(0))
    mine["b"] = np.pad(mine["b"], ((0, 0), (0, 2)), constant_values=9.0)  # trained is a view of a wider factor
    views = mine | {"b": mine["b"][:, :3]}
    steps = optimiser(training, views)
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    further = {"momentum": training.momentum} if training.optimiser == "sgd" else {}
    torchs = kinds[training.optimiser](theirs.values(), lr=training.lr, weight_decay=training.weight_decay, **further)
    for step in range(1, 6):
        slopes = drawn(step)
        before = {n: x.copy() for n, x in slopes.items()}
        for n, x in theirs.items():
            x.grad = torch.tensor(slopes[n])
        torchs.step()
        steps.step(slopes)
        for n, x in theirs.items():
            np.testing.assert_allclose(views[n], x.detach().numpy(), **CLOSE, err_msg=f"{n} after step {step}")
            np.testing.assert_array_equal(slopes[n], before[n])
            assert views[n].dtype == np.float32
    np.testing.assert_array_equal(mine["b"][:, 3:], 9.0)


@pytest.mark.parametrize("most", [0.5, 1e3])
def test_clipping_is_torchs(most):
    mine, theirs = drawn(1), parameters(drawn(2))
    for n, x in theirs.items():
        x.grad = torch.tensor(mine[n])
    total = torch.nn.utils.clip_grad_norm_(theirs.values(), most)
    assert clip(mine, most) == pytest.approx(float(total), rel=1e-6)
    for n, x in theirs.items():
        np.testing.assert_allclose(mine[n], x.grad.numpy(), **CLOSE)


def test_a_gradient_that_is_no_number_is_one_in_no_tensor_once_clipped():
    slopes = drawn(1)
    slopes["bias"][2] = np.nan
    clip(slopes, 1.0)
    assert all(np.isnan(x).all() for x in slopes.values())


def test_the_proximal_term_is_torchs():
    slopes, now, start = drawn(1), drawn(2), drawn(3)
    theirs = parameters(now)
    for n, x in theirs.items():
        x.grad = torch.tensor(slopes[n])
    objectives.Proximal(0.3)(theirs.values(), [torch.tensor(x) for x in start.values()]).backward()
    proximal(slopes, now, start, 0.3)
    for n, x in theirs.items():
        np.testing.assert_allclose(slopes[n], x.grad.numpy(), rtol=1e-5, atol=1e-6)  # of numbers near 1 that cancel


@pytest.mark.parametrize("zero", ["", "q/a", "q/b"])
def test_what_a_rule_adds_is_what_it_adds_under_torch(zero):
    x = drawn(4)
    start = Adapter({"q": LowRank(x["a"], x["b"], 2.0)}, {"bias": x["bias"]})
    now = {n: y.copy() for n, y in start.tensors().items()}
    if zero:
        now[zero][...] = 0
    objective = Objective(0.3, {"q": 1}, {"q/b": drawn(5)["b"].astype(np.float64), "bias": drawn(6)["bias"]})
    theirs = parameters(now)
    slopes = dict(zip(now, drawn(7).values(), strict=True))
    for n, p in theirs.items():
        p.grad = torch.tensor(slopes[n])
    torchs = objectives.Extra.of(objective, theirs, objective.shift)
    mine = Extra.of(objective, start, now)
    for name in ("penalise", "shift"):
        getattr(torchs, name)()
    mine.penalise(slopes, now)
    mine.shift(slopes)
    for n, p in theirs.items():
        np.testing.assert_allclose(slopes[n], p.grad.numpy(), **CLOSE)


def test_a_penalty_wants_both_factors_trained_and_a_shift_tensors_that_are_there():
    x = drawn(4)
    start = Adapter({"q": LowRank(x["a"], x["b"], 2.0)}, {"bias": x["bias"]})
    trained = {n: y for n, y in start.tensors().items() if n != "q/a"}
    with pytest.raises(ValueError, match="a penalty on q/a, which is not trained; want both factors trained"):
        Extra.of(Objective(0.1, {"q": 1}), start, trained)
    assert Extra.of(Objective(0.0, {"q": 1}), start, trained).cuts == {}
    assert list(Extra.of(Objective(shift={"q/a": x["a"], "q/b": x["b"]}), start, trained).shifts) == ["q/b"]
    with pytest.raises(ValueError, match="no such tensor in the adapter: v/a"):
        Extra.of(Objective(shift={"v/a": x["a"]}), start, trained)
