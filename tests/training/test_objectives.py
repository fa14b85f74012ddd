"""What is minimised is what the formula says, at the positions that count."""

import numpy as np
import pytest
import torch

from fedpeft.training import head, objectives
from fedpeft.training.bases import load_base
from fedpeft.training.batches import collate
from fedpeft.training.devices import choose
from fedpeft.training.objectives import Proximal, outcome, predictions, scored
from fedpeft.training.settings import Model
from fedpeft.training.tokens import encode


def test_the_gradient_of_the_proximal_term_is_mu_times_the_distance_for_both_signs():
    start = [torch.tensor([1.0, -2.0, 0.5]), torch.tensor([[3.0], [-1.0]])]
    now = [torch.tensor([1.5, -3.0, 0.5], requires_grad=True), torch.tensor([[2.0], [4.0]], requires_grad=True)]
    term = Proximal(0.3)(now, start)
    term.backward()
    assert term.item() == pytest.approx(0.3 / 2 * (0.25 + 1 + 0 + 1 + 25))
    torch.testing.assert_close(now[0].grad, torch.tensor([0.15, -0.3, 0.0]))
    torch.testing.assert_close(now[1].grad, torch.tensor([[-0.3], [1.5]]))


def test_the_proximal_term_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match="zip"):
        Proximal(1.0)([torch.zeros(2)], [])


def test_a_score_is_minus_the_log_probability_of_the_target():
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    p = np.exp(logits.numpy())
    want = [-np.log(p[0, 2] / p[0].sum()), -np.log(p[1, 1] / p[1].sum())]
    assert scored(logits, torch.tensor([2, 1]))[0].tolist() == pytest.approx(want, rel=1e-6)


def test_what_is_right_is_the_target_with_the_largest_logit():
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0], [0.0, 1.0, 5.0]])
    assert scored(logits, torch.tensor([0, 1, 1]))[1].tolist() == [True, True, False]


@pytest.fixture
def batch(dialogues):
    base = load_base(Model("tiny-llama"), "lm", (), 0, choose("cpu"))
    return base, collate(encode(dialogues, base, 40), np.arange(5), base, None, torch.device("cpu"))


def test_the_head_sees_the_positions_that_are_predicted_and_the_logits_are_the_same(batch):
    base, x = batch
    seen = []
    hook = base.head.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    with torch.no_grad():
        few = predictions(base.model, base.head, x)
        every = base.model(**x.inputs).logits[x.where]
        without = predictions(base.model, None, x)
    hook.remove()
    assert seen[0] == (x.units, 24)
    assert x.units < x.inputs["input_ids"].numel() / 2
    # one product of fewer rows: sums in fp32 may differ in their last bits
    torch.testing.assert_close(few, every, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(without, every, rtol=1e-5, atol=1e-6)
    assert len(base.head._forward_pre_hooks) == 0


def test_the_loss_is_transformers_own_with_the_prompt_masked(batch):
    base, x = batch
    labels = torch.full_like(x.inputs["input_ids"], -100)
    labels[:, 1:][x.where[:, :-1]] = x.targets
    with torch.no_grad():
        want = base.model(**x.inputs, labels=labels).loss
        got = scored(predictions(base.model, base.head, x), x.targets)[0].sum() / x.units
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_tokens_that_a_prompt_method_puts_before_the_text_are_left_out(batch):
    base, x = batch
    embedded = base.model.get_input_embeddings()(x.inputs["input_ids"])
    prompt = torch.ones(len(embedded), 3, 24)
    mask = torch.cat([torch.ones(len(embedded), 3, dtype=torch.int64), x.inputs["attention_mask"]], dim=1)
    longer = type(x)(
        {"inputs_embeds": torch.cat([prompt, embedded], dim=1), "attention_mask": mask}, x.targets, x.where
    )
    with torch.no_grad():
        got = predictions(base.model, base.head, longer)
        want = base.model(**longer.inputs).logits[:, 3:][x.where]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_outcome_is_the_same_with_the_head_on_some_positions_at_a_time(batch, monkeypatch):
    base, x = batch
    assert base.vocabulary == 262
    monkeypatch.setattr("fedpeft.training.objectives.FEW", x.units * 262 - 1)
    inside = base.model.get_parameter("model.layers.0.self_attn.q_proj.weight").requires_grad_()
    want, want_hits = scored(predictions(base.model, base.head, x), x.targets)
    (want_slope,) = torch.autograd.grad(want.sum(), inside)
    seen = []
    plain = head.losses
    monkeypatch.setattr(
        "fedpeft.training.objectives.losses",
        lambda h, some, y, words: seen.append(words) or plain(h, some, y, words, 999),
    )
    each, hits = outcome(base.model, base.head, x, base.vocabulary)
    (slope,) = torch.autograd.grad(each.sum(), inside)
    assert seen == [262]
    torch.testing.assert_close(each, want, rtol=1e-6, atol=1e-6)
    assert torch.equal(hits, want_hits)
    torch.testing.assert_close(slope, want_slope, rtol=1e-5, atol=1e-6)


def test_a_head_that_is_trained_is_run_as_part_of_the_model(batch, monkeypatch):
    base, x = batch
    base.head.weight.requires_grad_()
    monkeypatch.setattr("fedpeft.training.objectives.FEW", 0)
    monkeypatch.delattr("fedpeft.training.objectives.losses")
    each, _ = outcome(base.model, base.head, x, base.vocabulary)
    (slope,) = torch.autograd.grad(each.sum(), base.head.weight)
    assert slope.abs().sum() > 0


@pytest.mark.parametrize(("more", "is_plain"), [(0, True), (-1, False)])
def test_few_logits_are_made_all_at_once_bit_for_bit_as_the_model_makes_them(batch, monkeypatch, more, is_plain):
    base, x = batch
    monkeypatch.setattr("fedpeft.training.objectives.FEW", x.units * 262 + more)
    monkeypatch.setattr("fedpeft.training.objectives.losses", lambda *_: "some at a time")
    found = outcome(base.model, base.head, x, base.vocabulary)
    assert (found != "some at a time") is is_plain
    if is_plain:
        assert torch.equal(found[0], scored(predictions(base.model, base.head, x), x.targets)[0])


@pytest.mark.parametrize(("words", "is_plain"), [(262, True), (261, False)])
def test_logits_of_a_large_vocabulary_are_never_made_as_the_model_makes_them(batch, monkeypatch, words, is_plain):
    base, x = batch
    monkeypatch.setattr("fedpeft.training.objectives.ADDED", words)
    monkeypatch.setattr("fedpeft.training.objectives.losses", lambda *_: "some at a time")
    assert (outcome(base.model, base.head, x, base.vocabulary) != "some at a time") is is_plain


def test_the_packaged_constants():
    assert (objectives.FEW, objectives.ADDED) == (2**20, 2**12)
