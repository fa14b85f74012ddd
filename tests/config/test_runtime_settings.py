"""What simulated clients train with, in an experiment file: shares, and what they can't go with."""

from collections import Counter

import pytest

from fedpeft.config import experiment
from fedpeft.config.runtimes import Runtime, dealt
from fedpeft.errors import ConfigError

MODEL = {"name": "tiny-bert", "formats": ["none", "nf4", "int8"]}


def made(runtimes, **more):
    settings = {"model": MODEL, "data": {"name": "wiki11"}, "simulation": {"runtimes": runtimes}}
    return experiment(settings | more)


def test_a_name_is_an_engine_and_a_format_which_is_the_experiments_if_it_is_left_out():
    assert Runtime.of("torch", "none") == Runtime("torch", "none")
    assert Runtime.of("torch", "int4") == Runtime("torch", "int4")
    assert Runtime.of("onnx int8", "nf4") == Runtime("onnx", "int8")
    assert [str(Runtime("torch", "none")), str(Runtime("onnx", "int8"))] == ["torch", "onnx int8"]


def test_runtimes_are_made_again_from_their_settings():
    found = made({"torch": 1, "torch nf4": 0.5})
    assert found.simulation.runtimes == {"torch": 1.0, "torch nf4": 0.5}
    assert found.settings["simulation"]["runtimes"] == {"torch": 1.0, "torch nf4": 0.5}
    assert experiment(found.settings) == found
    assert experiment({"data": {"name": "wiki11"}}).simulation.runtimes == {}


@pytest.mark.parametrize(
    ("shares", "clients", "want"),
    [
        ({"torch": 0.4, "torch nf4": 0.3, "onnx int8": 0.3}, 10, (4, 3, 3)),
        ({"torch": 4, "torch nf4": 3, "onnx int8": 3}, 10, (4, 3, 3)),
        ({"torch": 1, "torch nf4": 1, "onnx int8": 1}, 8, (3, 2, 3)),
        ({"torch": 0, "torch nf4": 2, "onnx int8": 1}, 7, (0, 5, 2)),
    ],
)
def test_each_runtime_has_its_share_of_the_clients_exact_but_for_rounding(shares, clients, want):
    for seed in range(5):
        drawn = [str(dealt(shares, "none", client, clients, seed)) for client in range(clients)]
        assert tuple(Counter(drawn)[name] for name in shares) == want
        turned = dict(reversed(shares.items()))  # settings that were sent have their keys sorted
        assert [str(dealt(turned, "none", client, clients, seed)) for client in range(clients)] == drawn


def test_the_seed_says_who_is_on_what_and_not_as_it_says_who_has_which_rank():
    shares, ranks = {"torch": 1, "onnx int8": 1}, {"name": "levels", "levels": [2, 4]}
    drawn = [[str(dealt(shares, "none", client, 20, seed)) for client in range(20)] for seed in range(4)]
    assert len({tuple(x) for x in drawn}) == 4
    assert drawn[0] != ["torch"] * 10 + ["onnx int8"] * 10
    levels = made({}, ranks=ranks, model={"name": "tiny-bert"}).ranks
    by_rank = [levels.of(client, 20, 0, 0) for client in range(20)]
    assert len(set(zip(by_rank, drawn[0], strict=True))) == 4  # of each rank some are on each


@pytest.mark.parametrize(
    ("runtimes", "more", "reason"),
    [
        (
            {"jax": 1},
            {},
            "simulation.runtimes: got 'jax'; want torch or onnx, or one of them and none, int8, nf4, int4",
        ),
        ({"torch fp4": 1}, {}, "simulation.runtimes: got 'torch fp4'; want torch or onnx"),
        ({"torch": -1}, {}, "simulation.runtimes.torch: got -1; want a share of the clients, such as 0.5"),
        ({"torch": "half"}, {}, "simulation.runtimes.torch: got 'half'; want a share"),
        ({"torch": True}, {}, "simulation.runtimes.torch: got True; want a share"),
        ({"torch": float("inf")}, {}, "simulation.runtimes.torch: got inf; want a share"),
        ({"torch": 0, "torch nf4": 0}, {}, "simulation.runtimes: got shares that are all 0; want one above it"),
        ({"torch": 1, "torch none": 1}, {}, "simulation.runtimes: 'torch' and 'torch none' are the same, since"),
        (
            {"torch int4": 1},
            {},
            "simulation.runtimes: got 'torch int4', and 'int4' is none of the formats that this run's clients may hold "
            r"the base in \(model.formats\); want model.formats = \[\"none\", \"nf4\", \"int8\", \"int4\"\]",
        ),
        (
            {"torch": 1, "onnx int8": 1},
            {"model": {"name": "tiny-bert"}},
            r"simulation.runtimes: got 'onnx int8', .* want model.formats = \[\"none\", \"int8\"\]",
        ),
        (
            {"torch": 1},
            {"simulation": {"runtimes": {"torch": 1}, "devices": {"phone": {}}}, "selection": {"deadline": 9}},
            "simulation.runtimes: got some, and simulation.devices too",
        ),
        (
            {"onnx": 1},
            {"adapter": {"method": "ia3"}},
            r"simulation.runtimes: got 'onnx', and an exported step trains plain LoRA; want adapter.method = \"lora\"",
        ),
        (
            {"onnx": 1},
            {"data": {"name": "digits", "task": "image"}},
            "simulation.runtimes: got 'onnx', and an exported step is of texts, while data.task is 'image'; want torch",
        ),
        ({"onnx": 1}, {"adapter": {"method": "dora"}}, "simulation.runtimes: got 'onnx', and an exported step trains"),
        (
            {"onnx": 1},
            {"rule": {"name": "fedsb"}},
            "simulation.runtimes: got 'onnx', and fedsb trains matrices",
        ),
        ({"onnx": 1}, {"adapter": {"dropout": 0.1}}, r"simulation.runtimes: .* want adapter.dropout = 0, or torch"),
        ({"onnx": 1}, {"model": MODEL | {"dropout": True}}, r"simulation.runtimes: .* want model.dropout = false"),
        ({"onnx": 1}, {"training": {"precision": "bf16"}}, r"simulation.runtimes: .* want training.precision = auto"),
        (
            {"onnx": 1},
            {"training": {"lower": "bf16"}},
            r"simulation.runtimes: .* want training.lower = none or fp32, or",
        ),
    ],
)
def test_what_can_not_be_run_is_refused_by_its_key(runtimes, more, reason):
    with pytest.raises(ConfigError, match=f"^{reason}"):
        made(runtimes, **more)


def test_formats_need_not_be_named_where_all_clients_have_the_experiments_own():
    assert made({"torch": 1, "onnx": 1}, model={"name": "tiny-bert", "quantise": "int8"}).model.formats == ()
    assert made({"torch": 1}, rule={"name": "fedsb"}).simulation.runtimes == {"torch": 1.0}  # torch can


def test_what_is_kept_of_lower_layers_in_fp32_is_no_matter_for_an_exported_step():
    assert made({"torch": 1, "onnx": 1}, training={"lower": "fp32"}).training.lower == "fp32"
