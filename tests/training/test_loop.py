"""A job's result depends on the job alone, and is what its settings say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeft.adapters import LowRank, same
from fedpeft.data import Table
from fedpeft.errors import ConfigError
from fedpeft.rounds import Done, Failed, Job, Trial
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.settings import Method, Model, Training

LORA = {
    "tiny-bert": Method(rank=3, alpha=6.0, targets=("query", "value")),
    "tiny-llama": Method(rank=3, alpha=6.0, targets=("q_proj", "v_proj")),
    "tiny-vit": Method(rank=3, alpha=6.0, targets=("q_proj", "v_proj")),
}
PLAIN = Training(lr=0.02, batch=4, epochs=2, length=40, device="cpu")


def trainer(federation, training=PLAIN, model="tiny-bert", method=None, seed=3):
    return TorchTrainer.load(Model(model), method or LORA[model], training, federation, seed)


@pytest.fixture
def two(sentences, share):
    """A trainer of two clients, with 9 and 13 rows."""
    return trainer(share(sentences, 9, 13))


def jobs(start, *clients, seed=7):
    return [Job(client, 0, seed + client, start) for client in clients]


def trained(found, *clients, **kwargs):
    results = list(found.train_many(jobs(found.start(), *clients)))
    assert all(isinstance(x, Done) for x in results), results
    return [x.trained for x in results]


def distance(x, y):
    return max(float(np.abs(a - b).max()) for a, b in zip(x.tensors().values(), y.tensors().values(), strict=True))


def test_the_same_job_gives_the_same_bits_after_another_job_and_in_another_trainer(two, sentences, share):
    (first,) = trained(two, 0)
    _, after = trained(two, 1, 0)
    (elsewhere,) = trained(trainer(share(sentences, 9, 13)), 0)
    torch.manual_seed(1234)
    (later,) = trained(two, 0)
    assert distance(first, two.start()) > 0.01, "nothing was trained"
    assert same(first, after)
    assert same(first, elsewhere)
    assert same(first, later)


def test_dropout_does_not_make_a_job_depend_on_others(sentences, share):
    method = replace(LORA["tiny-bert"], dropout=0.3)
    found = trainer(share(sentences, 9, 13), method=method)
    (first,) = trained(found, 0)
    _, after = trained(found, 1, 0)
    assert same(first, after)
    (other,) = (x.trained for x in found.train_many([Job(0, 0, 999, found.start())]))
    assert not same(first, other)


def test_training_leaves_torchs_random_state_the_base_and_the_start_as_they_were(two):
    state = torch.get_rng_state()
    start = {n: x.copy() for n, x in two.start().tensors().items()}
    trainable = set(two.bridge.trainable("ab").values())
    base = {n: x.clone() for n, x in two.bridge.model.named_parameters() if x not in trainable}
    trained(two, 0, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(np.array_equal(x, start[n]) for n, x in two.start().tensors().items())
    assert all(torch.equal(x, base[n]) for n, x in two.bridge.model.named_parameters() if n in base)


def test_metrics_are_sums_over_steps_and_rows_are_counted_once(two):
    (result,) = two.train_many(jobs(two.start(), 1))
    assert (result.metrics.units, result.metrics.examples) == (2 * 13, 13)
    assert 0 < result.metrics.mean_loss < 3
    assert 0 <= result.metrics.correct <= 26


def test_the_loss_of_one_step_is_the_starts_own(sentences, share):
    found = trainer(share(sentences, 9, 13), replace(PLAIN, batch=100, epochs=1))
    (result,) = found.train_many(jobs(found.start(), 0))
    (before,) = found.evaluate_many([Trial(0, "train", found.start())])
    assert result.metrics.loss == pytest.approx(before.loss, rel=1e-5)
    assert result.metrics.correct == before.correct


def test_steps_go_through_as_many_epochs_as_they_take_and_no_more(sentences, share):
    federation = share(sentences, 9, 13)
    by_steps = trainer(federation, replace(PLAIN, steps=6))  # 9 rows in batches of 4 are 3 steps an epoch
    assert same(trained(by_steps, 0)[0], trained(trainer(federation), 0)[0])
    (one,) = trainer(federation, replace(PLAIN, steps=1)).train_many(jobs(by_steps.start(), 0))
    assert one.metrics.units <= 4


def test_a_job_that_fails_says_why_and_the_others_are_not_touched(sentences, share):
    found = trainer(share(sentences, 9, 0, 13))
    start = found.start()
    broken = start.put({n: np.full_like(x, np.nan) for n, x in start.tensors().items()})
    bad = [Job(1, 0, 8, start), Job(77, 0, 8, start), Job(0, 0, 7, broken)]
    empty, stranger, nan, good, last = found.train_many([*bad, *jobs(start, 0, 2)])
    assert empty == Failed("client 1: no rows to train on")
    assert stranger == Failed("client 77: got client 77; want 0 to 2")
    assert nan == Failed("client 0: the loss is nan at step 1: lower training.lr, or set training.clip")
    assert same(good.trained, trained(found, 0)[0])
    assert same(last.trained, trained(found, 2)[0])


def test_replies_that_are_all_cut_off_are_an_error_that_says_so(dialogues, share):
    found = trainer(share(dialogues, 5), replace(PLAIN, length=5), "tiny-llama")
    (result,) = found.train_many(jobs(found.start(), 0))
    assert result.reason == "client 0: no rows to train on: all 5 were cut before their reply; raise training.length"


def test_the_factors_that_are_not_trained_stay_bit_for_bit(two):
    start = two.start()
    for parts, still in (("b", "a"), ("a", "b")):
        (result,) = two.train_many([Job(0, 0, 7, replace(start, layers=_filled(start)), trains=parts)])
        before, after = replace(start, layers=_filled(start)).tensors(), result.trained.tensors()
        for name in before:
            unchanged = np.array_equal(before[name], after[name])
            assert unchanged == name.endswith(f"/{still}"), name


def _filled(adapter):
    """The layers with a b that is not zero, so that a has a gradient."""
    rng = np.random.default_rng(2)
    return {n: replace(x, b=0.1 * rng.standard_normal(x.b.shape).astype(np.float32)) for n, x in adapter.layers.items()}


def test_accumulated_batches_are_one_batch_for_labels_and_for_replies_of_unequal_length(sentences, dialogues, share):
    for table, model in ((sentences, "tiny-bert"), (dialogues, "tiny-llama")):
        federation = share(table, 6)
        whole = trainer(federation, replace(PLAIN, batch=6, epochs=1, optimiser="sgd", lr=0.5), model)
        parts = whole.over(federation, replace(whole.training, batch=2, accumulate=3))
        one, other = trained(whole, 0)[0], trained(parts, 0)[0]
        assert distance(one, whole.start()) > 1e-3
        assert distance(one, other) < 1e-6, model  # the same sums in another order
        uneven = trained(whole.over(federation, replace(whole.training, batch=2, accumulate=2)), 0)[0]
        assert distance(one, uneven) > 1e-4, "two steps are not one"


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-llama"])
def test_checkpointing_changes_memory_and_not_the_result(sentences, dialogues, share, model):
    federation = share({"tiny-bert": sentences, "tiny-llama": dialogues}[model], 6)
    plain = trainer(federation, model=model)
    saving = plain.over(federation, replace(plain.training, checkpointing=True))
    assert distance(trained(plain, 0)[0], trained(saving, 0)[0]) < 1e-6  # the same operations
    assert not plain.frozen.model.is_activation_checkpointing


def test_checkpointing_computes_layers_twice(sentences, share):
    federation = share(sentences, 4)
    found = trainer(federation, replace(PLAIN, epochs=1, checkpointing=True))
    calls = []
    layer = found.frozen.model.bert.encoder.layer[0].attention
    hook = layer.register_forward_hook(lambda *_: calls.append(1))
    trained(found, 0)
    hook.remove()
    assert len(calls) == 2


def test_a_larger_proximal_term_keeps_the_client_nearer(sentences, share):
    federation = share(sentences, 9)
    free = trainer(federation)
    moved = [
        np.sqrt(
            sum(
                ((x - y) ** 2).sum() for x, y in zip(a.tensors().values(), free.start().tensors().values(), strict=True)
            )
        )
        for mu in (0.0, 1.0, 100.0)
        for a in trained(free.over(federation, replace(PLAIN, prox=mu, optimiser="sgd", lr=0.005)), 0)
    ]
    assert moved[0] > 1.001 * moved[1] > 1.01 * moved[2]


def test_clipping_bounds_the_norm_of_a_step_over_all_tensors(sentences, share):
    federation = share(sentences, 9)
    training = replace(PLAIN, optimiser="sgd", lr=1.0, steps=1, clip=0.01)
    found = trainer(federation, training)
    (after,) = trained(found, 0)
    step = [x - y for x, y in zip(after.tensors().values(), found.start().tensors().values(), strict=True)]
    assert np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in step)) == pytest.approx(0.01, rel=1e-3)
    (free,) = trained(found.over(federation, replace(training, clip=None)), 0)
    assert distance(free, after) > 0.01


def test_a_tail_acts_as_a_change_of_the_frozen_weights(two):
    start, rng = two.start(), np.random.default_rng(4)
    tail = {
        n: LowRank(
            rng.standard_normal((5, 24)).astype(np.float32), 0.1 * rng.standard_normal((24, 5)).astype(np.float32), 0.7
        )
        for n in start.layers
    }
    (without,) = two.train_many(jobs(start, 0))
    (beside,) = two.train_many([replace(jobs(start, 0)[0], tail=tail)])
    (looked,) = two.evaluate_many([Trial(0, "train", start, tail)])
    (after,) = two.evaluate_many([Trial(0, "train", start)])
    for name, x in tail.items():
        weight = two.bridge.model.get_submodule(name).base_layer.weight
        with torch.no_grad():
            weight += torch.from_numpy(x.product().astype(np.float32))
    (inside,) = two.train_many(jobs(start, 0))
    (seen,) = two.evaluate_many([Trial(0, "train", start)])
    assert distance(beside.trained, inside.trained) < 2e-5  # six steps of adamw on sums in another order
    assert looked.loss == pytest.approx(seen.loss, rel=1e-5)
    assert distance(beside.trained, without.trained) > 1e-3
    assert after.loss != pytest.approx(looked.loss, rel=1e-4), "the tail outlived its trial"


def test_a_tail_that_does_not_fit_fails_its_job_alone(two):
    start = two.start()
    name = next(iter(start.layers))
    small = LowRank(np.ones((2, 5)), np.ones((24, 2)), 1.0)
    unknown, wrong, good = two.train_many(
        [
            replace(jobs(start, 0)[0], tail={"nowhere": small}),
            replace(jobs(start, 0)[0], tail={name: small}),
            *jobs(start, 0),
        ]
    )
    assert unknown == Failed("client 0: tail: the model has no layer 'nowhere'")
    assert wrong == Failed(f"client 0: tail: {name} is (24, 24); got (24, 5)")
    assert same(good.trained, trained(two, 0)[0])


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-llama", "tiny-vit"])
def test_each_task_is_learned(sentences, dialogues, pictures, share, model):
    table = {"tiny-bert": sentences, "tiny-llama": dialogues, "tiny-vit": pictures}[model]
    federation = share(table, len(table) - 2)
    found = trainer(federation, replace(PLAIN, epochs=20), model)
    (after,) = trained(found, 0)
    first, last = found.evaluate_many([Trial(0, "train", found.start()), Trial(0, "train", after)])
    assert last.mean_loss < 0.7 * first.mean_loss
    assert last.accuracy > first.accuracy


def test_bf16_trains_in_fp32_what_travels(sentences, share):
    federation = share(sentences, 9)
    found, plain = trainer(federation, replace(PLAIN, precision="bf16")), trainer(federation)
    assert found.base == plain.base, "the fingerprint should not depend on the precision"
    (half,), (full,) = trained(found, 0), trained(plain, 0)
    assert {x.dtype for x in half.tensors().values()} == {np.dtype(np.float32)}
    assert distance(half, found.start()) > 0.01
    (a,), (b,) = (list(x.evaluate_many([Trial(0, "train", y)])) for x, y in ((found, half), (plain, full)))
    assert a.mean_loss == pytest.approx(b.mean_loss, rel=0.05)  # bf16 has 8 bits


def test_over_lends_the_model_to_other_clients_with_other_settings(two, sentences, share):
    other = two.over(share(sentences, 20), replace(two.training, epochs=1))
    assert other.bridge is two.bridge
    (result,) = other.train_many(jobs(other.start(), 0))
    assert result.metrics.units == 20
    assert same(trained(two, 0)[0], trained(trainer(share(sentences, 9, 13)), 0)[0])


def test_the_base_is_told_apart_by_model_and_by_the_shape_of_the_adapter(two, sentences, share):
    federation = share(sentences, 9)
    assert trainer(federation, seed=8).base == two.base
    assert trainer(federation, method=replace(LORA["tiny-bert"], rank=2)).base != two.base
    assert trainer(federation, method=Method(targets=("q_proj", "v_proj")), model="tiny-llama").base != two.base


def test_the_start_is_the_seeds(two, sentences, share):
    federation = share(sentences, 9)
    assert same(trainer(federation).start(), two.start())
    assert not same(trainer(federation, seed=4).start(), two.start())


@pytest.mark.parametrize(
    ("model", "changes", "text"),
    [
        ("tiny-bert", {"length": 129}, "training.length: got 129; the model takes at most 128 tokens"),
        (
            "tiny-vit",
            {"image_size": 30},
            "training.image_size: got 30; want a multiple of the model's patch of 7 pixels",
        ),
        ("tiny-bert", {"device": "abacus"}, "training.device: got 'abacus'; want auto, cpu, cuda, cuda:1 or mps"),
    ],
)
def test_settings_that_the_model_or_machine_can_not_run_are_refused_by_key(
    sentences, pictures, share, model, changes, text
):
    federation = share(pictures if model == "tiny-vit" else sentences, 9)
    with pytest.raises(ConfigError) as error:
        trainer(federation, replace(PLAIN, **changes), model)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lr": 0.0}, "lr: got 0.0; want more than 0"),
        ({"lr": float("nan")}, "lr: got nan; want more than 0"),
        ({"batch": 0}, "batch: got 0; want at least 1 row"),
        ({"steps": 0}, "steps: got 0; want at least 1, or leave it out to train by epochs"),
        ({"clip": -1.0}, "clip: got -1.0; want more than 0, or leave it out"),
        ({"momentum": 0.5}, "momentum: got 0.5; want 0 with adamw, which has its own"),
        ({"prox": -0.1}, "prox: got -0.1; want 0 or more"),
        ({"length": 1}, "length: got 1; want at least 2 tokens"),
        ({"precision": "fp16"}, "precision: got fp16; want auto, fp32, bf16 or fastest"),
        ({"optimiser": "lion"}, "optimiser: got lion; want adamw or sgd"),
    ],
)
def test_a_setting_out_of_range_names_its_field(changes, text):
    with pytest.raises(ValueError, match="^" + text.replace(".", r"\.")):
        Training(**changes)


def test_a_table_of_one_class_can_not_be_trained_on(share):
    table = Table("classify", ("a", "b", "c"), np.zeros(3, np.int64), ("only",))
    with pytest.raises(ConfigError, match="needs at least 2 classes; got 1: only"):
        trainer(share(table, 2))
