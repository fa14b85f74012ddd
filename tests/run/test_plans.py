"""`fedpeft plan`, and nodes that say how much memory they have."""

import re

import pytest
from typer.testing import CliRunner

from fedpeft import cli
from fedpeft.config import experiment
from fedpeft.data import Table
from fedpeft.errors import ConfigError
from fedpeft.run.plan import budget_of, keep_within, link_of, wish_of

SETTINGS = {
    "model": {"name": "tiny-llama"},
    "data": {"name": "chitchat", "task": "lm"},
    "adapter": {"rank": 4, "targets": ["q_proj", "v_proj"]},
    "training": {"batch": 4096, "length": 128},
}
TABLE = Table("lm", ("a",), ("b",))


def run(*arguments):
    return CliRunner().invoke(cli.app, ["plan", *arguments], env={"COLUMNS": "250"})


def test_the_command_prints_what_fits_and_what_to_write_into_the_experiment():
    done = run("--budget", "2GB", "--model", "tiny-llama")
    assert done.exit_code == 0, done.output
    assert re.search(r"^ 1 +torch +fp32 +\d+ +455 .*\n", done.output, re.MULTILINE)
    assert "\n1: as it is\n" in done.output
    assert "its rows take 80 MB (torch) or 100 MB (onnx) more" in done.output
    done = run("--budget", "470MB", "--model", "tiny-llama")
    assert 'runtime="onnx" in the node\'s config' in re.search(r"^1: .*", done.output, re.MULTILINE)[0]


def test_an_experiment_that_is_too_large_is_refused_with_the_cheapest_change(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        '[model]\nname = "tiny-llama"\n[data]\nname = "chitchat"\n[training]\nbatch = 4096\n', encoding="utf8"
    )
    done = run("--budget", "700MB", "--experiment", str(file))
    assert isinstance(done.exception, ConfigError)
    want = r"^plan: training takes about \d+ MB at its peak, and the budget is 700 MB; the cheapest change that fits: "
    assert re.match(want + r"training.micro = \d+ \(about \d+ MB\)$", str(done.exception))
    micro = re.search(r"micro = (\d+)", str(done.exception))[1]
    done = run("--budget", "700MB", "--experiment", str(file), "-c", f"training.micro={micro}", "--runtime", "torch")
    assert done.exit_code == 0, done.output
    assert "onnx" not in done.output


def test_a_node_that_says_its_memory_is_refused_where_it_does_not_suffice():
    found = experiment(SETTINGS)
    keep_within(found, TABLE, {}, "torch")
    keep_within(found, TABLE, {"memory": "100GB"}, "torch")
    with pytest.raises(
        ConfigError, match=r"^plan: training takes about .* the cheapest change that fits: training.micro"
    ):
        keep_within(found, TABLE, {"memory": "700MB"}, "torch")
    ranks = {"name": "memory", "levels": [1, 4]}
    small = experiment(SETTINGS | {"training": {"batch": 1}, "ranks": ranks})
    keep_within(small, TABLE, {"memory": "600MB"}, "torch")  # of which Flower's client has 80
    with pytest.raises(ConfigError, match=r"less 80 MB for Flower's client$"):
        keep_within(small, TABLE, {"memory": "550MB"}, "torch")
    with pytest.raises(ConfigError, match=r"^plan: nothing fits in 0 MB; .* memory, 90 MB, less 100 MB for Flower"):
        keep_within(small, TABLE, {"memory": "90MB"}, "onnx")


def test_an_experiment_is_judged_with_its_own_settings():
    changed = {"rule": {"name": "ffa"}, "compression": {"up": "int4", "down": "int8"}}
    training = {"batch": 6, "micro": 2, "length": 40, "checkpointing": True, "optimiser": "sgd"}
    choice = wish_of(experiment(SETTINGS | changed | {"training": training}), ("torch",), TABLE).choice
    assert (choice.micro, choice.batch, choice.length, choice.checkpointing, choice.moments) == (2, 6, 40, True, 0)
    assert (choice.both, choice.up, choice.down, choice.rank, choice.layers) == (False, "int4", "int8", 4, 2)
    assert choice.kept == 0
    keeping = experiment(SETTINGS | {"training": {"length": 40, "lower": "bf16", "lower_room": "3kB"}})
    assert wish_of(keeping, rows=TABLE, texts=1).choice.kept == 40 * 24 * 2
    assert wish_of(keeping, rows=TABLE).choice.kept == 3000


def test_amounts_are_read_with_their_units_and_refused_without():
    link = link_of("2Mbit/s", "10min")
    assert (link.bits, link.seconds) == (2e6, 600.0)
    assert link_of(None, None) is None
    assert budget_of("512MB") == 512e6
    for make, text in (
        (lambda: link_of("1Mbit/s", None), "plan: got --link or --round alone"),
        (lambda: link_of("1Mbit/s", "10"), "plan: got --round 10; want a number and s, min, h, such as 10min"),
        (lambda: link_of("xMbit/s", "10s"), "plan: got --link xMbit/s; want a number and bit/s"),
        (lambda: link_of("-1kbit/s", "10s"), "plan: got --link -1kbit/s"),
        (lambda: budget_of("half"), "plan: --budget: got 'half'; want bytes"),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert str(error.value).startswith(text)
