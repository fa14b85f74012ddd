"""Whole runs on quantised bases, in one process."""

import pytest

from fedpeft.config import experiment
from fedpeft.errors import ConfigError
from fedpeft.report import RunFolder, history
from fedpeft.run import Lines, simulate
from fedpeft.run.simulate import stored
from fedpeft.run.workshop import workshop
from fedpeft.training.quantised import FrozenEmbedding, FrozenLinear

DATA = {"tiny-bert": {"name": "wiki11", "examples": 260}, "tiny-llama": {"name": "chitchat", "examples": 120}}
TARGETS = {"tiny-bert": ["query", "value"], "tiny-llama": ["q_proj", "v_proj"]}


def settings(model: str, quantise: str, **more: object) -> dict[str, object]:
    return {
        "rounds": 2,
        "model": {"name": model, "quantise": quantise},
        "data": DATA[model],
        "partition": {"name": "iid", "clients": 3},
        "adapter": {"rank": 3, "targets": TARGETS[model]},
        "training": {"batch": 8, "length": 48, "lr": 1e-2, "device": "cpu"},
        "evaluation": {"clients": False},
    } | more


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("model", DATA)
@pytest.mark.parametrize("quantise", ["int8", "nf4"])
def test_a_run_on_a_quantised_base_learns_and_says_which_base_it_is(model, quantise, tmp_path):
    folder = simulate(experiment(settings(model, quantise)), tmp_path / "run", Lines())
    found = history(folder)
    first, last = (x.train.loss for x in found.rounds)
    assert last < first
    assert RunFolder.open(folder).checkpoints.load().state.task.round == 2
    packed = workshop(stored(folder).settings_json).trainer
    kinds = {type(x) for x in packed.bridge.model.modules()}
    assert {FrozenLinear, FrozenEmbedding} <= kinds
    plain = workshop(experiment(settings(model, "none")).settings_json).trainer
    assert packed.base != plain.base


def test_a_format_that_there_is_not_is_refused_by_its_key():
    with pytest.raises(ConfigError, match=r"model\.quantise: got 'int5'; want"):
        experiment(settings("tiny-bert", "int5"))
