"""What an experiment that asks for secure aggregation gets where it says nothing, and what is refused."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from fedpeft.channel import PlainChannel, RingChannel
from fedpeft.config import Experiment
from fedpeft.config import experiment as built
from fedpeft.config.secure import CAP, InTheClear, check_cohort
from fedpeft.errors import ConfigError
from fedpeft.secagg import Full, KRegular, Mock, Policy, TwoServer

FULL = {"secagg": {"name": "full"}}
MODEL = {"model": {"name": "minilm"}, "data": {"name": "wiki11"}}


def experiment(settings: Mapping[str, Any]) -> Experiment:
    return built({**MODEL, **settings})


def test_a_run_is_in_the_clear_unless_it_asks_for_more() -> None:
    found = experiment({})
    assert isinstance(found.secagg, InTheClear)
    assert isinstance(found.channel, PlainChannel)
    assert found.evaluation.clients


@pytest.mark.parametrize(("name", "kind"), [("full", Full), ("kregular", KRegular), ("twoserver", TwoServer)])
def test_a_protocol_brings_the_ring_and_asks_no_client_for_its_loss(name: str, kind: type[Any]) -> None:
    found = experiment({"secagg": {"name": name}})
    assert isinstance(found.secagg, kind)
    assert found.channel == RingChannel()
    assert not found.evaluation.clients
    assert found.weighting.largest == CAP
    assert experiment(found.settings) == found


def test_what_the_user_says_stays_as_it_is() -> None:
    found = experiment({**FULL, "channel": {"name": "ring", "range": 2.5}, "weighting": {"name": "root", "cap": 49}})
    assert found.channel == RingChannel(range=2.5)
    assert found.weighting.largest == 7


def test_hetlora_prunes_nothing_unless_it_is_told_to() -> None:
    assert experiment({**FULL, "rule": {"name": "hetlora"}}).settings["rule"]["gamma"] == 1
    assert experiment({"rule": {"name": "hetlora"}}).settings["rule"]["gamma"] < 1


def test_a_ring_of_fewer_bits_needs_no_name() -> None:
    assert experiment({**FULL, "channel": {"modulus": 24}}).channel == RingChannel(modulus=24)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"channel": {"name": "ring"}}, "channel.name: got 'ring', which is for secure aggregation"),
        ({**FULL, "channel": {"name": "plain"}}, "channel.name: got 'plain'; want 'ring'"),
        ({**FULL, "rule": {"name": "median"}}, "rule.name: median needs each update by itself"),
        ({**FULL, "rule": {"name": "flora"}}, "rule.name: flora needs each update by itself"),
        ({**FULL, "evaluation": {"clients": True}}, "evaluation.clients: tells the server each client's loss; want"),
        ({**FULL, "personal": {"finetune": 2}, "evaluation": {"clients": True}}, "evaluation.clients: tells"),
        ({**FULL, "selection": {"over": 0.3}}, "selection.over: asks clients only to leave them out"),
        ({**FULL, "simulation": {"devices": {"phone": {}}}}, "simulation.devices: is not there yet"),
        ({"secagg": {"name": "mock"}}, "secagg.name: got 'mock'; want one of full, kregular, none, twoserver"),
        ({"secagg": {"name": "full", "fraction": 0.4}}, "secagg.fraction: got 0.4; want at least 1/2"),
        ({**FULL, "rule": {"name": "hetlora", "gamma": 0.9}}, "rule.gamma: lets clients prune"),
        ({"secagg": "full"}, "secagg: got 'full'; want a section"),
    ],
)
def test_what_can_not_be_had_under_it_is_refused_by_its_key(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment(settings)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    ("settings", "clients", "told"),
    [
        (FULL, 4, "selection.count: 4 clients in a round; want at least 5"),
        ({**FULL, "selection": {"count": 3}}, 20, "selection.count: 3 clients in a round; want at least 5"),
        ({"secagg": {"name": "kregular"}}, 20, "secagg.cohort: got 20 clients; kregular wants at least 50"),
        ({**FULL, "channel": {"modulus": 16, "bits": 14}}, 9, "channel.bits: got 14; want at least 2 and at most 12"),
    ],
)
def test_a_cohort_that_is_too_small_or_too_large_is_refused(settings: dict[str, Any], clients: int, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_cohort(experiment(settings), clients)
    assert str(caught.value).startswith(told)


def test_a_cohort_that_fits_is_not_refused() -> None:
    check_cohort(experiment(FULL), 5)
    check_cohort(experiment({}), 1)


def test_the_smallest_cohort_is_what_clients_are_known_to_ask_for() -> None:
    lenient, strict = Policy(min_cohort=3), Policy(min_cohort=9)
    check_cohort(experiment(FULL), 3, lenient)
    check_cohort(experiment(FULL), 9, strict)
    for clients, policy in ((2, lenient), (8, strict)):
        with pytest.raises(ConfigError, match=f"{clients} clients in a round; want at least {policy.min_cohort} under"):
            check_cohort(experiment(FULL), clients, policy)


def test_the_protocols_own_smallest_cohort_is_named_by_its_section() -> None:
    with pytest.raises(ConfigError, match=r"secagg\..*3; want 5 clients at least, or a smaller min_cohort"):
        check_cohort(experiment({"secagg": {"name": "twoserver"}}), 3, Policy(min_cohort=3))
    check_cohort(experiment({"secagg": {"name": "twoserver", "min_cohort": 3}}), 3, Policy(min_cohort=3))


@dataclass(frozen=True)
class Group:
    entries: dict[str, list[EntryPoint]]

    def __call__(self, group: str) -> list[EntryPoint]:
        return self.entries.get(group, [])


def test_a_protocol_of_another_package_is_chosen_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("theirs", "fedpeft.secagg:Full", "fedpeft.secagg")
    hides = EntryPoint("nothing", f"{Mock.__module__}:Mock", "fedpeft.secagg")
    module = sys.modules["fedpeft.config.experiment"]
    monkeypatch.setattr(module, "entry_points", Group({"fedpeft.secagg": [entry, hides]}))
    _forget()
    try:
        assert experiment({"secagg": {"name": "theirs", "fraction": 0.75}}).secagg == Full(0.75)
        with pytest.raises(ConfigError, match="which hides nothing and is for tests"):
            experiment({"secagg": {"name": "nothing"}})
    finally:
        monkeypatch.undo()
        _forget()


def _forget() -> None:
    from fedpeft.config.experiment import _plugins

    _plugins.cache_clear()
