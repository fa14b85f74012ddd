"""The loss some positions at a time is the plain loss, and so are its gradients."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedpeft.training.head import losses, passing, runs_alone, vocabulary

UNITS, WIDTH, WORDS = 23, 7, 13


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    head = nn.Linear(WIDTH, WORDS, bias=True)
    head.weight.data = torch.from_numpy(0.5 * rng.standard_normal((WORDS, WIDTH)).astype(np.float32))
    head.bias.data = torch.from_numpy(rng.standard_normal(WORDS).astype(np.float32))
    head.requires_grad_(False)
    hidden = torch.from_numpy(rng.standard_normal((UNITS, WIDTH)).astype(np.float32)).requires_grad_()
    targets = torch.from_numpy(rng.integers(0, WORDS, UNITS))
    weights = torch.from_numpy(rng.standard_normal(UNITS).astype(np.float32))  # both signs
    return head, hidden, targets, weights


@pytest.mark.parametrize("at_once", [1, WORDS, 5 * WORDS, 5 * WORDS + 12, 22 * WORDS, 23 * WORDS, 1 << 23])
def test_losses_and_gradients_are_those_of_all_logits_at_once(case, at_once):
    head, hidden, targets, weights = case
    logits = head(hidden)
    want = functional.cross_entropy(logits, targets, reduction="none")
    each, hits = losses(head, hidden, targets, WORDS, at_once)
    torch.testing.assert_close(each, want, rtol=1e-6, atol=1e-6)
    assert torch.equal(hits, logits.argmax(dim=-1) == targets)
    assert 0 < int(hits.sum()) < UNITS
    (plain,) = torch.autograd.grad((want * weights).sum(), hidden)
    (got,) = torch.autograd.grad((each * weights).sum(), hidden)
    torch.testing.assert_close(got, plain, rtol=1e-6, atol=1e-6)  # of numbers below 3, in sums of 13


def test_so_many_positions_go_through_the_head_at_a_time(case):
    head, hidden, targets, _ = case
    seen = []
    head.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    losses(head, hidden, targets, WORDS, 5 * WORDS + 12)
    assert seen == [5, 5, 5, 5, 3]


def test_very_large_logits_are_no_trouble(case):
    head, hidden, targets, _ = case
    with torch.no_grad():
        hidden *= 1e4
    each, _ = losses(head, hidden, targets, WORDS)
    want = functional.cross_entropy(head(hidden), targets, reduction="none")
    torch.testing.assert_close(each, want, rtol=1e-6, atol=1e-2)  # of logits of 1e5, whose last bit is 8e-3
    assert torch.isfinite(torch.autograd.grad(each.sum(), hidden)[0]).all()


def test_a_loss_that_is_not_a_number_is_told(case):
    head, hidden, targets, _ = case
    with torch.no_grad():
        hidden[3] = float("nan")
    each, _ = losses(head, hidden, targets, WORDS, 1)
    assert each.isnan().nonzero().tolist() == [[3]]


def test_without_gradients_there_are_losses_and_hits(case):
    head, hidden, targets, _ = case
    want, hits = losses(head, hidden, targets, WORDS)
    with torch.inference_mode():
        each, also = losses(head, hidden.detach(), targets, WORDS, WORDS)
    torch.testing.assert_close(each, want.detach())
    assert torch.equal(hits, also)


def test_a_head_in_bf16_is_scored_in_fp32(case):
    head, hidden, targets, _ = case
    half = hidden.detach().bfloat16().requires_grad_()
    each, _ = losses(head.bfloat16(), half, targets, WORDS, 4 * WORDS)
    want = functional.cross_entropy(head(half).float(), targets, reduction="none")
    torch.testing.assert_close(each, want, rtol=1e-6, atol=1e-6)
    (got,) = torch.autograd.grad(each.sum(), half)
    (plain,) = torch.autograd.grad(want.sum(), half)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, plain, rtol=2**-6, atol=2**-6)


def test_a_head_with_something_trained_or_hooked_does_not_run_alone(case):
    head = case[0]
    assert runs_alone(head)
    head.bias.requires_grad_()
    assert not runs_alone(head)
    with torch.no_grad():
        assert runs_alone(head)
    head.bias.requires_grad_(False)
    for add in (head.register_forward_hook, head.register_forward_pre_hook):
        hook = add(lambda *_: None)
        assert not runs_alone(head)
        hook.remove()
    assert runs_alone(head)


def test_within_passing_the_head_computes_nothing_and_after_it_all(case):
    head, hidden, _, _ = case
    with passing(head, lambda x: x[:2]):
        assert torch.equal(head(hidden), hidden[:2])
    assert head(hidden).shape == (UNITS, WORDS)
    with pytest.raises(KeyError), passing(head, lambda x: x):
        raise KeyError
    assert head(hidden).shape == (UNITS, WORDS)


class Model(nn.Module):
    """A language model of one embedding and a head, whose logits are divided by ``over``, or cut."""

    def __init__(self, over: float = 1.0, cut: int = 0) -> None:
        super().__init__()
        self.words, self.head, self.over, self.cut = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20), over, cut

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.head(self.words(input_ids))[:, self.cut :] / self.over)


def test_the_vocabulary_is_of_a_model_that_does_nothing_to_its_logits():
    assert vocabulary(Model()) == 20
    assert vocabulary(Model(over=1.5)) == 0
    assert vocabulary(Model(cut=1)) == 0
    model = Model()
    model.get_output_embeddings = lambda: None
    assert vocabulary(model) == 0
    assert not Model().head._forward_hooks
