"""Which kit a run's devices train from: the one that is named, the one that is sent, and no other."""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from fedpeft.config import experiment
from fedpeft.errors import ConfigError
from fedpeft.flower import KitMissingError
from fedpeft.run import workshop as workshops
from fedpeft.run.node import participant
from fedpeft.run.own import Own
from fedpeft.run.shipped import kit_here, mend, shelf, to_send, with_kit
from fedpeft.run.workshop import without_data
from tests.ondevice.small_kit import CLASSES, write

TINY = {
    "model": {"name": "tiny-bert"},
    "data": {"name": "wiki11", "examples": 40},
    "partition": {"name": "iid", "clients": 2},
}
RUNS = "ab" * 32


def told(kit: str) -> str:
    return json.dumps({"fleet": {"kit": kit}})


def manifest(folder: Path, text: str = '{"files": {}}') -> str:
    folder.mkdir(parents=True)
    (folder / "kit.json").write_text(text)
    return sha256(text.encode()).hexdigest()


def test_a_node_trains_from_the_kit_that_its_config_names(tmp_path: Path) -> None:
    digest = write(tmp_path / "kit").digest
    for settings in ("{}", told(""), told("int8"), told(digest)):
        assert Own.said({"runtime": "onnx", "kit": str(tmp_path / "kit")}, settings).kit == tmp_path / "kit"


def test_a_kit_that_lies_among_those_that_were_sent_is_in_use_though_it_is_named_by_its_folder(tmp_path: Path) -> None:
    """So that another run's kit that comes does not take its room."""
    for name in (RUNS, "own"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1, 1))
    for folder, kits in ((RUNS, ""), ("own", ""), (RUNS, "elsewhere")):
        named = tmp_path / folder
        assert kit_here({"kit": str(named), "kits": str(tmp_path / kits)}, "{}") == named
        assert (named.stat().st_mtime > 1e9) is (folder == RUNS)
    assert Path(tmp_path / "own").stat().st_mtime == 1


def test_a_kit_in_the_nodes_config_that_is_not_the_runs_is_refused(tmp_path: Path) -> None:
    digest = manifest(tmp_path / "kit")
    with pytest.raises(
        ConfigError, match=rf"kit\.json has digest {digest[:16]}…; the coordinator wants abababababababab…"
    ):
        kit_here({"kit": str(tmp_path / "kit")}, told(RUNS))


def test_a_node_without_a_kit_is_sent_the_runs_and_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(KitMissingError) as missing:
        Own.said({"runtime": "onnx", "kits": str(tmp_path)}, told(RUNS))
    assert (missing.value.digest, missing.value.has) == (RUNS, "")
    (tmp_path / RUNS).mkdir()
    assert kit_here({"kits": str(tmp_path)}, told(RUNS)) == tmp_path / RUNS
    assert kit_here({"kits": str(tmp_path), "kit": RUNS}, told(RUNS)) == tmp_path / RUNS


def test_kits_that_are_sent_lie_in_the_cache_folder_unless_the_node_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path))
    assert shelf({}).folder == tmp_path / "received"
    assert shelf({"kits": "/var/kits"}).folder == Path("/var/kits")


@pytest.mark.parametrize(
    ("config", "settings", "why"),
    [
        ({}, "{}", r"kit is missing, .* this run sends none; want kit='FOLDER' here, .* or fleet\.kit = 'int8'"),
        ({}, told("int8"), "kit is missing"),  # a simulation's, whose coordinator has made nothing
        ({"kit": "cd" * 32}, told(RUNS), "kit is cdcdcdcdcdcdcdcd…, and the run's is abababababababab…; want the same"),
        ({"kit": "cd" * 32}, "{}", "this run sends none"),
        ({"trust": "client.toml"}, told(RUNS), f"may not choose it: want kit='FOLDER', or kit='{RUNS}' once"),
    ],
)
def test_a_node_that_can_not_have_a_kit_says_what_to_do(config: dict[str, str], settings: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        kit_here(config, settings)


def test_a_node_with_trust_is_sent_the_kit_that_it_has_named(tmp_path: Path) -> None:
    config = {"trust": "client.toml", "kit": RUNS, "kits": str(tmp_path)}
    with pytest.raises(KitMissingError):
        kit_here(config, told(RUNS))


def test_a_kit_that_was_sent_and_rots_is_mended_and_one_that_is_the_users_is_not(tmp_path: Path) -> None:
    text = json.dumps({"files": {"step.onnx": [sha256(b"graph").hexdigest(), 5]}})
    digest = manifest(tmp_path / sha256(text.encode()).hexdigest(), text)
    (tmp_path / digest / "step.onnx").write_bytes(b"graph")
    config = {"kits": str(tmp_path)}
    mend(config, tmp_path / digest)
    assert kit_here(config, told(digest)) == tmp_path / digest
    (tmp_path / digest / "step.onnx").write_bytes(b"grapf")
    mend({"kits": str(tmp_path / "elsewhere")}, tmp_path / digest)
    with pytest.raises(KitMissingError):
        mend(config, tmp_path / digest)
    with pytest.raises(KitMissingError):
        kit_here(config, told(digest))


def test_clients_are_told_the_kit_by_its_digest_and_all_else_as_it_was() -> None:
    found = experiment(
        {**TINY, "fleet": {"kit": "int8", "wait": 7.0}, "model": {"name": "tiny-bert", "quantise": "int8"}}
    )
    sent = with_kit(found, RUNS)
    assert (found.fleet.kit, sent.fleet.kit, sent.fleet.wait) == ("int8", RUNS, 7.0)
    assert json.loads(sent.settings_json)["fleet"]["kit"] == RUNS
    assert {**sent.settings, "fleet": ""} == {**found.settings, "fleet": ""}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"fleet": {"kit": "fp8"}}, r"fleet\.kit: got fp8; want none, int8, nf4, int4, or 64 hex digits"),
        ({"fleet": {"kit": "AB" * 32}}, "kit: got ABAB"),
        ({"fleet": {"kit": "int8"}}, r"fleet\.kit: got 'int8', and 'int8' is none of the formats .*model\.formats"),
        (
            {"fleet": {"kit": "none"}, "adapter": {"method": "ia3"}},
            r"fleet\.kit: got 'none', and an exported step trains plain LoRA",
        ),
    ],
)
def test_kits_that_no_run_can_send_are_refused_before_it_begins(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        experiment({**TINY, **changes})


def test_a_coordinator_sends_no_kit_unless_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = experiment(TINY)
    here = without_data(found)
    assert to_send(found, here, {"kit": ""}) is None
    with pytest.raises(ConfigError, match=r"there is no kit\.json in"):
        to_send(found, here, {"kit": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"fleet\.kit: names a kit by its digest; want its folder in the run config"):
        to_send(with_kit(found, RUNS), here, {})
    manifest(tmp_path / "kit")
    with pytest.raises(ConfigError, match=r"has digest .*; the coordinator wants abababababababab…"):
        to_send(with_kit(found, RUNS), here, {"kit": str(tmp_path / "kit")})
    monkeypatch.setattr("fedpeft.run.shipped.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="is 'none', and torch is not installed here; want its folder"):
        to_send(experiment({**TINY, "fleet": {"kit": "none"}}), here, {})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": {"name": "by-hand"}}, ""),
        ({}, "model.name: got tiny-bert; want by-hand, which the kit in .* was made of"),
        (
            {"model": {"name": "by-hand", "quantise": "int8"}},
            "holds the base in 'none', and 'none' is none of the formats",
        ),
        (
            {"model": {"name": "by-hand", "formats": ["none", "int8"]}, "fleet": {"kit": "int8"}},
            r"fleet\.kit: got 'int8', and the kit in .* holds the base in 'none'",
        ),
        (
            {"model": {"name": "by-hand"}, "data": {"name": "x", "task": "lm"}},
            "data: got lm; want classify, the task of",
        ),
        ({"model": {"name": "by-hand"}, "seed": 1}, "seed: got 1; the kit in .* was exported with another, and so"),
        (
            {"model": {"name": "by-hand"}, "training": {"length": 21}},
            "training.length: got 21; the model takes at most 20",
        ),
    ],
)
def test_a_coordinator_refuses_a_kit_that_its_devices_would_refuse(
    tmp_path: Path, changes: dict[str, object], why: str
) -> None:
    write(tmp_path)
    data = {"name": "each node's own", "task": "classify", "classes": list(CLASSES)}
    own = {"fleet": {"own_data": True, "nodes": 2}, "evaluation": {"central": False}, "data": data}
    made = {**TINY, **own, "training": {"length": 16}, **changes}
    found = experiment({**made, "fleet": {**own["fleet"], **changes.get("fleet", {})}})  # type: ignore[dict-item]
    if not why:
        assert to_send(found, without_data(found), {"kit": str(tmp_path)}) == tmp_path
        return
    with pytest.raises(ConfigError, match=why):
        to_send(found, without_data(found), {"kit": str(tmp_path)})


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda kit: _flip(kit / "base.safetensors"), "base.safetensors"),
        (lambda kit: _flip(kit / "step.onnx"), "step.onnx"),
        (lambda kit: (kit / "evaluate.onnx").unlink(), "evaluate.onnx"),
        (lambda kit: _say(kit, "opset", 99), "graphs are of ONNX opset 99; fedpeft .* runs up to 21"),
        (lambda kit: _say(kit, "format", 3), "has format 3, of fedpeft"),
    ],
)
def test_a_coordinator_sends_no_damaged_kit_and_none_that_is_too_new(
    tmp_path: Path, spoil: Callable[[Path], None], why: str
) -> None:
    write(tmp_path)
    spoil(tmp_path)
    found = experiment(TINY)
    with pytest.raises(ConfigError, match=why):
        to_send(found, without_data(found), {"kit": str(tmp_path)})


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _say(kit: Path, key: str, value: object) -> None:
    file = kit / "kit.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))


def test_a_node_whose_kit_has_rotted_asks_for_it_again_and_one_whose_own_has_says_so(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"text": f"{x} {y}", "label": name} for x, name in zip("abc", CLASSES, strict=True) for y in "defghijkl"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": str(data), "classes": list(CLASSES)}
    made = {**TINY, "model": {"name": "by-hand"}, "data": source, "training": {"length": 16}}
    digest = write(tmp_path / "kit").digest
    (tmp_path / "kit").rename(tmp_path / digest)
    settings = with_kit(experiment(made), digest).settings_json
    config = {"partition-id": 0, "runtime": "onnx", "kits": str(tmp_path), "state": str(tmp_path / "state")}
    here = participant(settings, config)
    assert here.examples(0).train > 0
    _flip(tmp_path / digest / "step.onnx")
    workshops._workshop.cache_clear()  # as in a process of its own
    with pytest.raises(ConfigError, match=r"step\.onnx"):
        participant(settings, {**config, "kit": str(tmp_path / digest), "kits": str(tmp_path / "others")})
    with pytest.raises(KitMissingError):
        participant(settings, config)
    assert shelf(config).lacks(digest).place == ("step.onnx", 0)
