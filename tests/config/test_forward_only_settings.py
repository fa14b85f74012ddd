"""Clients that train by forward passes alone in an experiment file, and what they can't go with."""

import tomllib
from re import escape

import pytest

from fedpeft.config import experiment
from fedpeft.errors import ConfigError
from fedpeft.rules import FedKSeed

BASE = """
seed = 11
[data]
name = "wiki11"
[training]
optimiser = "sgd"
lr = 0.01
"""
RULE = '[rule]\nname = "fedkseed"\n'


def made(text, base=BASE):
    return experiment(tomllib.loads(base + text))


def test_a_pool_is_as_large_and_as_fine_as_the_file_says():
    assert made(RULE).rule == FedKSeed(11, 1024, 1e-3)
    assert made(RULE + "seed = 2\nsize = 64\nepsilon = 0.01").rule == FedKSeed(2, 64, 0.01)
    for text, message in (
        ("size = 0", "rule.size: got 0; want at least 1 direction"),
        ("epsilon = 0.0", "rule.epsilon: got 0.0; want more than 0"),
        ("seed = -1", "rule.seed: got -1; want 0 or more"),
    ):
        with pytest.raises(ConfigError, match=f"^{escape(message)}"):
            made(RULE + text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'training.optimiser = "adamw"',
            'training.optimiser: got "adamw", and clients that train by forward passes al',
        ),
        ("training.momentum = 0.5", "training.momentum: got 0.5, and clients that train by forward passes alone step"),
        ("training.weight_decay = 0.1", "training.weight_decay: got 0.1, and clients that train by forward passes alo"),
        ("model.dropout = true", "model.dropout: got True, and fedkseed measures the loss on both sides of a step"),
        ("adapter.dropout = 0.1", "adapter.dropout: got 0.1, and fedkseed measures the loss on both sides of a step"),
        ("personal.finetune = 1", "personal.finetune: got 1, and fedkseed has clients that train by no gradients"),
        ('personal.tensors = ["*classifier*"]', "personal.tensors: got *classifier*, and clients that train by forwa"),
        ('ranks = { name = "levels", levels = [2, 4] }', "ranks.name: got 'levels', and clients that train by forward"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(text, message):
    settings = tomllib.loads(BASE + RULE)
    key, _, value = text.partition(" = ")
    section, _, name = key.partition(".")
    given = tomllib.loads(f"x = {value}")["x"]
    settings[section] = given if not name else {**settings.get(section, {}), name: given}
    with pytest.raises(ConfigError, match=f"^{escape(message)}"):
        experiment(settings)
    experiment({**settings, "rule": {"name": "fedit"}})


def test_the_default_optimiser_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r'want "sgd" \(with a training.lr of its own\), or a rule such as fedit$'):
        made(RULE, '[data]\nname = "wiki11"\n')


@pytest.mark.parametrize(
    "text",
    [
        '[server]\nname = "adam"',
        '[server]\nname = "momentum"\nlr = 0.5',
        '[schedule]\nname = "buffered"\n[simulation.devices.phone]\n[selection]\ndeadline = 100',
        '[compression]\nup = "sign"',
        '[compression]\nup = "topk"',
        '[secagg]\nname = "full"',
        '[adapter]\nmethod = "ia3"',
        '[adapter]\nmethod = "dora"',
        "[evaluation]\nexactness = true",
    ],
)
def test_moves_stand_for_the_same_in_each_round_so_most_goes_with_them(text):
    assert made(RULE + text).rule.pool is not None


def test_prox_and_clip_and_accumulate_are_honoured():
    made(RULE, BASE + "prox = 0.1\nclip = 0.5\naccumulate = 4\n")
