"""Many clients' optimiser is torch's own, row by row."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.training.objectives import Proximal
from fedpeft.training.optimise import RowOptimiser
from fedpeft.training.settings import Training

N = 7
PLAIN = Training(lr=0.03, clip=None)
SGD = replace(PLAIN, optimiser="sgd")
SETTINGS = {
    "adamw": PLAIN,
    "adamw with decay": replace(PLAIN, weight_decay=0.3),
    "adamw, clipped": replace(PLAIN, clip=0.7),
    "adamw with all": replace(PLAIN, weight_decay=0.2, clip=1.1, prox=0.4),
    "sgd": SGD,
    "sgd with momentum": replace(SGD, momentum=0.8),
    "sgd with decay": replace(SGD, weight_decay=0.3),
    "sgd, proximal": replace(SGD, prox=0.9),
    "sgd with all": replace(SGD, momentum=0.6, weight_decay=0.2, clip=1.1, prox=0.4),
}


class Alone:
    """One client with torch's own optimiser, clipping and the loop's proximal term."""

    def __init__(self, values, training):
        self.x = torch.nn.Parameter(values.clone())
        self.start, self.training = values.clone(), training
        if training.optimiser == "sgd":
            self.optimiser = torch.optim.SGD([self.x], training.lr, training.momentum, 0, training.weight_decay)
        else:
            self.optimiser = torch.optim.AdamW([self.x], training.lr, weight_decay=training.weight_decay)

    def step(self, gradient):
        self.x.grad = gradient.clone()
        if self.training.prox:
            Proximal(self.training.prox)([self.x], [self.start]).backward()
        if self.training.clip is not None:
            torch.nn.utils.clip_grad_norm_([self.x], self.training.clip)
        self.optimiser.step()


def close(found, want):
    # a dozen operations in fp32, in another order; AdamW's are of the size of lr
    torch.testing.assert_close(found, want, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("name", SETTINGS)
@given(
    seed=st.integers(0, 999),
    turns=st.lists(st.sets(st.integers(0, 3), min_size=1).map(sorted), min_size=1, max_size=6),
)
@settings(max_examples=25, deadline=None)
def test_each_row_is_what_torchs_optimiser_makes_of_it_whoever_steps_with_it(name, seed, turns):
    training, draw = SETTINGS[name], torch.Generator().manual_seed(seed)
    starts = torch.randn(4, N, generator=draw)
    found = RowOptimiser(torch.zeros(4, N), training)
    alone = []
    for row, values in enumerate(starts):
        found.begin(row, values)
        alone.append(Alone(values, training))
    for rows in turns:
        gradients = torch.randn(len(rows), N, generator=draw)
        for row, gradient in zip(rows, gradients, strict=True):
            alone[row].step(gradient)
        found.step(torch.tensor(rows), gradients)
    close(found.values, torch.stack([x.x.detach() for x in alone]))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_that_is_given_to_another_client_has_nothing_of_the_one_before(name):
    training, draw = SETTINGS[name], torch.Generator().manual_seed(5)
    starts, gradients = torch.randn(3, N, generator=draw), torch.randn(6, 2, N, generator=draw)
    found = RowOptimiser(torch.zeros(2, N), training)
    for row in (0, 1):
        found.begin(row, starts[row])
    for g in gradients[:3]:
        found.step(torch.tensor([0, 1]), g.clone())
    found.begin(0, starts[2])
    for g in gradients[3:]:
        found.step(torch.tensor([0, 1]), g.clone())
    new, old = Alone(starts[2], training), Alone(starts[1], training)
    for number, g in enumerate(gradients):
        old.step(g[1])
        if number > 2:
            new.step(g[0])
    close(found.values, torch.stack([new.x.detach(), old.x.detach()]))


@given(seed=st.integers(0, 999), clip=st.sampled_from([0.01, 1.0, 3.0, 100.0]))
@settings(max_examples=40, deadline=None)
def test_clipping_is_that_of_clip_grad_norm_for_each_row_by_itself(seed, clip):
    draw = torch.Generator().manual_seed(seed)
    gradients = torch.randn(5, N, generator=draw) * torch.tensor([0.0, 0.01, 1.0, 10.0, 1000.0])[:, None]
    found = RowOptimiser(torch.zeros(5, N), replace(SGD, lr=1.0, clip=clip))
    found.step(torch.arange(5), gradients.clone())
    for row, gradient in zip(found.values, gradients, strict=True):
        x = torch.nn.Parameter(torch.zeros(N))
        x.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([x], clip)
        torch.testing.assert_close(row, -x.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [x for x in SETTINGS if x.startswith("sgd")])
def test_a_rows_shift_is_added_to_its_gradients_behind_the_clip_and_goes_with_its_client(name):
    training, draw = SETTINGS[name], torch.Generator().manual_seed(4)
    starts, shifts = torch.randn(4, N, generator=draw), torch.randn(4, N, generator=draw)
    found, alone = RowOptimiser(torch.zeros(3, N), training), []

    def steps(rows, clients, gradients):
        for client, g in zip(clients, gradients, strict=True):
            one = alone[client]
            g = g + training.prox * (one.x.detach() - one.start)
            if training.clip is not None:
                g = g * min(1.0, training.clip / float(torch.linalg.vector_norm(g)))
            one.x.grad = g + (shifts[client] if client in (1, 3) else 0.0)
            one.optimiser.step()
        found.step(torch.tensor(rows), gradients.clone())

    alone = [Alone(x, training) for x in starts]
    found.begin(0, starts[0])
    found.begin(1, starts[1], shifts[1])
    for _ in range(3):
        steps([0, 1], [0, 1], 2 * torch.randn(2, N, generator=draw))
    found.begin(1, starts[2])  # one without a shift in place of one that had one
    found.begin(2, starts[3], shifts[3])
    for _ in range(3):
        steps([2, 0, 1], [3, 0, 2], 2 * torch.randn(3, N, generator=draw))
    close(found.values, torch.stack([alone[i].x.detach() for i in (0, 2, 3)]))


@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_that_are_zero_and_have_no_gradient_stay_zero(name):
    found, draw = RowOptimiser(torch.zeros(2, N), SETTINGS[name]), torch.Generator().manual_seed(1)
    pads = torch.tensor([True, False, False, True, False, False, False])
    for row in (0, 1):
        found.begin(row, torch.randn(N, generator=draw).masked_fill(pads, 0))
    for _ in range(4):
        found.step(torch.tensor([0, 1]), torch.randn(2, N, generator=draw).masked_fill(pads, 0))
    assert torch.equal(found.values[:, pads], torch.zeros(2, 2))
    assert found.values[:, ~pads].abs().min() > 0


def test_the_first_step_of_adamw_is_lr_along_each_sign_at_every_client_whenever_it_comes():
    found = RowOptimiser(torch.zeros(2, N), PLAIN)
    found.step(torch.tensor([0]), torch.ones(1, N))
    found.step(torch.tensor([0, 1]), torch.stack([torch.ones(N), torch.full((N,), -5.0)]))
    torch.testing.assert_close(found.values[1], torch.full((N,), 0.03), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.values[0], torch.full((N,), -0.06), rtol=1e-6, atol=0)


def test_bias_correction_is_exact_after_many_steps():
    """In fp32 1 − 0.999ⁿ would be off by a part in 10⁴ at first: it is computed in fp64."""
    gradients = torch.randn(60, 1, N, generator=torch.Generator().manual_seed(2))
    found, alone = RowOptimiser(torch.zeros(1, N), PLAIN), Alone(torch.zeros(N), PLAIN)
    for g in gradients:
        found.step(torch.tensor([0]), g.clone())
        alone.step(g[0])
    torch.testing.assert_close(found.values[0], alone.x.detach(), rtol=1e-5, atol=1e-6)
