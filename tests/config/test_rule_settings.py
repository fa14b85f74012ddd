"""Rules by name: what each name stands for, where its seed comes from, and what it can't go with."""

import tomllib

import pytest

from fedpeft.config import experiment
from fedpeft.config.rules import RULES
from fedpeft.errors import ConfigError
from fedpeft.rules import FactorMean, FedSB, FLoRA, Krum, ListRule, Ravan, Scaffold, Subspace

BASE = """
seed = 11
[data]
name = "wiki11"
"""


SGD = '\n[training]\noptimiser = "sgd"\nlr = 0.1\n'


def made(text):
    return experiment(tomllib.loads(BASE + text))


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_can_be_named_alone_and_is_made_again_from_its_settings(name):
    found = made(f'[rule]\nname = "{name}"' + (SGD if name in ("scaffold", "fedkseed") else ""))
    assert experiment(found.settings).rule == found.rule
    assert found.settings["rule"]["name"] == name


def test_names_that_share_a_class_differ_in_its_fields():
    assert made('[rule]\nname = "rbla"').rule == FactorMean(owners=True, rest="dropped")
    assert made('[rule]\nname = "ffa"\nowners = true').rule == FactorMean(("b",), owners=True)
    assert made('[rule]\nname = "fedit"\nrest = "dropped"').rule == FactorMean(rest="dropped")
    assert made('[rule]\nname = "multi_krum"\nshare = 0.1').rule == Krum(0.1, many=True)
    with pytest.raises(ConfigError, match=r"^rule.owners: no such key"):
        made('[rule]\nname = "fedit"\nowners = true')


def test_scaffold_is_of_a_rule_on_factors():
    assert made('[rule]\nname = "scaffold"' + SGD).rule == Scaffold("fedit", "frozen")
    assert made('[rule]\nname = "scaffold"\nof = "ffa"\nrest = "dropped"' + SGD).rule == Scaffold("ffa", "dropped")
    for of in ("fedsa", "flexlora", "median", "rbla"):
        with pytest.raises(ConfigError, match=f"^rule.of: got '{of}'; want one of 'fedit', 'ffa', 'rolora'"):
            made(f'[rule]\nname = "scaffold"\nof = "{of}"' + SGD)


@pytest.mark.parametrize("training", ["", '\n[training]\noptimiser = "adamw"'])
def test_scaffold_with_adamw_is_refused_with_the_way_out(training):
    why = (
        r"^training.optimiser: got 'adamw'; scaffold corrects gradients, and this optimiser rescales them; want \"sgd\""
    )
    with pytest.raises(ConfigError, match=why):
        made('[rule]\nname = "scaffold"' + training)


def test_scaffold_goes_with_momentum_and_with_any_method_that_its_rule_goes_with():
    made('[rule]\nname = "scaffold"' + SGD + "momentum = 0.9")
    made('[rule]\nname = "scaffold"' + SGD + '[adapter]\nmethod = "ia3"')
    made('[rule]\nname = "scaffold"\nof = "ffa"' + SGD + '[adapter]\nmethod = "dora"\n')
    with pytest.raises(ConfigError, match=r"^rule.name: scaffold tells factors a and b apart"):
        made('[rule]\nname = "scaffold"\nof = "ffa"' + SGD + '[adapter]\nmethod = "ia3"')


def test_a_rules_seed_is_the_experiments_unless_it_is_set():
    assert made('[rule]\nname = "flora"').rule == FLoRA(seed=11)
    assert made('[rule]\nname = "subspace"\nseed = 3').rule == Subspace(seed=3)
    assert "seed" not in made('[rule]\nname = "fedex"').settings["rule"]


WHOLE = [
    "fedex",
    "fedsb",
    "fedsvd",
    "flora",
    "flexlora",
    "hetlora",
    "krum",
    "lora_fair",
    "ravan",
    "rbla",
    "scaffold",
    "subspace",
    "zeropad",
]


@pytest.mark.parametrize("name", WHOLE)
def test_a_rule_whose_mean_is_no_change_takes_neither_a_server_optimiser_nor_a_buffer(name):
    more = SGD if name == "scaffold" else ""
    is_list = isinstance(made(f'[rule]\nname = "{name}"' + more).rule, ListRule)
    why = "is not a mean" if is_list else "averages more than a change of the adapter"
    with pytest.raises(ConfigError, match=f"^server.name: {name} {why}; want averaging with it"):
        made(f'[rule]\nname = "{name}"\n[server]\nname = "momentum"' + more)
    with pytest.raises(ConfigError, match=f"^server.lr: got 0.5; {name} {why}, and takes its own step: want 1"):
        made(f'[rule]\nname = "{name}"\n[server]\nlr = 0.5' + more)
    with pytest.raises(ConfigError, match=f"^rule.name: {name} needs all answers of a round at once"):
        made(f'[rule]\nname = "{name}"\n[schedule]\nname = "buffered"' + more)


@pytest.mark.parametrize("name", ["fedit", "ffa", "rolora", "fedsa"])
def test_a_mean_of_changes_takes_any_server_optimiser(name):
    made(f'[rule]\nname = "{name}"\n[server]\nname = "adam"')


@pytest.mark.parametrize("name", [x for x in WHOLE if x not in ("krum", "scaffold")])
@pytest.mark.parametrize("adapter", ['method = "ia3"', 'method = "dora"', "options = {use_dora = true}"])
def test_a_rule_on_products_needs_a_method_that_adds_one(name, adapter):
    if name == "rbla" and "dora" in adapter:
        made(f'[rule]\nname = "{name}"\n[adapter]\n{adapter}')
        return
    with pytest.raises(ConfigError, match=f"^rule.name: {name} (tells factors a and b apart|adds up products)"):
        made(f'[rule]\nname = "{name}"\n[adapter]\n{adapter}')


@pytest.mark.parametrize("name", ["median", "krum", "multi_krum", "trimmed_mean", "fedit"])
def test_a_rule_on_plain_numbers_takes_any_method(name):
    for method in ("ia3", "dora", "lora"):
        made(f'[rule]\nname = "{name}"\n[adapter]\nmethod = "{method}"')


@pytest.mark.parametrize("more", ["", '[personal]\ntensors = ["*classifier*"]'])
def test_fedsb_needs_rounds_beyond_those_that_find_its_directions(more):
    settings = tomllib.loads(BASE + '[rule]\nname = "fedsb"\n' + more)
    for few in (1, 2):
        message = f"^rounds: got {few}; fedsb finds its directions in the first 2; want at least 3, or rule.name = 'f"
        with pytest.raises(ConfigError, match=message):
            experiment(settings | {"rounds": few})
    assert experiment(settings | {"rounds": 3}).rounds == 3
    assert experiment(tomllib.loads(BASE) | {"rounds": 1}).rule.fewest_rounds == 1


def test_ravan_takes_its_heads_and_the_experiments_seed():
    assert made('[rule]\nname = "ravan"\nheads = 3').rule == Ravan(seed=11, heads=3)
    assert made('[rule]\nname = "fedsb"').rule == FedSB()
