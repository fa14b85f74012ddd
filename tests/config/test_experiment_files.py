"""Every error of an experiment file names its key, what was got and what is wanted."""

import tomllib

import pytest

from fedpeft.config import experiment, override_all, read
from fedpeft.errors import ConfigError
from fedpeft.rules import Adam, FactorMean, Median

BASE = """
name = "t"
rounds = 3
[model]
name = "tiny-bert"
[data]
name = "wiki11"
[partition]
name = "dirichlet"
clients = 4
alpha = 0.5
"""


def made(text=""):
    """The experiment of BASE and more; a first line such as ``data.task = "lm"`` is a change to BASE."""
    changes, _, rest = text.rpartition("\n[fleet]") if text.startswith("data.") else ("", "", text)
    if changes:
        return experiment(override_all(tomllib.loads(BASE + "[fleet]" + rest), [changes.replace(" ", "")]))
    return experiment(tomllib.loads(BASE + text))


def test_a_section_becomes_the_object_it_describes():
    found = made('[rule]\nname = "rolora"\n[server]\nname = "adam"\nlr = 0.5')
    assert found.rule == FactorMean(("b", "a"))
    assert found.server == Adam(lr=0.5)
    assert made('[rule]\nname = "median"').rule == Median()


def test_an_experiment_made_of_its_own_settings_is_the_same():
    found = made('[rule]\nname = "fedsa"\n[adapter]\nrank = 5\ntargets = ["query"]')
    again = experiment(found.settings)
    assert again == found
    assert again.settings_json == found.settings_json


def test_every_default_is_in_the_settings():
    settings = made().settings
    assert settings["rule"] == {"name": "fedit", "rest": "frozen"}
    assert settings["server"] == {"name": "averaging", "lr": 1.0}
    assert settings["partition"]["alpha"] == 0.5
    assert settings["selection"]["quorum"] == 0.5


def test_a_whole_number_passes_for_a_number_and_nothing_else_is_converted():
    assert made("[server]\nlr = 2").server.lr == 2.0
    with pytest.raises(ConfigError, match=r"^rounds: got True; want a whole number"):
        experiment(override_all(tomllib.loads(BASE), ["rounds=true"]))


def test_changes_from_the_command_line_are_toml_or_text():
    settings = override_all(tomllib.loads(BASE), ["training.lr=0.25", "rule.name=ffa", "seed=9"])
    assert (settings["training"]["lr"], settings["rule"]["name"], settings["seed"]) == (0.25, "ffa", 9)
    assert "seed" not in tomllib.loads(BASE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[rule]\nname = "fedavg"', "rule.name: got 'fedavg'; want one of fedex, fedit, fedkseed, fedrot,"),
        ("[server]\nmomentum = 0.9", "server.momentum: no such key; averaging has lr"),
        ("[training]\nlearning_rate = 0.9", "training.learning_rate: no such key;"),
        ("[training]\nlr = '0.1'", "training.lr: got '0.1'; want a number"),
        ("[training]\nbatch = 1.5", "training.batch: got 1.5; want a whole number"),
        ("[selection]\nfraction = 2.0", "selection.fraction: got 2.0; want more than 0 and at most 1"),
        ("[channel]\nclip = -1.0", "channel.clip: got -1.0; want more than 0"),
        ("[evaluation]\nevery = 0", "evaluation.every: got 0; want at least 1"),
        ("[fleet]\nnodes = 0", "fleet.nodes: got 0; want at least 1"),
        ('[simulation]\nengine = "warp"', "simulation.engine: got 'warp'; want one of 'cohort', 'loop'"),
        ('[adapter]\ntargets = "query"', "adapter.targets: got 'query'; want a list of text"),
        ("[fleet]\nown_data = true", "data.classes: is missing; want the labels in the order of their numbers"),
        ('data.task = "lm"\n[fleet]\nown_data = true', "fleet.nodes: is missing; want the number of nodes"),
        (
            'data.task = "lm"\n[fleet]\nnodes = 2\nown_data = true',
            "evaluation.central: there is no central test set where fleet.own_data is set",
        ),
        ('[rule]\nname = "ffa"\n[adapter]\nmethod = "ia3"', "rule.name: ffa tells factors a and b apart"),
        ('[rule]\nname = "median"\n[server]\nname = "adam"', "server.name: median is not a mean"),
        ('[rule]\nname = "median"\n[server]\nlr = 0.5', "server.lr: got 0.5; median is not a mean"),
        ('[rule]\nname = ["fedit", "ffa"]', "rule.name: got ['fedit', 'ffa']; want one of"),
        ("[modle]\nname = 'x'", "modle: no such key or section; did you mean model?"),
    ],
)
def test_a_bad_setting_is_named(text, message):
    with pytest.raises(ConfigError) as error:
        made(text)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rounds", "got -c 'rounds'; want key=value"),
        ("rounds.x=1", "rounds.x: rounds is a value, not a section"),
        ("rounds=0", "rounds: got 0; want at least 1"),
        ("seed=-1", "seed: got -1; want 0 or more"),
        ("partition=3", "partition: got 3; want a section, such as"),
        ("data={}", "data.name: is missing; want text"),
        ("name=2026-01-01", "name: got datetime.date(2026, 1, 1); want text"),
    ],
)
def test_a_bad_change_is_named(change, message):
    settings = tomllib.loads(BASE)
    del settings["partition"]
    with pytest.raises(ConfigError) as error:
        experiment(override_all(settings, [change]))
    assert str(error.value).startswith(message)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file"):
        read(tmp_path / "nowhere.toml")
    (tmp_path / "x.toml").write_text("name = ", encoding="utf8")
    with pytest.raises(ConfigError, match=r"x\.toml: can't be read as TOML"):
        read(tmp_path / "x.toml")
