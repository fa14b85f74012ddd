"""The [personal] section: what it makes of the rule, and what it refuses."""

import tomllib

import pytest

from fedpeft.config import experiment
from fedpeft.errors import ConfigError
from fedpeft.rules import FactorMean, FlexLoRA, PersonalList, PersonalMean


def made(text):
    return experiment({"data": {"name": "wiki11"}} | tomllib.loads(text))


def test_by_default_nothing_is_personal():
    found = made("")
    assert found.rule == FactorMean()
    assert found.settings["personal"] == {"tensors": [], "finetune": 0, "dual": False, "mix": 1.0}


def test_tensors_that_stay_wrap_the_rule_of_either_kind():
    found = made('[personal]\ntensors = ["classifier*", "*/b"]')
    assert found.rule == PersonalMean(FactorMean(), ("classifier*", "*/b"))
    assert experiment(found.settings).rule == found.rule
    found = made('[rule]\nname = "flexlora"\n[personal]\ntensors = ["layer.1.*"]')
    assert found.rule == PersonalList(FlexLoRA(), ("layer.1.*",))


def test_what_the_rule_can_be_combined_with_is_as_without_them():
    made('[personal]\ntensors = ["*/b"]\n[server]\nname = "adam"')
    made('[personal]\ntensors = ["magnitude*"]\n[rule]\nname = "ffa"\n[adapter]\nmethod = "dora"')
    with pytest.raises(ConfigError, match=r"^server.name: zeropad averages more"):
        made('[personal]\ntensors = ["v/*"]\n[rule]\nname = "zeropad"\n[server]\nname = "adam"')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('tensors = "classifier"', "personal.tensors: got 'classifier'; want a list of text"),
        ('tensors = ["a", " "]', "personal.tensors: got .*; want names, none of them empty"),
        ("finetune = -1", "personal.finetune: got -1; want 0 or more epochs"),
        ("dual = true", "personal.finetune: got 0; want at least 1 epoch where dual is set"),
        ("dual = true\nfinetune = 1\nmix = 1.1", "personal.mix: got 1.1; want 0 to 1"),
        ("dual = true\nfinetune = 1\nmix = -0.1", "personal.mix: got -0.1; want 0 to 1"),
        ("finetune = 1\nmix = 0.5", "personal.mix: got 0.5; want 1 unless dual is set"),
        ("epochs = 1", "personal.epochs: no such key"),
        ("finetune = 1\n[evaluation]\nclients = false", "personal.finetune: got 1, and evaluation.clients is false"),
        ('dual = true\nfinetune = 1\n[adapter]\nmethod = "ia3"', "personal.dual: got true, and two adapters of 'ia3'"),
        ('dual = true\nfinetune = 1\n[adapter]\nmethod = "dora"', "personal.dual: got true, .* of 'dora' on one layer"),
        ("dual = true\nfinetune = 1\n[adapter]\noptions = {use_dora = true}", "personal.dual: got true, .* of 'lora'"),
    ],
)
def test_what_can_not_be_is_refused_by_its_key(text, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        made(f"[personal]\n{text}")


def test_the_edges_are_allowed():
    for mix in (0.0, 1.0):
        assert made(f"[personal]\ndual = true\nfinetune = 1\nmix = {mix}").personal.mix == mix
    assert made('[personal]\nfinetune = 3\n[adapter]\nmethod = "ia3"').personal.finetune == 3
    assert made("[personal]\nfinetune = 0\n[evaluation]\nclients = false").personal.finetune == 0
