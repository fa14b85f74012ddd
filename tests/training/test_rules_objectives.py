"""What a rule adds to its clients' loss: by hand, in the loop, and with many clients at once."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeft.adapters import Update
from fedpeft.data import Rows
from fedpeft.rounds import Done, Failed
from fedpeft.rules import HetLoRA, Objective, Scaffold, Task
from fedpeft.training.batches import collate
from fedpeft.training.objectives import predictions, scored, shifts, tail_gradients
from fedpeft.training.passes import groups, travel
from fedpeft.training.settings import Method, Training
from tests.training.cohort_cases import (
    SGD,
    assert_agree,
    distance,
    jobs,
    stacked,
    trainers,
    with_ranks,
    with_tails,
)

LAYER = "base_model.model.bert.encoder.layer.0.attention.self.query"
ROUNDING = 1e-6
"""Of a dozen steps of sgd whose numbers are below 1: a unit in the last place of 1 is 1.2e-7."""


def shift_of(job, size=0.4):
    rng = np.random.default_rng(job.client)
    return {n: size * rng.standard_normal(x.shape) for n, x in job.start.tensors(job.trains).items()}


def with_objectives(found, penalties=(0.5, 0.0, 2.0), cut=1, shift=True):
    """The jobs with shifts and penalties of their own, and one in three without a shift."""
    return [
        replace(
            x,
            objective=Objective(
                penalties[i % len(penalties)],
                {n: cut for n, layer in x.start.layers.items() if cut < layer.rank},
                shift_of(x) if shift and i % 3 else {},
            ),
        )
        for i, x in enumerate(found)
    ]


@pytest.mark.parametrize("cut", [0, 1, 3, 4])
def test_the_tails_gradients_are_those_of_its_term_for_each_of_a_batch(cut):
    draw = torch.Generator().manual_seed(cut)
    a, b = (torch.randn(s, generator=draw, dtype=torch.float64, requires_grad=True) for s in ((5, 4, 3), (5, 6, 4)))
    behind = (torch.arange(4) >= cut).to(a).expand(5, 4)
    terms = [torch.sqrt((x[cut:] ** 2).sum()) * torch.sqrt((y[:, cut:] ** 2).sum()) for x, y in zip(a, b, strict=True)]
    if cut < 4:
        sum(terms).backward()
    found = tail_gradients(a.detach(), b.detach(), behind)
    for x, got in zip((a, b), found, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(x) if x.grad is None else x.grad, rtol=1e-12, atol=0)
    single = tail_gradients(a.detach()[2], b.detach()[2], behind[2])
    for x, y in zip(single, found, strict=True):
        assert torch.equal(x, y[2])


@pytest.mark.parametrize("zero", ["a", "b", "ab"])
def test_where_one_norm_is_zero_both_gradients_are(zero):
    factors = {"a": torch.ones(3, 2), "b": torch.ones(4, 3)}
    for part in zero:
        factors[part] *= torch.tensor([1.0, 0.0, 0.0]).reshape((3, 1) if part == "a" else (1, 3))
    for x in tail_gradients(factors["a"], factors["b"], torch.tensor([0.0, 1.0, 1.0])):
        assert torch.equal(x, torch.zeros_like(x))


def by_hand(loop, job, training):
    """A client's trained tensors, from torch's own gradients of the loss and of the penalty as it is written."""
    loop.bridge.write(job.start)
    loop.bridge.trainable(job.trains)
    shift = {n: torch.tensor(x, dtype=torch.float32) for n, x in job.objective.shift.items()}
    live, slopes = {n: x for n, x in loop.bridge.live.items() if x.requires_grad}, []
    bridge, rows = loop.bridge, loop.rows(job.client, "train")
    momenta = {n: torch.zeros_like(x) for n, x in live.items()}
    for group in groups(rows, training, np.random.default_rng(job.seed)):
        batches = [collate(rows, index, loop.frozen, None, loop.place.device) for index in group]
        units = sum(x.units for x in batches)
        loss = sum(scored(predictions(bridge.model, None, x), x.targets)[0].sum() for x in batches) / units
        for name, cut in job.objective.cuts.items():
            left, right = live[f"{name}/a"][cut:], live[f"{name}/b"][:, cut:]
            loss = loss + job.objective.penalty * torch.sqrt((left**2).sum()) * torch.sqrt((right**2).sum())
        found = dict(zip(live, torch.autograd.grad(loss, list(live.values())), strict=True))
        norm = torch.sqrt(sum((x**2).sum() for x in found.values()))
        scale = 1.0 if training.clip is None else min(1.0, training.clip / float(norm))
        slopes.append({n: x * scale for n, x in found.items()})
        with torch.no_grad():
            for n, x in live.items():
                momenta[n] = training.momentum * momenta[n] + slopes[-1][n] + shift.get(n, 0.0)
                x -= training.lr * momenta[n]
    return bridge.read(job.start), slopes


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_the_loop_is_sgd_on_the_clipped_gradient_with_the_penalty_in_it_and_the_shift_behind_it(clip, momentum):
    training = replace(SGD, lr=0.02, epochs=1, clip=clip, momentum=momentum, accumulate=2)
    loop, _ = trainers("tiny-bert", training=training)
    loop.frozen.model.eval()
    for job in with_objectives(jobs(loop, 2, 4, 5)):
        (done,) = loop.train_many([job])
        assert isinstance(done, Done), done
        loop.bridge.model.eval()
        want, _ = by_hand(loop, job, training)
        assert distance(done.trained, want) <= ROUNDING
        (plain,) = loop.train_many([replace(job, objective=Objective())])
        assert distance(done.trained, plain.trained) > 1e-3, "the objective made no difference"


def test_a_way_over_travel_is_the_mean_of_the_clipped_gradients_with_late_ones_counting_less():
    training = replace(SGD, lr=0.01, clip=0.3, momentum=0.6)
    loop, _ = trainers("tiny-bert", training=training)
    (job,) = jobs(loop, 2)
    (done,) = loop.train_many([job])
    loop.bridge.model.eval()
    _, slopes = by_hand(loop, job, training)
    shares = [sum(0.6**j for j in range(len(slopes) - i)) for i in range(len(slopes))]
    assert len(slopes) == 6  # 9 rows in batches of 3, twice
    assert done.travel == pytest.approx(0.01 * sum(shares), rel=1e-12)
    start, end = job.start.tensors(), done.trained.tensors()
    for name, x in start.items():
        want = sum(w * g[name].numpy() for w, g in zip(shares, slopes, strict=True)) / sum(shares)
        # values near 1 have a rounding of 6e-8 in each of 6 steps, here divided by a travel of 0.12
        np.testing.assert_allclose((x - end[name]) / done.travel, want, atol=5e-6)


@pytest.mark.parametrize(
    "training",
    [
        Training("sgd", lr=0.3, batch=4, epochs=3),
        Training("sgd", lr=0.3, batch=4, epochs=2, accumulate=3, momentum=0.9),
        Training("sgd", lr=0.3, batch=4, steps=7, accumulate=2, momentum=0.5),
    ],
    ids=["epochs", "accumulated", "steps"],
)
def test_travel_is_how_far_torch_goes_along_a_gradient_of_one(training):
    class Eleven:
        lengths = np.ones(11, np.int64)

    plan: list[list[Rows]] = list(groups(Eleven(), training, np.random.default_rng(0)))
    x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimiser = torch.optim.SGD([x], lr=training.lr, momentum=training.momentum)
    for _ in plan:
        x.grad = torch.ones_like(x)
        optimiser.step()
    assert travel(training, 11) == pytest.approx(-x.item(), rel=1e-12)


def test_adamw_has_no_travel():
    loop, cohort = trainers("tiny-bert")
    some = jobs(loop, 0, 1)
    assert [x.travel for x in (*loop.train_many(some), *stacked(cohort, some))] == [0.0] * 4


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-llama"])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_clients_together_have_each_its_own_objective(model, momentum):
    loop, cohort = trainers(model, training=replace(SGD, lr=0.01, momentum=momentum))
    some = with_objectives(with_tails(with_ranks(jobs(loop), 3, 1, 2, 3, 2, 1), 1, 2, 3, 1, 2, 3))
    assert_agree(loop, cohort, some, ROUNDING)
    apart, together = list(loop.train_many(some)), stacked(cohort, some)
    assert [x.travel for x in apart] == [x.travel for x in together]
    assert len({x.travel for x in apart}) == 3  # of clients with one, two and three batches


@pytest.mark.parametrize("trains", ["a", "b"])
def test_a_shift_is_of_the_factor_that_is_trained(trains):
    loop, cohort = trainers("tiny-bert", training=SGD)
    some = with_objectives(jobs(loop, trains=trains), penalties=(0.0,))
    assert_agree(loop, cohort, some, ROUNDING)
    held = {"a": "b", "b": "a"}[trains]
    for job, done in zip(some, loop.train_many(some), strict=True):
        for n, layer in job.start.layers.items():
            assert np.array_equal(getattr(done.trained.layers[n], held), getattr(layer, held))


def test_a_penalty_works_through_adamw_too():
    loop, cohort = trainers("tiny-bert")
    some = with_objectives(jobs(loop), penalties=(0.3,), shift=False)
    assert_agree(loop, cohort, some)


def test_convolutions_have_tails_as_matrices_have():
    loop, cohort = trainers("tiny-vit", Method(rank=3, targets=("projection",)), SGD)
    some = with_objectives(jobs(loop))
    assert_agree(loop, cohort, some, ROUNDING)
    (done,) = loop.train_many(some[:1])
    loop.bridge.model.eval()
    want, _ = by_hand(loop, some[0], loop.training)
    assert distance(done.trained, want) <= ROUNDING


def test_a_penalty_on_what_is_not_trained_fails_the_job():
    loop, _ = trainers("tiny-bert", training=SGD)
    (job,) = with_objectives(jobs(loop, 0, trains="b"))
    (result,) = loop.train_many([job])
    assert isinstance(result, Failed)
    assert "/a, which is not trained" in result.reason


def test_a_shift_names_tensors_of_the_start():
    loop, _ = trainers("tiny-bert", training=SGD)
    start = loop.start()
    name = next(iter(start.layers))
    whole = shifts(start, {f"{name}/a": np.full((3, 24), 2.0)})
    assert sum(float(np.abs(x).sum()) for x in whole.tensors().values()) == 2.0 * 72
    assert {x.dtype for x in whole.tensors().values()} == {np.dtype(np.float32)}
    with pytest.raises(ValueError, match="no such tensor in the adapter: other"):
        shifts(start, {"other": np.zeros(3)})
    with pytest.raises(ValueError, match="does not fit the adapter"):
        shifts(start, {f"{name}/a": np.zeros((2, 24))})


def test_hetlora_asks_for_the_penalty_of_its_tail_in_a_model():
    loop, cohort = trainers("tiny-bert", training=SGD)
    rule, task = HetLoRA(penalty=0.5), Task(loop.start().spec)
    some = [replace(x, objective=rule.objective(task, x.start, {})) for x in with_ranks(jobs(loop), 3, 1, 2, 3, 2, 1)]
    assert_agree(loop, cohort, some, ROUNDING)
    for job, done in zip(some, loop.train_many(some), strict=True):
        (plain,) = loop.train_many([replace(job, objective=Objective())])
        assert (distance(done.trained, plain.trained) > 1e-3) is (job.start.layers[LAYER].rank > 1)


def test_scaffold_corrects_the_steps_of_a_model_by_the_gradients_of_the_round_before():
    """With one client's variate right and the server's zero, every step is what is left of its own gradient."""
    loop, cohort = trainers("tiny-bert", training=replace(SGD, epochs=1))
    rule, task = Scaffold(), Task(loop.start().spec)
    first = jobs(loop)
    for trainer in (loop, cohort):
        done = list(trainer.train_many(first))
        updates = [Update(x.start, y.trained, y.travel) for x, y in zip(first, done, strict=True)]
        own = [rule.keep(x, task, {}) for x in updates]
        again = [replace(x, objective=rule.objective(task, x.start, k)) for x, k in zip(first, own, strict=True)]
        # A client with one step meets the same gradient again, and so does not move at all.
        still = {x.client: distance(x.start, y.trained) for x, y in zip(again, trainer.train_many(again), strict=True)}
        moved = {x.client: distance(x.start, y.trained) for x, y in zip(first, done, strict=True)}
        assert still[3] <= ROUNDING
        assert moved[3] > 1e-2
        assert all(still[i] < moved[i] for i in moved)
