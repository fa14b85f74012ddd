"""Ranks and hostile clients in an experiment file, and what they can't go with."""

import tomllib

import pytest

from fedpeft.config import experiment
from fedpeft.config.sections import Hostile
from fedpeft.errors import ConfigError
from fedpeft.rounds import Column, Levels, Listed, Memory, Whole


def made(text):
    return experiment(tomllib.loads('[data]\nname = "wiki11"\n' + text))


MODEL = {"model": {"name": "tiny-bert"}, "data": {"name": "wiki11"}}


def test_everybody_trains_the_servers_rank_unless_the_file_says_otherwise():
    assert made("").ranks == Whole()
    assert made("").settings["ranks"] == {"name": "whole"}


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("levels = [2, 4]", Levels((2, 4))),
        ("levels = [2, 4]\nshares = [1, 0.5]\nredraw = true", Levels((2, 4), (1.0, 0.5), True)),
        ("by_client = [2, 4]\nrest = 8", Listed((2, 4), 8)),
        ("by_client = {0 = 2, 7 = 4}\nrest = 8", Listed({"0": 2, "7": 4}, 8)),
        ("", Column("rank")),
        ('column = "directions"', Column("directions")),
        ("levels = [2, 8]", Memory((2, 8))),
    ],
)
def test_ranks_are_made_again_from_their_settings(text, ranks):
    name = type(ranks).__name__.lower()
    found = made(f'[ranks]\nname = "{name}"\n{text}')
    assert found.ranks == ranks
    assert experiment(found.settings).ranks == ranks


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[ranks]\nname = "random"', "ranks.name: got 'random'; want one of column, levels, listed, memory, whole"),
        ('[ranks]\nname = "levels"', "ranks.levels: is missing; want a list of whole numbers"),
        (
            "[ranks]\nlevels = [2]",
            "ranks.levels: no such key; whole has no options; it goes with ranks.name = 'levels' or 'memory'$",
        ),
        (
            '[rule]\nname = "flora"\nstrength = 1',
            "rule.strength: no such key; flora has seed, energy, largest; it goes with rule.name = 'fedrot'$",
        ),
        ('[ranks]\nname = "levels"\nlevels = [0]', "ranks.levels: got 0; want ranks of at least 1"),
        ('[ranks]\nname = "levels"\nlevels = [2, 9]', "ranks.levels: got 9; the server's rank is 8: want at most that"),
        ('[ranks]\nname = "memory"\nlevels = [9]', "ranks.levels: got 9; the server's rank is 8: want at most that"),
        ('[ranks]\nname = "listed"\nby_client = [9]', "ranks.by_client: got 9; the server's rank is 8"),
        ('[ranks]\nname = "listed"\nby_client = [8]\nrest = 9', "ranks.rest: got 9; the server's rank is 8"),
        ("[simulation.hostile]", "simulation.hostile.share: is missing; want a number"),
        ("[simulation]\nhostile = 0.3", "simulation.hostile: got 0.3; want a table"),
        ("[simulation.hostile]\nshare = 1.0", "simulation.hostile.share: got 1.0; want more than 0 and less than 1"),
        ("[simulation.hostile]\nshare = 0.0", "simulation.hostile.share: got 0.0; want more than 0 and less than 1"),
        ("[simulation.hostile]\nshare = 0.3\nstrength = 0", "simulation.hostile.strength: got 0.0; want more than 0"),
        ("[simulation.hostile]\nshare = 0.3\nstrength = inf", "simulation.hostile.strength: got inf; want more than 0"),
        (
            '[simulation.hostile]\nshare = 0.3\nattack = "lie"',
            "simulation.hostile.attack: got 'lie'; want one of",
        ),
        ("[simulation.hostile]\nshare = 0.3\nforce = 1", "simulation.hostile.force: no such key"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_key(text, reason):
    with pytest.raises(ConfigError, match=f"^{reason}"):
        made(text)


def test_a_layer_with_more_directions_than_the_others_allows_more():
    text = '[ranks]\nname = "levels"\nlevels = [12]\n[adapter.options]\nrank_pattern = {query = 12}'
    assert made(text).ranks == Levels((12,))
    with pytest.raises(ConfigError, match=r"^ranks.levels: got 12; the server's rank is 8"):
        made(text.replace("query = 12", "query = 4"))


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        ('method = "ia3"', "has no low-rank factors to cut"),
        ('method = "adalora"', "has no low-rank factors to cut"),
        ('method = "dora"', "normalises with all directions"),
        ("options = {use_dora = true}", "normalises with all directions"),
    ],
)
def test_ranks_are_of_plain_lora(adapter, why):
    with pytest.raises(ConfigError, match=rf"^ranks.name: got 'levels' with adapter.method .*, which {why}; want"):
        made(f'[adapter]\n{adapter}\n[ranks]\nname = "levels"\nlevels = [2]')
    made(f"[adapter]\n{adapter}")
    made('[adapter]\nmethod = "rslora"\n[ranks]\nname = "levels"\nlevels = [2]')


@pytest.mark.parametrize("rule", ["krum", "multi_krum"])
def test_ranks_that_differ_are_not_for_rules_that_compare_whole_changes(rule):
    ranks = {"name": "levels", "levels": [2, 4]}
    with pytest.raises(
        ConfigError, match=r"^ranks.name: got 'levels', and krum compares the lengths .* want ranks.name"
    ):
        experiment(MODEL | {"rule": {"name": rule}, "ranks": ranks})
    assert experiment(MODEL | {"rule": {"name": rule}}).ranks.is_whole


def test_hostile_clients_are_a_section_of_the_simulation():
    assert made("").simulation.hostile is None
    found = made("[simulation.hostile]\nshare = 0.3")
    assert found.simulation.hostile == Hostile(0.3, "flip", 5.0)
    assert experiment(found.settings).simulation == found.simulation
    assert made('[simulation.hostile]\nshare = 0.5\nattack = "noise"\nstrength = 2').simulation.hostile == Hostile(
        0.5, "noise", 2.0
    )
