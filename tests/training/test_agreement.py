"""The trial of a method on the very model: it passes what is right, and notices all that is wrong."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, XLNetConfig, XLNetForSequenceClassification

from fedpeft.rounds import Failed
from fedpeft.training import packaged
from fedpeft.training.agreement import disagreement
from fedpeft.training.cohort import CohortTrainer
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.members import Members
from fedpeft.training.pool import Pool
from fedpeft.training.settings import Method, Model
from fedpeft.training.stack import Stack
from tests.training.cohort_cases import LINEARS, MODELS, TRAINING, distance, federation, jobs, table, trainers
from tests.training.peft_cases import PEFT_WARNINGS

pytestmark = [pytest.mark.filterwarnings(x) for x in PEFT_WARNINGS]
DORA = Method("dora", rank=3, targets=LINEARS["tiny-bert"])


@pytest.fixture(scope="module")
def words():
    return trainers("tiny-bert", DORA)


@pytest.fixture
def stack(words):
    return Stack.on(words[0].bridge)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "ln_tuning", "vera", "tinylora"])
def test_what_is_right_passes(name, model):
    options = {"u": 5} if name == "tinylora" else {}
    loop, _ = trainers(model, Method(name, rank=3, options=options))
    assert disagreement(loop, Stack.on(loop.bridge)) == ""


@pytest.mark.parametrize("model", MODELS)
def test_gradients_that_are_silently_wrong_are_noticed(model):
    loop, cohort = trainers(model, Method("osf", rank=3))
    found = disagreement(loop, Stack.on(loop.bridge))
    assert found.startswith("its gradients differ by ")
    assert found.endswith(" of their size")
    assert float(found.split()[4]) > 0.02
    assert cohort.refusal == found
    for want, got in zip(loop.train_many(jobs(loop)), cohort.train_many(jobs(loop)), strict=True):
        assert distance(got.trained, want.trained) == 0.0, "the loop should have done it"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("loha", "data-dependent control flow"),
        ("oft", "index_put_"),
        ("randlora", "autograd.Function with functorch"),
        ("shira", "SparseCPU"),
    ],
)
def test_what_raises_is_named_with_its_reason(name, text):
    loop, _ = trainers("tiny-bert", Method(name, rank=3))
    found = disagreement(loop, Stack.on(loop.bridge))
    assert text in found
    assert found.split(":")[0] in ("RuntimeError", "NotImplementedError")
    assert "\n" not in found
    assert len(found) < 230


def test_a_model_that_moves_its_rows_about_is_noticed_though_the_adapter_is_plain(tmp_path: Path):
    config = XLNetConfig(
        vocab_size=300, d_model=24, n_layer=2, n_head=2, d_inner=36, dropout=0.0, summary_last_dropout=0.0
    )
    torch.manual_seed(0)
    XLNetForSequenceClassification(config).transformer.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(packaged.folder("tiny-bert")).save_pretrained(tmp_path)
    training = replace(TRAINING, attention="eager")
    method = Method(rank=3, targets=("layer_1", "layer_2"))
    cohort = CohortTrainer.load(Model(str(tmp_path)), method, training, federation(table("words")), 3)
    assert cohort.stack.is_plain
    assert cohort.refusal.startswith("its gradients differ by ")


def spoilt(monkeypatch, name, change):
    """Stack's method ``name`` with what it gives changed."""
    whole = getattr(Stack, name)
    monkeypatch.setattr(Stack, name, lambda self, *args: change(whole(self, *args)))


def scaled(forward, factor):
    return lambda *args, **kwargs: factor * forward(*args, **kwargs)


def turned(x):
    """One client's tensors for another."""
    return x.roll(1, 0)


class TestABrokenStack:
    """Each way to break it is noticed."""

    def test_with_a_layer_a_hundredth_too_large(self, words, stack, monkeypatch):
        spoilt(monkeypatch, "_mapped", lambda forward: scaled(forward, 1.01))
        assert "gradients differ" in disagreement(words[0], stack)

    def test_with_a_low_rank_layer_a_hundredth_too_large(self, monkeypatch):
        loop, _ = trainers("tiny-bert")
        spoilt(monkeypatch, "_linear", lambda forward: scaled(forward, 1.01))
        assert "gradients differ" in disagreement(loop, Stack.on(loop.bridge))

    def test_with_clients_mixed_up(self, words, stack, monkeypatch):
        put = Stack.put
        monkeypatch.setattr(
            Stack, "put", lambda self, tensors, *a: put(self, {n: turned(x) for n, x in tensors.items()}, *a)
        )
        assert "gradients differ" in disagreement(words[0], stack)

    @pytest.mark.parametrize("at", range(14))
    def test_with_one_tensor_of_one_client_that_gets_no_gradient(self, words, stack, monkeypatch, at):
        put = Stack.put

        def partly(self, tensors, *a):
            name = list(tensors)[at]
            still = tensors[name].detach()
            put(self, dict(tensors) | {name: torch.cat([tensors[name][:1], still[1:2], tensors[name][2:]])}, *a)

        monkeypatch.setattr(Stack, "put", partly)
        assert "gradients differ" in disagreement(words[0], stack)

    def test_with_rows_in_another_order(self, words, stack, monkeypatch):
        batch = Pool._batch

        def swapped(self, chosen):
            found, owner, width = batch(self, chosen)
            return found, owner.flip(0), width

        monkeypatch.setattr(Pool, "_batch", swapped)
        assert "gradients differ" in disagreement(words[0], stack)

    def test_with_a_client_that_fails(self, words, stack, monkeypatch):
        batch = Pool._batch

        def spoilt(self, chosen):
            found, owner, width = batch(self, chosen)
            return replace(found, targets=found.targets - 7), owner, width

        monkeypatch.setattr(Pool, "_batch", spoilt)
        assert disagreement(words[0], stack).startswith("IndexError: Target")

    @pytest.mark.parametrize("client", [0, 2])
    def test_with_a_gradient_that_is_not_a_number_under_a_loss_that_is(self, words, stack, monkeypatch, client):
        gather = Members.gather

        def spoilt(self, rows, gradients):
            gradients[client, -1] = float("nan")
            gather(self, rows, gradients)

        monkeypatch.setattr(Members, "gather", spoilt)
        assert disagreement(words[0], stack) == "its gradients differ by nan of their size"

    def test_with_a_loss_that_is_not_finite_when_stacked(self, words, stack, monkeypatch):
        spoilt(monkeypatch, "_mapped", lambda forward: scaled(forward, float("nan")))
        assert disagreement(words[0], stack) == "its gradients differ by inf of their size"


def test_the_settings_of_training_do_not_matter(stack, words):
    loop, _ = words
    for changes in (
        {"optimiser": "sgd", "momentum": 0.9, "lr": 1e6},
        {"clip": 1e-12, "accumulate": 7},
        {"prox": 1e9, "weight_decay": 1e9},
        {"lr": 1e-30, "epochs": 50, "batch": 1},
    ):
        other = loop.over(loop.federation, replace(TRAINING, **changes))
        assert disagreement(other, stack) == "", changes


def test_dropout_is_off_in_the_trial_and_on_again_after_it():
    loop, _ = trainers("tiny-bert", replace(DORA, dropout=0.4))
    rates = [x.p for x in loop.bridge.model.modules() if isinstance(x, torch.nn.Dropout)]
    assert 0.4 in rates
    assert disagreement(loop, Stack.on(loop.bridge)) == ""
    assert [x.p for x in loop.bridge.model.modules() if isinstance(x, torch.nn.Dropout)] == rates


def test_dropout_is_on_again_even_if_the_trial_broke(monkeypatch):
    loop, _ = trainers("tiny-bert", replace(DORA, dropout=0.4))
    monkeypatch.setattr(Pool, "_pass", None)
    assert disagreement(loop, Stack.on(loop.bridge)) == "TypeError: 'NoneType' object is not callable"
    assert 0.4 in [x.p for x in loop.bridge.model.modules() if isinstance(x, torch.nn.Dropout)]


@pytest.mark.parametrize("sizes", [(0, 4, 0), (0, 2, 0, 1), (5, 0, 3, 2, 6)])
def test_the_trial_is_of_three_clients_however_few_have_rows(sizes, monkeypatch):
    loop, _ = trainers("tiny-bert", DORA, sizes=sizes)
    seen = []
    train = Pool.train
    monkeypatch.setattr(Pool, "train", lambda self, members: seen.extend(members) or train(self, members))
    assert disagreement(loop, Stack.on(loop.bridge)) == ""
    assert len(seen) == 3
    assert all(sizes[x.job.client] for x in seen)
    starts = [x.job.start.tensors() for x in seen]
    assert not any(np.array_equal(x, y) for x, y in zip(starts[0].values(), starts[1].values(), strict=True))


def test_where_nobody_has_rows_there_is_nothing_to_try():
    loop, _ = trainers("tiny-bert", DORA, sizes=(0, 0))
    assert disagreement(loop, Stack.on(loop.bridge)) == ""


def test_what_the_loop_can_not_do_either_is_no_disagreement(words, stack, monkeypatch):
    monkeypatch.setattr(TorchTrainer, "train_many", lambda _, some: [Failed("no") for _ in some])
    assert disagreement(words[0], stack) == ""


def test_in_bf16_what_is_right_passes_and_what_is_wrong_is_noticed(monkeypatch):
    """Each number has 8 bits, so that a fifth of a tensor's gradient is allowed; a mix-up is off by all of it."""
    loop, _ = trainers("tiny-bert", DORA, replace(TRAINING, precision="bf16"))
    assert disagreement(loop, Stack.on(loop.bridge)) == ""
    put = Stack.put
    monkeypatch.setattr(
        Stack, "put", lambda self, tensors, *a: put(self, {n: turned(x) for n, x in tensors.items()}, *a)
    )
    assert "gradients differ" in disagreement(loop, Stack.on(loop.bridge))
