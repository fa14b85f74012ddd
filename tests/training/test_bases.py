"""A base model is the same in every process, frozen, and told from any other by its fingerprint."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from fedpeft.errors import ConfigError
from fedpeft.training import fingerprints, packaged
from fedpeft.training.bases import load_base
from fedpeft.training.devices import choose
from fedpeft.training.settings import Model

CPU = choose("cpu")
ABC = ("a", "b", "c")


def base(name="tiny-bert", task="classify", classes=ABC, seed=3, **settings):
    return load_base(Model(str(name), **settings), task, classes, seed, CPU)


@pytest.fixture
def copy(tmp_path):
    """tiny-bert in a folder of its own, to be changed."""
    return shutil.copytree(packaged.folder("tiny-bert"), tmp_path / "copy")


def test_the_whole_base_is_frozen_and_the_labels_are_in_its_configuration():
    found = base()
    assert not any(x.requires_grad for x in found.model.parameters())
    assert found.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert found.model.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert found.fresh == ("classifier.bias", "classifier.weight")


def test_a_fresh_head_comes_from_the_seed_whatever_has_been_drawn_before():
    state = torch.get_rng_state()
    one = base().model.classifier.weight
    torch.manual_seed(99)
    two, other = base().model.classifier.weight, base(seed=4).model.classifier.weight
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert 0.01 < one.std() < 0.03
    torch.set_rng_state(state)
    base()
    assert torch.equal(torch.get_rng_state(), state), "loading has moved torch's random state"


def test_another_process_has_the_same_head_and_fingerprint():
    code = (
        "from fedpeft.training.environment import prepare; prepare()\n"
        "from fedpeft.training.bases import load_base\n"
        "from fedpeft.training.devices import choose\n"
        "from fedpeft.training.settings import Model\n"
        "x = load_base(Model('tiny-bert'), 'classify', ('a', 'b', 'c'), 3, choose('cpu'))\n"
        "print(x.fingerprint, x.model.classifier.weight.detach().numpy().tobytes().hex())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    here = base()
    assert done.stdout.split() == [here.fingerprint, here.model.classifier.weight.numpy().tobytes().hex()]


def test_the_fingerprint_leaves_out_the_fresh_head():
    found = {base(seed=seed, classes=classes).fingerprint for seed in (1, 2) for classes in (ABC, ("x", "y"))}
    assert len(found) == 1
    assert len(found.pop()) == 64


def test_one_bit_of_one_weight_changes_the_fingerprint(copy):
    before = base(copy).fingerprint
    weights = load_file(copy / "model.safetensors")
    name = sorted(weights)[-1]
    weights[name].view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert base(copy).fingerprint != before


def test_what_weights_do_not_show_changes_the_fingerprint(copy):
    before = base(copy).fingerprint
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_attention_heads": 6}))
    assert base(copy).fingerprint != before


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "gelu"},
        {"layer_norm_epsilon": 1e-3},
        {"n_head": 4},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
)
def test_what_weights_of_gpt2_do_not_show_changes_its_answers_and_its_fingerprint(change):
    torch.manual_seed(0)
    small = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    plain = GPT2LMHeadModel(GPT2Config(**small, initializer_range=0.3)).eval()
    other = GPT2LMHeadModel(GPT2Config(**(small | change))).eval()
    other.load_state_dict(plain.state_dict())
    ids = torch.arange(8)[None]
    assert (plain(ids).logits - other(ids).logits).abs().max() > 1e-3
    assert fingerprints._of_weights(plain, frozenset()) != fingerprints._of_weights(other, frozenset())


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("bert", {"is_decoder": True}),
        ("bert", {"layer_norm_eps": 1e-3}),
        ("roberta", {"pad_token_id": 2}),
        ("distilbert", {"activation": "relu"}),
        ("distilbert", {"n_heads": 4}),
        ("llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
        ("mistral", {"sliding_window": 7}),
        ("gemma2", {"hidden_activation": "gelu"}),
        ("gemma2", {"attn_logit_softcapping": 1.0}),
        ("gemma2", {"final_logit_softcapping": 1.0}),
        ("gemma2", {"query_pre_attn_scalar": 9}),
        ("gemma2", {"layer_types": ["full_attention", "full_attention"]}),
        ("smollm3", {"no_rope_layers": [0, 0]}),
        ("qwen2", {"rms_norm_eps": 1e-2}),
    ],
)
def test_the_fingerprint_knows_the_settings_of_other_families(kind, change):
    class Weightless(torch.nn.Module):
        config = AutoConfig.for_model(kind, num_hidden_layers=2)

    before = fingerprints._of_weights(Weightless(), frozenset())
    Weightless.config = AutoConfig.for_model(kind, num_hidden_layers=2, **change)
    assert fingerprints._of_weights(Weightless(), frozenset()) != before


def test_a_digest_that_was_kept_of_other_settings_is_not_read(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "_SETTINGS", ("model_type",))
    fewer = base(copy).fingerprint
    monkeypatch.undo()
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    assert base(copy).fingerprint != fewer


def test_different_models_have_different_fingerprints_and_a_copy_has_the_same(copy):
    assert base(copy).fingerprint == base().fingerprint
    assert base("tiny-llama").fingerprint != base().fingerprint


def test_the_fingerprint_of_the_same_files_is_taken_once(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    before = base(copy).fingerprint
    monkeypatch.setattr(fingerprints, "_of_weights", lambda *_: "f" * 64)
    assert base(copy).fingerprint == before
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert base(copy).fingerprint == "f" * 64


def test_a_fingerprint_that_can_not_be_kept_is_taken_each_time(copy, monkeypatch, tmp_path):
    before = base(copy).fingerprint
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "file"))
    assert base(copy).fingerprint == before


@pytest.mark.parametrize(("dropout", "equal"), [(False, True), (True, False)])
def test_the_base_drops_out_only_if_asked_to(dropout, equal):
    found = base(dropout=dropout)
    found.model.train()
    ids = torch.arange(6, 40)[None]
    with torch.no_grad():
        one, two = (found.model(input_ids=ids).logits for _ in range(2))
    assert torch.equal(one, two) == equal
    assert found.model.config.hidden_dropout_prob == 0.1, "the configuration should stay the model's own"


def test_bf16_is_for_the_base_and_not_for_a_fresh_head():
    plain, half = base(), load_base(Model("tiny-bert"), "classify", ABC, 3, choose("cpu", "bf16"))
    kinds = {n: x.dtype for n, x in half.model.named_parameters()}
    assert {kinds.pop(n) for n in half.fresh} == {torch.float32}
    assert set(kinds.values()) == {torch.bfloat16}
    assert half.fingerprint == plain.fingerprint


def test_a_tokenizer_can_pad_and_so_can_a_classifier_on_a_decoder():
    found = base("tiny-llama")
    assert found.words.pad_token_id == found.model.config.pad_token_id == 0
    with pytest.raises(ValueError, match="an image model has no tokenizer"):
        base("tiny-vit", "image").words  # noqa: B018


def test_an_image_model_says_its_pixels():
    assert base("tiny-vit", "image").pixels.size == 28
    assert base("tiny-vit", "image").pixels.patch == 7


@pytest.mark.parametrize(
    ("name", "task", "classes", "text"),
    [
        (
            "no/such-model",
            "classify",
            ABC,
            "model.name: got 'no/such-model'; want minilm, smollm2, dinov2-small, tiny-bert",
        ),
        ("minilmm", "classify", ABC, "model.name: got 'minilmm'; want minilm"),
        ("./nowhere", "classify", ABC, "model.name: './nowhere' is not a model: there is no config.json in it"),
        ("tiny-vit", "classify", ABC, "model.name: 'tiny-vit' (vit) has no model for sequence classification"),
        ("tiny-llama", "image", ABC, "model.name: 'tiny-llama' (llama) has no model for image classification"),
        ("tiny-bert", "lm", (), "model.name: the files of 'tiny-bert' lack"),
        ("tiny-bert", "classify", ("a",), "data: sequence classification needs at least 2 classes; got 1: a"),
    ],
)
def test_a_model_that_can_not_be_had_is_refused_with_its_key(name, task, classes, text):
    with pytest.raises(ConfigError) as error:
        base(name, task, classes)
    assert str(error.value).startswith(text)


def test_a_folder_that_lacks_weights_of_its_layers_is_refused(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"lack 1 tensors of BertForSequenceClassification, such as bert\.encoder\.layer\.1"
    ):
        base(copy)


def test_a_file_of_weights_that_is_cut_off_is_refused(copy):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"can't be loaded for sequence classification"):
        base(copy)


@pytest.mark.slow
def test_smollm2_knows_an_english_sentence_from_its_shuffled_words():
    found = base("smollm2", "lm", ())
    sentence = (
        "The history of the steam engine begins with early experiments in the seventeenth century, when inventors "
        "tried to use the pressure of steam to pump water out of mines."
    )
    ids = found.words(sentence, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = found.model(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(2.401, abs=0.001)  # measured to three decimals when the package was chosen
    assert found.words.chat_template is not None


@pytest.mark.slow
def test_minilm_puts_paraphrases_together():
    found = base("minilm")
    texts = (
        "A dog is playing in the garden.",
        "The puppy runs around on the lawn.",
        "The central bank raised its interest rate.",
        "Borrowing costs were increased by the monetary authority.",
    )
    inputs = found.words(list(texts), return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = found.model.bert(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    cosine = (mean @ mean.T).numpy()
    assert min(cosine[0, 1], cosine[2, 3]) > 0.4
    assert np.abs(cosine[:2, 2:]).max() < 0.2


@pytest.mark.slow
def test_dinov2_has_every_weight_but_its_head_and_takes_small_images():
    found = base("dinov2-small", "image")
    assert found.fresh == ("classifier.bias", "classifier.weight")
    assert found.pixels.size == 112
    assert sum(x.numel() for x in found.model.dinov2.parameters()) == 22_056_576
    with torch.no_grad():
        out = found.model(pixel_values=torch.zeros(2, 3, 112, 112))
    assert out.logits.shape == (2, 3)
