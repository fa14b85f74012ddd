"""Packed bases that are kept: the second start has no fp32 model, and is the same bit for bit."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedpeft.errors import ConfigError
from fedpeft.rounds import Done
from fedpeft.training import bases, fidelity, kept_bases
from fedpeft.training.environment import cache_folder
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.packaged import folder
from fedpeft.training.quantised import FrozenEmbedding, FrozenLinear
from fedpeft.training.settings import Method, Model
from tests.training.cohort_cases import LINEARS, SGD, federation, jobs, table
from tests.training.peft_cases import PEFT_WARNINGS

pytestmark = [pytest.mark.filterwarnings(x) for x in PEFT_WARNINGS]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own, in which the tiny models are already."""
    models = cache_folder() / "models"
    for name in LINEARS:
        folder(name)
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(models, tmp_path / "cache" / "models", ignore=shutil.ignore_patterns("smollm2*", "dinov2*"))
    return tmp_path / "cache"


def load(model: str, quantise="int8", method: Method | None = None, name: str = "", training=SGD) -> TorchTrainer:
    method = method or Method(rank=3, targets=LINEARS[model])
    return TorchTrainer.load(Model(name or model, quantise=quantise), method, training, federation(table(model)), 3)


def assert_same(one: TorchTrainer, other: TorchTrainer) -> None:
    """Tensors, buffers, ties, precision, fingerprint and training."""
    assert one.base == other.base
    assert one.frozen.parameters == other.frozen.parameters
    assert one.frozen.vocabulary == other.frozen.vocabulary
    mine, theirs = (
        {**dict(x.bridge.model.named_parameters()), **dict(x.bridge.model.named_buffers())} for x in (one, other)
    )
    assert list(mine) == list(theirs)
    for name, x in mine.items():
        assert x.dtype == theirs[name].dtype, name
        assert torch.equal(x, theirs[name]), name
        assert x.requires_grad == theirs[name].requires_grad, name
    for name, x in one.start().tensors().items():
        np.testing.assert_array_equal(other.start().tensors()[name], x)
    for x, y in zip(one.train_many(jobs(one)), other.train_many(jobs(other)), strict=True):
        assert isinstance(x, Done), x
        assert isinstance(y, Done), y
        assert x.metrics == y.metrics
        for name, value in x.trained.tensors().items():
            np.testing.assert_array_equal(y.trained.tensors()[name], value)


def refuse_weights(monkeypatch) -> None:
    def refused(*_):
        raise AssertionError("the fp32 model was loaded")

    monkeypatch.setattr(bases, "_weights", refused)
    monkeypatch.setattr(fidelity, "gradients", refused)


@pytest.mark.parametrize("model", LINEARS)
@pytest.mark.parametrize("quantise", ["int8", "nf4"])
def test_the_second_start_is_the_same_without_the_fp32_model(model, quantise, monkeypatch):
    first = load(model, quantise)
    assert first.frozen.source is None
    refuse_weights(monkeypatch)
    second = load(model, quantise)
    assert second.frozen.source is not None
    assert_same(first, second)
    assert_same(
        replace(second, training=replace(SGD, checkpointing=True)),
        replace(first, training=replace(SGD, checkpointing=True)),
    )


def test_in_bf16_it_is_the_same_too_from_one_file(cache, monkeypatch):
    half = replace(SGD, precision="bf16")
    first = load("tiny-llama", training=half)
    refuse_weights(monkeypatch)
    assert_same(first, load("tiny-llama", training=half))
    load("tiny-llama")
    assert len(list((cache / "packed").glob("*.safetensors"))) == 1


def test_gpt2_with_its_transposed_matrices_and_its_tie_is_the_same(tmp_path, monkeypatch):
    torch.manual_seed(0)
    there = tmp_path / "gpt2"
    shutil.copytree(folder("tiny-llama"), there)
    config = GPT2Config(
        n_layer=2,
        n_embd=24,
        n_head=4,
        n_inner=40,
        vocab_size=262,
        n_positions=64,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    (there / "model.safetensors").unlink()
    GPT2LMHeadModel(config).save_pretrained(there)
    method = Method(rank=3, targets=("c_attn", "c_proj"), options={"fan_in_fan_out": True})
    first = load("tiny-llama", "int4", method, str(there))
    assert any(isinstance(x, FrozenLinear) and x.transposed for x in first.bridge.model.modules())
    refuse_weights(monkeypatch)
    assert_same(first, load("tiny-llama", "int4", method, str(there)))


def test_codes_are_mapped_read_only_from_the_first_start_on(cache):
    for trainer in (load("tiny-llama"), load("tiny-llama")):
        (file,) = (cache / "packed").glob("*.safetensors")
        spans = [
            x.split()[0].split("-")
            for x in Path("/proc/self/maps").read_text().splitlines()
            if str(file) in x and " r--" in x
        ]
        inside = [range(int(a, 16), int(b, 16)) for a, b in spans]
        packed = [x for x in trainer.bridge.model.modules() if isinstance(x, FrozenLinear | FrozenEmbedding)]
        assert packed
        assert all(any(x.codes.data_ptr() in y for y in inside) for x in packed)


def test_another_method_target_or_file_is_tried_anew(monkeypatch):
    load("tiny-llama")
    tried = []
    monkeypatch.setattr(fidelity, "cosine", lambda *x, real=fidelity.cosine: tried.append(1) or real(*x))
    load("tiny-llama", method=Method(rank=2, alpha=4.0, targets=LINEARS["tiny-llama"]))
    assert tried == []  # another rank or scale is no other method
    load("tiny-llama", method=Method(rank=3, targets=("down_proj",)))
    load("tiny-llama", method=Method("ia3"))
    load("tiny-llama", method=Method(rank=3, targets=LINEARS["tiny-llama"], options={"bias": "all"}))
    assert len(tried) == 3
    os.utime(folder("tiny-llama") / "model.safetensors", (1, 1))
    load("tiny-llama")
    assert len(tried) == 4


def test_trained_biases_are_copies_that_may_be_written(monkeypatch):
    method = Method(rank=3, targets=LINEARS["tiny-bert"], options={"bias": "all"})
    first = load("tiny-bert", method=method)
    refuse_weights(monkeypatch)
    assert_same(first, load("tiny-bert", method=method))


def test_a_method_that_trains_a_matrix_whole_is_not_kept(monkeypatch):
    method = Method(rank=3, targets=LINEARS["tiny-llama"], save=("down_proj",))
    first = load("tiny-llama", method=method)
    second = load("tiny-llama", method=method)
    assert second.frozen.source is None
    assert_same(first, second)


def test_a_damaged_file_is_made_anew(cache):
    first = load("tiny-llama")
    (file,) = (cache / "packed").glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.unlink()  # the first one's pages are of the old file
    file.write_bytes(raw)
    second = load("tiny-llama")
    assert second.frozen.source is None
    assert_same(first, second)
    assert load("tiny-llama").frozen.source is not None


def test_bases_that_were_used_longest_ago_make_room(cache, monkeypatch):
    monkeypatch.setattr(kept_bases, "hold", lambda file: True)  # as if those who used them had ended
    monkeypatch.setenv("FEDPEFT_CACHE_LIMIT", "1")
    load("tiny-llama", "int8")
    (first,) = (cache / "packed").glob("*.safetensors")
    load("tiny-llama", "nf4")
    (second,) = (cache / "packed").glob("*.safetensors")
    assert second != first
    assert load("tiny-llama", "int8").frozen.source is None


def test_a_base_that_is_in_use_stays(cache, monkeypatch):
    monkeypatch.setenv("FEDPEFT_CACHE_LIMIT", "1")
    for quantise in ("int8", "nf4"):
        load("tiny-llama", quantise)
    assert len(list((cache / "packed").glob("*.safetensors"))) == 2
    assert load("tiny-llama", "int8").frozen.source is not None


def test_a_failed_trial_keeps_nothing(cache, monkeypatch):
    monkeypatch.setattr(fidelity, "cosine", lambda x, y: 0.1)
    with pytest.raises(ConfigError, match=r"model\.quantise"):
        load("tiny-llama")
    assert not (cache / "packed").exists()


def test_a_cache_that_can_not_be_written_is_no_error(cache):
    (cache / "packed").write_text("in the way")
    first = load("tiny-llama")
    assert any(isinstance(x, FrozenLinear) for x in first.bridge.model.modules())
