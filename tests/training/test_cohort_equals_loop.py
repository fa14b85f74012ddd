"""Clients that are trained together come to what each comes to by itself: the cohort engine is the loop, to rounding.

With sgd the two differ by rounding alone, below 1e-6 after all steps. AdamW divides a gradient by its own size, so that
rounding of one that is next to nothing grows, to a part of lr; where it is truly zero (the bias of the keys in
attention, which softmax takes out again) to lr itself, so that such methods are compared with sgd.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, RobertaConfig, RobertaModel

from fedpeft.training import packaged
from fedpeft.training.settings import Method, Training
from tests.training.cohort_cases import LINEARS, MODELS, TRAINING, assert_agree, jobs, trainers, with_ranks, with_tails
from tests.training.peft_cases import PEFT_WARNINGS

pytestmark = [pytest.mark.filterwarnings(x) for x in PEFT_WARNINGS]
SGD = replace(TRAINING, optimiser="sgd", lr=0.05)
ROUNDING = 1e-6
"""Of a dozen steps of sgd whose numbers are below 1: a unit in the last place of 1 is 1.2e-7."""
WHOLE = {"tiny-bert": "intermediate.dense", "tiny-llama": "down_proj", "tiny-vit": "fc1"}
METHODS = {
    "lora": lambda model: Method(rank=3, alpha=6.0, targets=LINEARS[model]),
    "rslora": lambda model: Method("rslora", rank=3, targets=LINEARS[model]),
    "dora": lambda model: Method("dora", rank=3, targets=LINEARS[model]),
    "ia3": lambda _: Method("ia3"),
    "norms": lambda _: Method("ln_tuning"),
    "prompts": lambda _: Method("prompt_tuning"),
    "prefix": lambda _: Method("prefix_tuning"),
    "p-tuning": lambda _: Method("p_tuning"),
    "biases": lambda model: Method(rank=3, targets=LINEARS[model], options={"bias": "all"}),
    "all layers": lambda model: Method(rank=3, targets=("all-linear",)),
    "a module whole": lambda model: Method(rank=3, targets=LINEARS[model], save=(WHOLE[model],)),
    "vera": lambda _: Method("vera"),
    "rank pattern": lambda model: Method(
        rank=3, targets=LINEARS[model], options={"rank_pattern": {LINEARS[model][0]: 5}}
    ),
}
TEXT = ("prompts", "prefix", "p-tuning")
ON_ALL = [(n, m) for n in METHODS for m in MODELS if not (m == "tiny-vit" and n in TEXT)]


@pytest.mark.parametrize(("name", "model"), ON_ALL)
def test_each_method_trains_as_in_the_loop(name: str, model: str) -> None:
    loop, cohort = trainers(model, METHODS[name](model), SGD)
    assert_agree(loop, cohort, jobs(loop), ROUNDING)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *((n, m) for n in ("lora", "dora") for m in MODELS),
        ("rslora", "tiny-bert"),
        ("ia3", "tiny-vit"),
        ("norms", "tiny-llama"),
        ("prompts", "tiny-llama"),
        ("prefix", "tiny-bert"),
    ],
)
def test_with_adamw_too(name: str, model: str) -> None:
    loop, cohort = trainers(model, METHODS[name](model), TRAINING)
    assert_agree(loop, cohort, jobs(loop), 1e-5)


SETTINGS: dict[str, tuple[Training, float]] = {
    "epochs": (replace(SGD, epochs=3), ROUNDING),
    "steps": (replace(SGD, steps=5), ROUNDING),
    "accumulate": (replace(SGD, accumulate=2, epochs=2), ROUNDING),
    "accumulate in steps": (replace(SGD, accumulate=2, steps=4, batch=2), ROUNDING),
    "more accumulated than there are batches": (replace(SGD, accumulate=9, epochs=2), ROUNDING),
    "a batch for all rows": (replace(SGD, batch=50, epochs=2), ROUNDING),
    "one row at a time": (replace(SGD, batch=1, clip=0.1), ROUNDING),
    "no clipping": (replace(SGD, clip=None), ROUNDING),
    "tight clipping": (replace(SGD, clip=0.05, lr=0.5), ROUNDING),
    "momentum": (replace(SGD, momentum=0.8, epochs=2), ROUNDING),
    "decay": (replace(SGD, weight_decay=0.4), ROUNDING),
    "FedProx": (replace(SGD, prox=0.7, epochs=2), ROUNDING),
    "all with sgd": (replace(SGD, prox=0.3, momentum=0.5, weight_decay=0.1, accumulate=2, steps=4, clip=0.5), ROUNDING),
    "decay of adamw": (replace(TRAINING, weight_decay=0.4, epochs=2), 1e-5),
    "FedProx with adamw": (replace(TRAINING, prox=0.7, epochs=2), 1e-5),
    "all with adamw": (replace(TRAINING, prox=0.3, weight_decay=0.1, accumulate=2, steps=4, clip=0.5), 1e-5),
    "short rows": (replace(SGD, length=18, epochs=2), ROUNDING),
    "checkpointing": (replace(SGD, checkpointing=True), ROUNDING),
}


OF_REPLIES = ("epochs", "accumulate in steps", "one row at a time", "short rows", "all with sgd")
"""What may go wrong with rows of different numbers of predictions."""


@pytest.fixture(scope="module")
def pairs():
    return {model: trainers(model) for model in ("tiny-bert", "tiny-llama")}


@pytest.mark.parametrize(
    ("name", "model"), [*((n, "tiny-bert") for n in SETTINGS), *((n, "tiny-llama") for n in OF_REPLIES)]
)
def test_each_setting_does_what_it_does_in_the_loop(name: str, model: str, pairs) -> None:
    training, atol = SETTINGS[name]
    loop, cohort = (x.over(x.federation, training) for x in pairs[model])
    assert_agree(loop, cohort, jobs(loop), atol)


@pytest.mark.parametrize("model", MODELS)
def test_checkpointing_is_done_for_all_methods_and_undone(model: str) -> None:
    loop, cohort = trainers(model, METHODS["dora"](model), replace(SGD, checkpointing=True))
    assert_agree(loop, cohort, jobs(loop), ROUNDING)
    assert not cohort.frozen.model.is_activation_checkpointing


@pytest.mark.parametrize("parts", ["a", "b", "ab"])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_the_factors_that_are_asked_for_are_trained(name: str, parts: str) -> None:
    loop, cohort = trainers("tiny-bert", METHODS[name]("tiny-bert"), SGD)
    some = jobs(loop, trains=parts)
    assert_agree(loop, cohort, some, ROUNDING)
    for job, done in zip(some, cohort.train_many(some), strict=True):
        before, after = job.start.tensors(), done.trained.tensors()
        still = {n for n in before if (before[n] == after[n]).all()}
        assert still == {n for n in before if n[-2:] in ("/a", "/b") and n[-1] not in parts}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_mixed_ranks_share_a_pass(name: str, model: str) -> None:
    """From 2 to 24, the largest that these models' matrices have; 32 is in the tests of real models."""
    most = {"tiny-llama": 12}.get(model, 24)
    method = Method(name, rank=most, alpha=float(most), targets=LINEARS[model])
    loop, cohort = trainers(model, method, SGD, group=6)
    assert_agree(loop, cohort, with_ranks(jobs(loop), 2, most, 3, 8, 5, 2), ROUNDING)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_mixed_ranks_under_all_settings(optimiser: str) -> None:
    training = replace(SETTINGS[f"all with {optimiser}"][0], epochs=2)
    loop, cohort = trainers("tiny-bert", Method(rank=24, targets=LINEARS["tiny-bert"]), training)
    assert_agree(loop, cohort, with_ranks(jobs(loop), 2, 24, 16, 7, 2, 4), 1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_frozen_path_of_each_clients_own_rank_runs_beside_the_trained_pair(name: str, model: str) -> None:
    loop, cohort = trainers(model, METHODS[name](model), SGD)
    some = with_tails(jobs(loop), 4, 1, 7, 2, 5, 3)
    assert_agree(loop, cohort, some, ROUNDING)
    without = list(cohort.train_many([replace(x, tail={}) for x in some]))
    for x, y in zip(cohort.train_many(some), without, strict=True):
        assert abs(x.metrics.mean_loss - y.metrics.mean_loss) > 1e-3, "the paths had no effect"


def test_paths_ranks_and_half_of_the_factors_at_once() -> None:
    loop, cohort = trainers(
        "tiny-llama", Method("dora", rank=8, targets=LINEARS["tiny-llama"]), SETTINGS["all with sgd"][0]
    )
    some = with_tails(with_ranks(jobs(loop, trains="b"), 2, 8, 3, 5, 2, 7), 4, 1, 7, 2, 5, 3)
    assert_agree(loop, cohort, some, ROUNDING)


def test_images_of_another_size_than_the_models_own() -> None:
    loop, cohort = trainers("tiny-vit", None, replace(SGD, image_size=21))
    assert_agree(loop, cohort, jobs(loop), ROUNDING)


@pytest.mark.parametrize("group", [2, 3, 6, 50])
def test_however_many_train_at_once(group: int) -> None:
    loop, cohort = trainers("tiny-llama", None, replace(SGD, epochs=2), group=group)
    assert_agree(loop, cohort, jobs(loop), ROUNDING)


@pytest.mark.parametrize(
    "method",
    [
        Method(rank=3, targets=("q_proj",), save=("lm_head",)),
        Method(rank=3, targets=("lm_head",)),
        Method("dora", rank=3, targets=("embed_tokens", "v_proj")),
    ],
    ids=["head whole", "head's pair", "embeddings"],
)
def test_words_in_and_out_are_each_clients_own(method: Method) -> None:
    loop, cohort = trainers("tiny-llama", method, replace(SGD, accumulate=2))
    assert_agree(loop, cohort, jobs(loop), ROUNDING)


def test_a_head_of_two_layers_is_each_clients_own(tmp_path: Path) -> None:
    """RoBERTa's: dense and out_proj, with tanh between."""
    config = RobertaConfig(
        vocab_size=300,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=36,
        max_position_embeddings=60,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(packaged.folder("tiny-bert")).save_pretrained(tmp_path)
    loop, cohort = trainers(str(tmp_path), Method(rank=3, targets=("query", "value")), replace(SGD, epochs=2))
    assert {n.split("default.")[-1] for n in loop.start().dense} == {
        f"{layer}.{part}" for layer in ("dense", "out_proj") for part in ("weight", "bias")
    }
    assert_agree(loop, cohort, jobs(loop), ROUNDING)
