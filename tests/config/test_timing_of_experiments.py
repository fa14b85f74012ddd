"""Devices and schedules in an experiment file."""

import tomllib

import pytest

from fedpeft.config import experiment
from fedpeft.errors import ConfigError
from fedpeft.rounds import PACKAGED, Buffered, Synchronous


def made(text):
    return experiment({"data": {"name": "wiki11"}} | tomllib.loads(text))


def test_without_devices_and_schedule_a_run_is_synchronous_and_in_real_time():
    found = made("")
    assert found.schedule == Synchronous()
    assert found.simulation.devices == {}


def test_a_packaged_kind_can_be_taken_as_it_is_or_changed():
    found = made("[simulation.devices.edge]\n[simulation.devices.phone]\nshare = 0.5\ntokens_per_second = 200")
    assert found.simulation.devices["edge"] == PACKAGED["edge"]
    phone = found.simulation.devices["phone"]
    assert (phone.share, phone.tokens_per_second, phone.gflops) == (0.5, 200, None)
    assert (phone.up, phone.online_hours) == (PACKAGED["phone"].up, PACKAGED["phone"].online_hours)


def test_a_trace_takes_the_place_of_packaged_hours():
    phone = made('[simulation.devices.phone]\ntrace = "phones.csv"').simulation.devices["phone"]
    assert (phone.trace, phone.online_hours) == ("phones.csv", ())


def test_a_kind_of_ones_own_and_a_schedule():
    found = made(
        '[simulation.devices.mine]\ngflops = 2\nup = "1Mbit/s"\nonline_hours = [[0, 3], [5, 6]]\nperiod_hours = 12\n'
        '[schedule]\nname = "buffered"\nbuffer = 4\nconcurrency = 9'
    )
    assert found.schedule == Buffered(buffer=4, concurrency=9)
    assert found.simulation.devices["mine"].online_hours == ((0.0, 3.0), (5.0, 6.0))


def test_the_settings_that_are_written_make_the_same_experiment():
    text = (
        "[simulation.devices.phone]\ntokens_per_second = 200\n[simulation.devices.mine]\ngflops = 2\n"
        '[schedule]\nname = "buffered"'
    )
    assert experiment(made(text).settings) == made(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[simulation.devices.mine]\nshare = 1", "simulation.devices.mine.tokens_per_second: is missing, and mine is"),
        ("[simulation.devices.phone]\nuplink = 1", "simulation.devices.phone.uplink: no such key"),
        ('[simulation.devices.phone]\nup = "5Mb"', "simulation.devices.phone.up: got '5Mb'; want bit/s"),
        ("[simulation.devices.phone]\nshare = 0", "simulation.devices.phone.share: got 0"),
        ("[simulation.devices]\nphone = 0.5", "simulation.devices.phone: got 0.5; want a section"),
        (
            "[simulation.devices.phone]\nonline_hours = [[3, 1]]",
            "simulation.devices.phone.online_hours: got [10800.0, 3600.0]",
        ),
        (
            "[selection]\ndeadline = inf\n[simulation.devices.phone]",
            "selection.deadline: got inf; want seconds where simulation.devices is set",
        ),
        ('[schedule]\nname = "bufered"', "schedule.name: got 'bufered'; want one of buffered, synchronous"),
        ('[schedule]\nname = "buffered"\nbuffer = 0', "schedule.buffer: got 0; want at least 1"),
        (
            '[schedule]\nname = "buffered"\n[rule]\nname = "median"',
            "rule.name: median needs all answers of a round at once",
        ),
        (
            '[schedule]\nname = "buffered"\n[rule]\nname = "rolora"',
            "rule.name: rolora averages other factors in other rounds",
        ),
        (
            '[schedule]\nname = "buffered"\n[rule]\nname = "lora_a2"',
            "rule.name: lora_a2 averages other factors in other rounds",
        ),
        (
            '[schedule]\nname = "buffered"\n[rule]\nname = "rbla"',
            "rule.name: rbla needs all answers of a round at once",
        ),
    ],
)
def test_what_can_not_be_is_refused_by_key(text, message):
    with pytest.raises(ConfigError) as error:
        made(text)
    assert str(error.value).startswith(message)
