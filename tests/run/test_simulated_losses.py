"""Which messages of a simulated round are which steps, for each protocol."""

import pytest

from fedpeft.config import experiment
from fedpeft.run.simulated import losses


@pytest.mark.parametrize(
    ("secagg", "rule", "clear", "secure"),
    [
        ({"name": "none"}, "fedit", (2,), (2,)),
        ({"name": "full"}, "fedit", (2,), (0, 1, 2, 3, 4)),
        ({"name": "full", "consistency": False}, "fedit", (2,), (0, 1, 2, 4)),
        ({"name": "kregular"}, "subspace", (2, 5), (0, 1, 2, 3, 4, 5, 6, 7)),
        ({"name": "kregular", "consistency": False}, "subspace", (2, 5), (0, 1, 2, 4, 5, 7)),
        ({"name": "twoserver"}, "subspace", (2, 5), (2, 5)),
    ],
)
def test_a_message_is_the_step_of_that_name_whatever_protocol_it_is_of(secagg, rule, clear, secure):
    settings = {"model": {"name": "tiny-bert"}, "data": {"name": "wiki11"}, "simulation": {"losses": {"share": 0.3}}}
    found = losses(experiment(settings | {"secagg": secagg, "rule": {"name": rule}}), 30)
    assert found is not None
    assert (found.clear, found.secure) == (clear, secure)
    assert (found.steps, found.count) == (5 if rule == "fedit" else 8, 9)
