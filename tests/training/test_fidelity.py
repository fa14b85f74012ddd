"""Adapters on packed bases: their gradients, the trial of them, what is refused, and both engines."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedpeft.errors import ConfigError
from fedpeft.rounds import Done, Trial
from fedpeft.training import fidelity
from fedpeft.training.bases import load_base
from fedpeft.training.bridge import Bridge
from fedpeft.training.cohort import CohortTrainer
from fedpeft.training.crew import share
from fedpeft.training.devices import choose
from fedpeft.training.fidelity import BOUNDS, cosine
from fedpeft.training.formats import FORMATS, pack, packed_fingerprint, unpack
from fedpeft.training.kept_bases import Shelf
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.quantised import FrozenEmbedding, FrozenLinear, matrices, quantise
from fedpeft.training.refusals import PACKED, packed_refusal
from fedpeft.training.settings import Method, Model, Training
from tests.training.cohort_cases import LINEARS, MODELS, SGD, TRAINING, assert_agree, federation, jobs, table
from tests.training.peft_cases import CASES, PEFT_WARNINGS, Case, batch, build

pytestmark = [pytest.mark.filterwarnings(x) for x in PEFT_WARNINGS]
PARAMETERS = 262 * 24 + 2 * (2 * 24 * 24 + 2 * 12 * 24 + 3 * 24 * 40 + 2 * 24) + 24  # of tiny-llama
ROUNDING = 1e-6  # as in test_cohort_equals_loop


def packed_trainers(
    model: str, format: str, method: Method | None = None, training: Training = SGD, sizes=(5, 2, 9, 1, 4, 7)
) -> tuple[TorchTrainer, CohortTrainer]:
    """The loop and the cohort on one packed model in memory."""
    method = method or Method(rank=3, alpha=6.0, targets=LINEARS[model])
    rows = federation(table(model, sum(sizes) + 3), sizes)
    loop = TorchTrainer.load(Model(model, quantise=format), method, training, rows, 3)
    cohort = CohortTrainer(loop.frozen, loop.bridge, loop.training, rows, loop.place, loop.start(), None, 4)
    return loop, cohort


def attached(case: Case) -> tuple[Bridge, dict[int, str]]:
    """The case's method on its model, moved from its start, and the names of the model's own parameters."""
    model = build(case.model)
    names = {id(x): n for n, x in model.named_parameters()}
    bridge = Bridge.attach(model, case.method, case.task, 0)
    start, rng = bridge.read(), np.random.default_rng(1)
    bridge.write(start.moved({n: 0.05 * rng.standard_normal(x.shape) for n, x in start.tensors().items()}))
    return bridge, names


def slopes(bridge: Bridge, model: str) -> dict[str, torch.Tensor]:
    inputs, labels = batch(model, 5)
    parameters = bridge.trainable("ab")
    scores = bridge.model.eval()(**inputs).logits
    if scores.ndim == 3:
        scores, labels = scores[:, bridge.prompt_length : -1].flatten(0, 1), labels[:, 1:].flatten()
    loss = functional.cross_entropy(scores, labels)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: x for n, x in zip(parameters, found, strict=True) if x is not None} | {"loss": loss.detach()}


def is_allowed(case: Case) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tests are collected without the filters above
        return not packed_refusal(case.method.name, vars(case.method.config(case.task)))


ALLOWED = [x for x in CASES if is_allowed(x)]


def test_there_are_cases_of_every_allowed_method():
    assert {x.method.name for x in ALLOWED} == set(PACKED)
    assert {x.model for x in ALLOWED} == {"bert", "llama", "gpt2", "vit"}


@pytest.mark.parametrize("case", ALLOWED, ids=lambda x: x.name)
def test_an_allowed_method_has_the_gradients_of_a_plain_base_with_the_unpacked_weights(case):
    plain, names = attached(case)
    found = [x for x in matrices(plain.model) if id(x.weight) in names and not x.weight.requires_grad]
    tables = {id(x.weight) for x in found if isinstance(x, nn.Embedding)}
    with torch.no_grad():
        for weight in {id(x.weight): x.weight for x in found}.values():
            flip = any(x.weight is weight and "Conv1D" in type(x).__name__ for x in found)
            format = "int8" if id(weight) in tables else "nf4"
            whole = unpack(pack((weight.T if flip else weight).numpy(), format))
            weight.copy_(torch.from_numpy(whole.T if flip else whole))
    packed, names = attached(case)
    quantise(packed.model, "nf4", names, torch.float32)
    kinds = {type(x) for x in packed.model.modules()}
    assert FrozenLinear in kinds
    assert case.model == "vit" or FrozenEmbedding in kinds
    want, got = slopes(plain, case.model), slopes(packed, case.model)
    assert want.keys() == got.keys()
    largest = max(float(x.abs().max()) for x in want.values())
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-4, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (Method("dora", rank=3), "'nf4', with which dora can't train: DoRA reads the base's weights for their norms"),
        (Method("lora", rank=3, options={"use_dora": True}), "lora can't train: DoRA reads"),
        (Method("hira", rank=3), "hira can't train: it may read the base's weights, and of peft's methods adalora, "),
        (Method("oft"), "with which oft can't train"),
        (Method("lora", rank=3, options={"init_lora_weights": "mica"}), "init_lora_weights = 'mica' is computed from"),
    ],
)
def test_a_method_that_reads_the_bases_weights_is_refused_by_name(method, text):
    with pytest.raises(ConfigError, match=r"model\.quantise: got ") as found:
        packed_trainers("tiny-bert", "nf4", method)
    assert text in str(found.value)
    assert 'use another adapter.method, or model.quantise = "none"' in str(found.value)


@pytest.mark.parametrize("name", ["pissa", "olora", "kasa"])
def test_starts_from_the_bases_weights_would_be_refused_even_if_they_federated(name):
    settings = {"init_lora_weights": name, "use_dora": False}
    assert name in packed_refusal("lora", settings)
    assert packed_refusal("lora", settings | {"init_lora_weights": "gaussian"}) == ""
    assert "target_parameters are parts" in packed_refusal("lora", {"target_parameters": ["experts.weight"]})
    assert "trainable_token_indices are parts" in packed_refusal("lora", {"trainable_token_indices": [3]})


@pytest.fixture(autouse=True)
def unkept(monkeypatch):
    """Each base is tried, as if none had been kept."""
    monkeypatch.setattr(Shelf, "find", lambda self: None)
    monkeypatch.setattr(Shelf, "put", lambda self, *_: None)


@contextmanager
def seen_cosines(monkeypatch) -> Iterator[list[float]]:
    found: list[float] = []
    monkeypatch.setattr(fidelity, "cosine", lambda x, y: found.append(cosine(x, y)) or found[-1])
    yield found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_packed_base_passes_its_trial_and_nothing_is_left_of_it(model, format, monkeypatch):
    whole = TorchTrainer.load(Model(model), Method(rank=3, targets=LINEARS[model]), SGD, federation(table(model)), 3)
    with seen_cosines(monkeypatch) as found:
        loop, _ = packed_trainers(model, format, Method(rank=3, targets=LINEARS[model]))
    assert len(found) == 1
    assert BOUNDS[format] <= found[0] < 1 - 1e-7
    for name, x in whole.start().tensors().items():
        np.testing.assert_array_equal(loop.bridge.read().tensors()[name], x)
        np.testing.assert_array_equal(loop.start().tensors()[name], x)
    assert all(x.grad is None for x in loop.bridge.model.parameters())


@pytest.mark.parametrize(("format", "way_out"), [("int8", "use none"), ("nf4", "use int8")])
def test_a_base_that_is_packed_wrongly_is_refused(format, way_out, monkeypatch):
    def spoilt(model, *rest):
        quantise(model, *rest)
        for x in model.modules():
            if isinstance(x, FrozenLinear) and "intermediate" in x.name:
                x.scales.neg_()

    monkeypatch.setattr(fidelity, "quantise", spoilt)
    with pytest.raises(ConfigError, match=f"model.quantise: with '{format}' the gradients of lora have .*{way_out}"):
        packed_trainers("tiny-bert", format)


def test_gradients_that_are_not_numbers_are_refused(monkeypatch):
    monkeypatch.setattr(fidelity, "cosine", lambda x, y: float("nan"))
    with pytest.raises(ConfigError, match="mean cosine of nan"):
        packed_trainers("tiny-bert", "int8")


def test_the_cosine_is_a_mean_over_tensors_that_have_a_gradient():
    before = {"x": torch.tensor([3.0, 4.0]), "y": torch.tensor([[1.0, 0.0]]), "z": torch.tensor([1e-3, 0.0])}
    after = {"x": torch.tensor([4.0, 3.0]), "y": torch.tensor([[-2.0, 0.0]]), "z": torch.tensor([-1.0, 0.0])}
    assert cosine(before, after) == pytest.approx((24 / 25 - 1) / 2)
    assert cosine({}, {}) == 1.0
    assert cosine({"x": torch.zeros(2)}, {"x": torch.ones(2)}) == 1.0


def test_where_all_rows_are_cut_nothing_is_tried(monkeypatch):
    with seen_cosines(monkeypatch) as found:
        loop, _ = packed_trainers("tiny-llama", "int8", training=replace(SGD, length=3))
    assert found == []
    assert any(isinstance(x, FrozenLinear) for x in loop.bridge.model.modules())


def test_weights_that_can_not_be_packed_are_the_models_fault(monkeypatch):
    def broken(*_):
        raise ValueError("the weights are not all finite: the model is damaged")

    monkeypatch.setattr(fidelity, "quantise", broken)
    with pytest.raises(ConfigError, match=r"model\.quantise: the weights are not all finite"):
        packed_trainers("tiny-bert", "int8")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format", FORMATS)
def test_clients_trained_together_come_to_what_each_comes_to_by_itself(model, format):
    loop, cohort = packed_trainers(model, format)
    assert_agree(loop, cohort, jobs(loop), ROUNDING)


@pytest.mark.parametrize(
    "method",
    [
        Method("ia3"),
        Method("vera"),
        Method("ln_tuning"),
        Method("prompt_tuning"),
        Method(rank=3, targets=LINEARS["tiny-llama"], options={"bias": "all"}),
        Method(rank=3, targets=("all-linear",)),
        Method(rank=3, targets=("q_proj", "embed_tokens")),
        Method(rank=3, targets=LINEARS["tiny-llama"], save=("down_proj",)),
    ],
    ids=lambda x: f"{x.name} {' '.join((*x.targets, *x.save, *x.options))}",
)
def test_so_they_do_with_other_methods(method):
    loop, cohort = packed_trainers("tiny-llama", "nf4", method)
    assert_agree(loop, cohort, jobs(loop), ROUNDING)


def test_checkpointing_changes_nothing():
    loop, _ = packed_trainers("tiny-llama", "int4")
    other = loop.over(loop.federation, replace(SGD, checkpointing=True))
    for x, y in zip(loop.train_many(jobs(loop)), other.train_many(jobs(loop)), strict=True):
        for name, value in x.trained.tensors().items():
            np.testing.assert_allclose(y.trained.tensors()[name], value, atol=ROUNDING)


@pytest.mark.parametrize("model", MODELS)
def test_in_bf16_a_packed_base_trains_and_codes_are_those_of_fp32(model):
    full, _ = packed_trainers(model, "nf4")
    half, cohort = packed_trainers(model, "nf4", training=replace(TRAINING, precision="bf16"))
    pairs = zip(full.bridge.model.modules(), half.bridge.model.modules(), strict=True)
    linears = [(x, y) for x, y in pairs if isinstance(x, FrozenLinear)]
    assert linears
    assert all(torch.equal(x.codes, y.codes) and torch.equal(x.scales, y.scales) for x, y in linears)
    for x, y in zip(half.train_many(jobs(half)), cohort.train_many(jobs(half)), strict=True):
        assert isinstance(x, Done), x
        assert isinstance(y, Done), y
        assert y.metrics.mean_loss == pytest.approx(x.metrics.mean_loss, rel=0.02)  # 8 bits


@pytest.mark.parametrize("format", FORMATS)
def test_the_fingerprint_says_the_format_and_the_plain_one_is_as_ever(format):
    bases = {
        q: load_base(Model("tiny-bert", quantise=q), "classify", ("a", "b"), 0, choose("cpu")) for q in ("none", format)
    }
    plain, packed = bases["none"].fingerprint, bases[format].fingerprint
    assert packed != plain
    assert packed == packed_fingerprint(plain, format)
    assert packed_fingerprint(plain, "none") == plain
    assert len({packed_fingerprint(plain, x) for x in FORMATS}) == 3
    assert packed_fingerprint("0" * 64, format) != packed
    one, other = (packed_fingerprint(plain, x, ("none", format)) for x in ("none", format))
    assert one == other == packed_fingerprint(plain, format, (format, "none", format))
    assert one not in {plain, packed, packed_fingerprint(plain, format, (format,))}


@pytest.mark.parametrize(("format", "most"), [("int8", 0.36), ("nf4", 0.30), ("int4", 0.30)])
def test_a_packed_model_takes_a_third_in_memory(format, most):
    """Tiny matrices of 24 columns have many scales: of a real model's bytes it is a quarter, and a seventh."""
    sizes = {}
    for quantise_ in ("none", format):
        trainer = TorchTrainer.load(
            Model("tiny-llama", quantise=quantise_), Method(rank=1), SGD, federation(table("tiny-llama")), 3
        )
        model = trainer.bridge.model
        held = {x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}
        sizes[quantise_] = sum(held.values())
        assert trainer.frozen.parameters == PARAMETERS
    assert sizes[format] < most * sizes["none"]


def test_in_shared_memory_it_is_the_same():
    loop, _ = packed_trainers("tiny-llama", "nf4")
    before = list(loop.train_many(jobs(loop)))
    share(loop.bridge.model)
    found = [x for x in loop.bridge.model.modules() if isinstance(x, FrozenLinear)]
    assert all(x.codes.is_shared() and x.scales.is_shared() for x in found)
    for x, y in zip(before, loop.train_many(jobs(loop)), strict=True):
        for name, value in x.trained.tensors().items():
            np.testing.assert_array_equal(y.trained.tensors()[name], value)


def test_evaluation_is_of_the_packed_base():
    loop, cohort = packed_trainers("tiny-llama", "nf4")
    trials = [Trial(i, "train", loop.start()) for i in range(3)]
    for x, y in zip(loop.evaluate_many(trials), cohort.evaluate_many(trials), strict=True):
        assert x.mean_loss == pytest.approx(y.mean_loss)
        assert x.units == y.units > 0


def test_the_bounds_are_those_that_were_measured():
    assert BOUNDS == {"int8": 0.97, "nf4": 0.4, "int4": 0.4}
