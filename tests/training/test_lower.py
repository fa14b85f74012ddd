"""What the layers below the lowest trained one make of a text is computed once, and makes no difference to a result."""

import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeft.adapters import LowRank, Pool
from fedpeft.rounds import Done, Failed, Metrics, Trial
from fedpeft.training.cohort import CohortTrainer
from fedpeft.training.lower import Kept, Lower
from tests.training.cohort_cases import distance
from tests.training.lower_cases import CLOSE, MODELS, TRAINING, apart, begun, changes, load, trained


def with_lower(trainer, kind="fp32", **change):
    return trainer.over(trainer.federation, replace(trainer.training, lower=kind, **change))


@pytest.fixture
def calls():
    """A function that counts, from then on, the passes through the attention of a trainer's lowest layer."""
    hooks = []

    def count(trainer):
        seen = []
        layer = trainer.frozen.lower.layers[0]
        inside = next(x for n, x in layer.named_children() if "att" in n)
        hooks.append(inside.register_forward_hook(lambda *_: seen.append(1)))
        return seen

    yield count
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("change", [{}, {"micro": 2}, {"checkpointing": True}, {"prox": 0.5, "accumulate": 2}], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_kept_in_fp32_the_same_is_trained(model, change, tmp_path):
    plain = load(model, tmp_path, replace(TRAINING, **change))
    keeping, job = with_lower(plain), begun(plain)
    want = trained(plain, job)
    for _ in range(2):  # the second time all of it is there
        got = trained(keeping, job)
        assert apart(got, want, job) <= CLOSE
        assert got.metrics.loss == pytest.approx(want.metrics.loss, rel=1e-6)
        assert (got.metrics.units, got.metrics.correct) == (want.metrics.units, want.metrics.correct)
    assert keeping.frozen.lower.lowest == (2 if model == "gpt2" else 1)
    assert keeping.frozen.lower.kept.texts.keys() == {
        keeping.store.row(i).tobytes() for i in keeping.rows(0, "train").index
    }


@pytest.mark.parametrize("model", MODELS)
def test_kept_in_fp32_gradients_are_the_same_to_a_millionth(model, tmp_path):
    plain = load(model, tmp_path, replace(TRAINING, steps=1, lr=100.0, batch=7))
    job = begun(plain)
    assert apart(trained(with_lower(plain), job), trained(plain, job), job) <= 1e-6


@pytest.mark.parametrize("model", MODELS)
def test_kept_in_bf16_gradients_have_nearly_the_same_direction(model, tmp_path):
    """The least of a tensor's cosines that was seen is 0.99998 in BERT, and 0.999998 in the others."""
    plain = load(model, tmp_path, replace(TRAINING, steps=1, lr=100.0, batch=7))
    job = begun(plain)
    want, got = (changes(trained(x, job), job) for x in (plain, with_lower(plain, "bf16")))
    for n, x in want.items():
        assert cosine(got[n], x) > 0.9999, n
    assert any((got[n] != x).any() for n, x in want.items())


def cosine(x, y):
    return float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.mark.parametrize("model", MODELS)
def test_the_lowest_trained_layer_is_called_with_what_is_kept(model, tmp_path):
    """So whoever runs it again from its arguments, once the pass is over, as checkpointing may, has the same."""
    keeping = load(model, tmp_path, replace(TRAINING, lower="bf16"))
    lower, seen = keeping.frozen.lower, []
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    want, inputs = lower.of(ids, mask), {"input_ids": ids, "attention_mask": mask}
    hook = lower.layers[lower.lowest].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with lower.feeding(inputs):
        keeping.bridge.model(**inputs)
    hook.remove()
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], want.float())


def test_texts_go_through_the_lower_layers_once_whoever_trains_or_is_evaluated_on_them(tmp_path, calls):
    trainer = load("gpt2", tmp_path, replace(TRAINING, lower="bf16"))
    seen, texts = calls(trainer), len({trainer.store.row(i).tobytes() for i in trainer.rows(0, "train").index})
    job = begun(trainer)
    trained(trainer, job)
    assert len(seen) == texts > 4
    trained(trainer, replace(job, round=1, seed=6))
    (found,) = trainer.evaluate_many([Trial(0, "train", trainer.start())])
    assert isinstance(found, Metrics)
    assert len(seen) == texts
    other = trainer.over(trainer.federation, replace(trainer.training, epochs=3))
    assert other.frozen is trainer.frozen
    trained(other, job)
    assert len(seen) == texts
    kept = trainer.frozen.lower.kept
    assert kept.size == sum(2 * 24 * len(key) // 4 for key in kept.texts)
    assert all(x.shape == (len(key) // 4, 24) and x.dtype == torch.bfloat16 for key, x in kept.texts.items())


@pytest.mark.parametrize("model", MODELS)
def test_evaluation_gives_what_it_gives_without(model, tmp_path):
    plain = load(model, tmp_path)
    trials = [Trial(0, "train", plain.start()), Trial(None, "test", plain.start()), Trial(1, "train", plain.start())]
    for want, got in zip(plain.evaluate_many(trials), with_lower(plain).evaluate_many(trials), strict=True):
        assert isinstance(got, Metrics)
        assert got.loss == pytest.approx(want.loss, rel=1e-6)
        assert (got.units, got.correct, got.examples) == (want.units, want.correct, want.examples)


def test_neither_the_room_nor_what_was_there_before_changes_a_bit(tmp_path):
    plain = load("tiny-bert", tmp_path)
    job = begun(plain)
    ample, filled, small = (with_lower(plain, "bf16", lower_room=x) for x in ("1GB", 2e9, 4000.0))
    list(filled.evaluate_many([Trial(1, "train", job.start), Trial(0, "train", job.start)]))
    want = trained(ample, job)
    with pytest.warns(
        RuntimeWarning, match=r"^training.lower_room: 0.004 MB hold what the lower layers make of [1-6] texts; "
    ) as told:
        results = [trained(filled, job), trained(small, job), trained(small, job)]
    for x in results:
        assert all((x.trained.tensors()[n] == y).all() for n, y in want.trained.tensors().items())
        assert x.metrics == want.metrics
    kept = small.frozen.lower.kept
    assert len(told) == 1
    assert 0 < kept.size <= 4000
    assert kept.size == sum(x.nbytes for x in kept.texts.values())
    assert kept.anew == 4 * (7 - len(kept.texts))  # two epochs, twice
    assert ample.frozen.lower.kept.anew == 0


def test_what_just_fits_is_kept():
    kept = Kept(24)
    kept.put(b"a", torch.zeros(3, 4, dtype=torch.bfloat16))
    assert kept.size == 24
    with pytest.warns(RuntimeWarning, match="make of 1 texts"):
        kept.put(b"b", torch.zeros(1, 1))
    kept.put(b"c", torch.zeros(1, 1))
    assert (list(kept.texts), kept.size, kept.anew) == ([b"a"], 24, 2)


@pytest.mark.parametrize("model", MODELS)
def test_no_token_sees_padding(model, tmp_path, monkeypatch):
    keeping = load(model, tmp_path, replace(TRAINING, lower="fp32"))
    job, clean = begun(keeping), Lower.of
    want = trained(keeping, job)
    padding = []

    def noisy(self, ids, mask):
        found = clean(self, ids, mask)
        is_pad = (mask == 0)[..., None].expand_as(found)
        assert (found[is_pad] == 0).all()
        padding.append(int(is_pad.sum()))
        return torch.where(is_pad, torch.linspace(-3, 2, found.numel()).reshape(found.shape), found)

    monkeypatch.setattr(Lower, "of", noisy)
    assert apart(trained(keeping, job), want, job) <= CLOSE
    assert sum(padding) > 100


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-llama"])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_many_clients_at_once_have_what_one_after_another_have(model, kind, tmp_path, calls):
    loop = load(model, tmp_path, replace(TRAINING, lower=kind))
    fields = (loop.frozen, loop.bridge, loop.training, loop.federation, loop.place, loop.start(), loop.store)
    cohort = CohortTrainer(*fields, group=2)
    seen = calls(cohort)
    assert cohort.together == 2
    jobs = [begun(loop, client) for client in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that of clients who could not train in one step
        together = list(cohort.train_many(jobs))
    assert len(seen) == len(loop.frozen.lower.kept.texts) == 12
    for got, job in zip(together, jobs, strict=True):
        assert isinstance(got, Done)
        assert distance(got.trained, trained(loop, job).trained) <= CLOSE
    assert len(seen) == 12


def test_a_frozen_tail_above_runs_and_one_below_is_refused(tmp_path):
    plain = load("tiny-llama", tmp_path)
    keeping, job = with_lower(plain), begun(plain)
    (name, *_) = job.start.layers
    assert ".layers.1." in name
    rng = np.random.default_rng(2)
    d, k = job.start.layers[name].b.shape[0], job.start.layers[name].a.shape[1]
    tail = LowRank(rng.standard_normal((3, k)).astype("f4"), rng.standard_normal((d, 3)).astype("f4"), 0.1)
    above = replace(job, tail={name: tail})
    assert apart(trained(keeping, above), trained(plain, above), job) <= CLOSE
    below = replace(job, tail={name.replace(".layers.1.", ".layers.0."): tail})
    assert isinstance(next(iter(plain.train_many([below]))), Done)
    (refused,) = keeping.train_many([below])
    assert isinstance(refused, Failed)
    assert "q_proj is below the layers that are trained" in refused.reason
    (refused,) = keeping.evaluate_many([Trial(0, "train", job.start, below.tail)])
    assert isinstance(refused, Failed)
    cohort = CohortTrainer(
        *(getattr(keeping, x) for x in ("frozen", "bridge", "training", "federation", "place")), job.start
    )
    with pytest.warns(RuntimeWarning, match="could not train in one step"):
        assert all(
            isinstance(x, Failed) for x in replace(cohort, group=2).train_many([below, replace(below, client=1)])
        )


def test_a_walk_by_forward_passes_begins_there_too(tmp_path, calls):
    plain = load("tiny-bert", tmp_path)
    keeping, job = with_lower(plain), replace(begun(plain), pool=Pool(seed=2, size=5, epsilon=1e-2))
    seen = calls(keeping)
    want, got = (trained(x, job) for x in (plain, keeping))
    np.testing.assert_allclose(
        got.moves, want.moves, atol=1e-4 * abs(want.moves).max()
    )  # a slope is a difference / 0.02
    seen.clear()
    trained(keeping, job)
    assert not seen


@pytest.mark.parametrize("base", [{"quantise": "int8"}, {"dropout": True}], ids=str)
def test_a_packed_base_and_a_base_whose_dropout_is_zero_are_like_any(base, tmp_path):
    plain = load("tiny-llama", tmp_path, **base)
    job = begun(plain)
    assert apart(trained(with_lower(plain), job), trained(plain, job), job) <= CLOSE


def test_in_bf16_arithmetic_it_is_what_comes_without(tmp_path):
    """What is between layers is in bf16 there anyway; rounding differs only where products are cut otherwise."""
    plain = load("tiny-llama", tmp_path, replace(TRAINING, precision="bf16", steps=1, lr=100.0, batch=7))
    job = begun(plain)
    want, got = (changes(trained(x, job), job) for x in (plain, with_lower(plain, "bf16")))
    assert all(cosine(got[n], x) > 0.999 for n, x in want.items())


def test_the_model_is_as_before_and_in_the_mode_that_it_was_in(tmp_path):
    keeping = load("tiny-bert", tmp_path, replace(TRAINING, lower="fp32"))
    lower, model = keeping.frozen.lower, keeping.bridge.model
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    model.train()
    lower.layers[1].eval()
    before = {n: x.training for n, x in model.named_modules()}
    with pytest.raises(KeyError, match="mine"), lower.feeding({"input_ids": ids, "attention_mask": mask}):
        raise KeyError("mine")
    assert before == {n: x.training for n, x in model.named_modules()}
    assert all("forward" not in vars(x) and not x._forward_pre_hooks for x in lower.layers)
    found = lower.of(ids, mask)
    assert not found.requires_grad
    assert (found[1, 2] == 0).all()
    empty = lower.of(ids, torch.tensor([[1, 1, 1], [0, 0, 0]]))
    assert torch.equal(empty[0], found[0])
    assert (empty[1] == 0).all()


def test_another_process_begins_with_nothing_and_other_settings_do_too(tmp_path):
    keeping = load("tiny-bert", tmp_path, replace(TRAINING, lower="fp32", lower_room=5e6))
    trained(keeping, begun(keeping))
    base, model = pickle.loads(pickle.dumps((keeping.frozen, keeping.bridge.model)))
    assert base.lower.kept.texts == {}
    assert (base.lower.kept.room, base.lower.kept.size) == (5_000_000, 0)
    assert any(base.lower.layers is x for x in model.modules())
    other = with_lower(keeping, "bf16")
    assert other.frozen.lower.kept is not keeping.frozen.lower.kept
    assert with_lower(keeping, "none").frozen.lower is None
