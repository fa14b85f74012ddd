"""What a deployed node trains with, as its own config says it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fedpeft.config import experiment
from fedpeft.data import Table
from fedpeft.data import own as whole
from fedpeft.errors import ConfigError
from fedpeft.run import node, own
from fedpeft.run.needs import fitting_on_device
from fedpeft.run.node import participant
from fedpeft.run.own import Own
from fedpeft.run.runtimes import on_device
from fedpeft.run.workshop import Workshop
from fedpeft.training.kit import CONFIG, Kit
from fedpeft.training.quantised import FrozenLinear
from fedpeft.training.settings import Training
from tests.ondevice import small_kit


def settings(**more):
    base = {
        "model": {"name": "tiny-bert", "formats": ["none", "int8"]},
        "data": {"name": "wiki11", "examples": 200},
        "partition": {"name": "iid", "clients": 2},
        "adapter": {"rank": 3, "targets": ["query"]},
        "training": {"length": 16, "threads": 1},
    }
    return experiment(base | more).settings_json


@pytest.fixture
def lacking(monkeypatch):
    """A function that makes these packages not be installed."""

    def lack(*packages):
        monkeypatch.setattr(own, "find_spec", lambda name: None if name in packages else object())

    return lack


def test_a_node_holds_the_base_in_its_own_format_and_is_of_the_same_run():
    plain = participant(settings(), {"partition-id": 0})
    packed = participant(settings(), {"partition-id": 0, "quantise": "int8"})
    kinds = [{type(x) for x in node.trainer.bridge.model.modules()} for node in (plain, packed)]
    assert [FrozenLinear in x for x in kinds] == [False, True]
    assert packed.trainer.base == plain.trainer.base
    assert packed.trainer.frozen.quantise == "int8"
    alone = participant(settings(model={"name": "tiny-bert"}), {"partition-id": 0})
    assert alone.trainer.base != plain.trainer.base


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quantise": "nf4"}, r"quantise is 'nf4', and 'nf4' is none of the formats .*model.formats = .*\"nf4\"\]"),
        ({"quantise": "int5"}, "quantise is 'int5'; want none, int8, nf4 or int4"),
        ({"quantise": 8}, "quantise is 8; want none, int8"),
        ({"runtime": "jax"}, "runtime is 'jax'; want torch or onnx"),
        ({"kernels": "cuda"}, "kernels is 'cuda'; want own or bitsandbytes"),
        ({"kernels": True}, "kernels is True; want own"),
        ({"kernels": "bitsandbytes"}, 'kernels: got bitsandbytes, which is for nf4; want quantise = "nf4", or'),
        ({"kernels": "bitsandbytes", "runtime": "onnx"}, "kernels is 'bitsandbytes', which is torch's; want it left"),
        ({"runtime": "onnx"}, "kit is missing, from which runtime 'onnx' trains, and this run sends none; want kit="),
    ],
)
def test_what_a_node_can_not_train_with_is_refused_by_its_key(config, reason):
    with pytest.raises(ConfigError, match=f"^node-config: {reason}"):
        participant(settings(), config)


def test_a_rule_that_an_exported_step_can_not_serve_is_refused_on_the_node(tmp_path):
    with pytest.raises(ConfigError, match=r"^node-config: runtime is 'onnx', and fedsb trains matrices between"):
        participant(settings(rule={"name": "fedsb"}), {"runtime": "onnx", "kit": str(tmp_path)})


def test_a_node_without_torch_need_not_say_so_and_is_told_what_it_lacks(lacking, tmp_path):
    lacking("torch")
    assert Own.said({"kit": str(tmp_path)}) == Own("onnx", None, tmp_path)
    assert Own.said({"kit": str(tmp_path), "runtime": "onnx", "quantise": "int4"}) == Own("onnx", "int4", tmp_path)
    with pytest.raises(ConfigError, match=r"^node-config: kit is missing, from which runtime 'onnx' trains"):
        Own.said({})
    with pytest.raises(
        ConfigError, match=r"^node-config: runtime is 'torch', which is not installed here; install fed"
    ):
        Own.said({"runtime": "torch"})
    lacking("torch", "onnxruntime")
    with pytest.raises(
        ConfigError, match=r"torch is not installed here, so .* onnxruntime is not installed; install fedpeft\[onnx\]"
    ):
        Own.said({})
    lacking("onnxruntime")
    assert Own.said({}) == Own()
    with pytest.raises(ConfigError, match=r"^node-config: runtime is 'onnx', and onnxruntime is not installed"):
        Own.said({"runtime": "onnx", "kit": str(tmp_path)})


def test_a_node_that_says_its_memory_gives_it_back_at_once(lacking, tmp_path):
    lacking("torch")
    kit = small_kit.write(tmp_path)
    found = experiment(json.loads(settings(model={"name": "by-hand"})))
    table = Table("classify", ("a b",) * 3, np.arange(3), small_kit.CLASSES)
    federation = whole(table, found.split, 1)
    for config, frugal in (({}, False), ({"memory": "512MB"}, True)):
        mine = Own.said({"kit": str(kit.folder), **config})
        assert Workshop(found, federation, mine).fleet.frugal is frugal
    lacking()
    mine = Own.said({"memory": "512MB"})
    assert mine == Own(frugal=True)
    assert [x.settle(found).training.micro for x in (mine, Own())] == [found.training.batch, None]


def test_a_node_that_says_its_memory_spares_it_before_anything_is_loaded(monkeypatch):
    did = []

    def load(*_: object) -> None:
        did.append("loaded")
        raise KeyError

    monkeypatch.setattr(node, "sparing", lambda: did.append("spared"))
    monkeypatch.setattr(node, "workshop", load)
    for config in ({}, {"memory": "512MB"}):
        with pytest.raises(KeyError):
            participant(settings(), config)
    assert did == ["loaded", "spared", "loaded"]


def test_a_kit_in_another_format_than_the_node_says_or_the_run_has_is_refused(tmp_path):
    small_kit.write(tmp_path)  # its base is not packed
    found = experiment(json.loads(settings(model={"name": "by-hand", "quantise": "int8"})))
    with pytest.raises(
        ConfigError, match=r"^node-config: quantise is 'int8', and the kit in .* holds the base in 'none'"
    ):
        on_device(found, None, Kit.open(tmp_path), "int8")
    with pytest.raises(
        ConfigError, match=r"^the kit in .* holds the base in 'none', and 'none' is none of the formats"
    ):
        on_device(found, None, Kit.open(tmp_path))


def test_a_node_with_torch_has_its_base_from_a_kit_if_it_says_one(tmp_path):
    small_kit.write(tmp_path)
    found = experiment(
        json.loads(settings(model={"name": "tiny-bert", "quantise": "int8", "formats": ["none", "int8"]}))
    )
    mine = Own.said({"kit": str(tmp_path)})
    assert mine == Own("torch", None, tmp_path)
    assert mine.settle(found).model == replace(found.model, name=str(tmp_path), quantise="none")
    with pytest.raises(
        ConfigError, match=r"^node-config: the kit in .* holds the base in 'none', and 'none' is none of"
    ):
        mine.settle(replace(found, model=replace(found.model, formats=())))
    assert Own("torch", "int8").settle(found) == found


def test_the_rank_of_a_node_on_onnx_is_the_largest_that_fits_by_what_onnxruntime_takes(tmp_path):
    kit = small_kit.write(tmp_path)
    config = {
        "model_type": "bert",
        "problem_type": "single_label_classification",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
    }
    (tmp_path / CONFIG).write_text(json.dumps(config), encoding="utf8")

    def fitting(memory, rows=8, **more):
        return fitting_on_device(kit, Training(**more), (1, 2, 4), rows, memory)

    assert fitting(4e9) == 4
    assert fitting(1e6) == 1  # where none fits
    assert {fitting(x) for x in range(100_000_000, 1_000_000_000, 50_000_000)} == {1, 4}
    edge = next(x for x in range(100_000_000, 1_000_000_000, 1_000_000) if fitting(x) == 4)
    assert edge < 455_000_000  # which torch alone takes
    assert fitting(edge - 50_000_000) == 1
    assert fitting(edge - 50_000_000, rows=2) == 4  # of a smaller batch
    (tmp_path / CONFIG).write_text("{", encoding="utf8")
    with pytest.raises(ConfigError, match=r"^kit: .*config.json can't be read: .*; export it anew"):
        fitting(4e9)
