"""What can't be kept below is refused by the key, and what is kept is in the memory that is foretold."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.errors import ConfigError
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.memory import parts
from fedpeft.training.plan import Choice, Planner
from fedpeft.training.predict import Load, Sizes, kept_below, predict
from fedpeft.training.settings import Method, Model, Training
from tests.training.cohort_cases import federation, table
from tests.training.lower_cases import load

KEEPING = Training(lower="bf16", length=24, device="cpu", threads=1)


def refused(model, method, data="tiny-bert", **base):
    with pytest.raises(ConfigError) as error:
        TorchTrainer.load(Model(model, **base), method, KEEPING, federation(table(data, 12), (5, 4)), 1)
    return str(error.value)


def test_an_adapter_on_all_layers_leaves_nothing_to_keep():
    found = refused("tiny-bert", Method(rank=2))
    assert found.startswith(
        'training.lower: got "bf16", and base_model.model.bert.encoder.layer.0.attention.self.query'
    )
    assert found.endswith('want adapter.layers, the number of top layers to adapt, or "none"')


def test_another_family_is_refused_by_name():
    found = refused("tiny-vit", Method(rank=2, layers=1), "tiny-vit")
    assert found == 'training.lower: got "bf16", which works for bert, gpt2, llama, and this model is vit; want "none"'


@pytest.mark.parametrize("method", [Method("prompt_tuning"), Method("prefix_tuning")], ids=lambda x: x.name)
def test_a_prompt_is_refused(method):
    found = refused("tiny-llama", method, "tiny-llama")
    assert found.startswith(f'training.lower: got "bf16", and {method.name} trains prompt_encoder')
    assert found.endswith('which comes before all layers; want "none"')


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_trained_embedding_is_refused():
    found = refused("tiny-llama", Method(rank=2, targets=("embed_tokens",)), "tiny-llama")
    assert "lora trains base_model.model.model.embed_tokens" in found


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_head_alone_is_refused():
    found = refused("tiny-llama", Method(rank=2, targets=("lm_head",)), "tiny-llama")
    assert found == 'training.lower: got "bf16", and no layer has anything that is trained; want "none"'


def test_dropout_below_is_refused():
    found = refused("tiny-bert", Method(rank=2, layers=1), dropout=True)
    assert (
        found
        == 'training.lower: got "bf16", and model.dropout is on, so that no text gives the same twice; want it off'
    )


def test_dropout_of_the_adapter_is_as_without(tmp_path):
    from tests.training.lower_cases import CLOSE, apart, begun, trained

    data = federation(table("tiny-bert", 12), (5, 4))
    plain = Training(lr=0.1, optimiser="sgd", length=24, device="cpu", threads=1)
    one, other = (
        TorchTrainer.load(Model("tiny-bert"), Method(rank=2, layers=1, dropout=0.5), x, data, 1)
        for x in (plain, replace(plain, lower="fp32"))
    )
    job = begun(one)
    assert apart(trained(other, job), trained(one, job), job) <= CLOSE


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"^lower: got int8; want none, fp32 or bf16"):
        Training(lower="int8")
    with pytest.raises(ValueError, match=r"^lower_room: got '1 pint'; want bytes, such as 4e9 or '4GB'"):
        Training(lower_room="1 pint")
    assert Training().bytes_lower == 0
    assert Training(lower="fp32").bytes_lower == 1_000_000_000
    assert Training(lower="fp32", lower_room="20MB").bytes_lower == 20_000_000


SIZES = Sizes.of({"model_type": "llama", "hidden_size": 10, "num_hidden_layers": 4, "vocab_size": 90}, predicts=True)


def test_what_is_kept_is_foretold_by_texts_up_to_the_room():
    training = Training(lower="bf16", length=7, lower_room=1000)
    assert kept_below(SIZES, training, 3) == 3 * 7 * 10 * 2
    assert kept_below(SIZES, replace(training, lower="fp32"), 3) == 3 * 7 * 10 * 4
    assert kept_below(SIZES, training, 99) == kept_below(SIZES, training, None) == 1000
    assert kept_below(SIZES, replace(training, lower="none"), 3) == 0
    assert kept_below(SIZES, replace(training, lower="none"), None) == 0


def test_what_is_kept_is_a_part_of_torchs_peak_and_not_of_onnxruntimes():
    load = Load(parameters=1000, trained=53, targets=("q_proj",), layers=1, rows=2, length=8)
    without, with_it = predict(SIZES, load), predict(SIZES, replace(load, kept=777))
    assert with_it == replace(without, kept=777)
    assert with_it.total == without.total + 777
    assert predict(SIZES, replace(load, kept=777, engine="onnx")).kept == 0


def test_the_plan_and_a_loaded_model_know_the_setting(tmp_path):
    choice = Choice("torch", "none", ("q_proj",), 4, 2, 8, 8, 16, False)
    planner = Planner(SIZES, SIZES.parameters)
    more = planner.taken(replace(choice, kept=500), choice).parts.total - planner.taken(choice, choice).parts.total
    assert more == 500
    trainer = load("tiny-bert", tmp_path, KEEPING)
    base = trainer.frozen
    found = parts(base.model.config, base.parameters, trainer.start().spec, KEEPING, texts=5)
    assert found.kept == 5 * 24 * 24 * 2
    np.testing.assert_equal(parts(base.model.config, base.parameters, trainer.start().spec, KEEPING).kept, 10**9)
