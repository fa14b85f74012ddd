"""Kits that are kept for later runs: for the same base, tokenizer and name alone, and whole."""

import json
import shutil
from pathlib import Path

import pytest

from fedpeft.config import experiment
from fedpeft.run.kits import export_kit, kept_kit, kit_of, missing
from fedpeft.run.workshop import Workshop, without_data
from fedpeft.training import export_step
from fedpeft.training.environment import cache_folder
from fedpeft.training.packaged import folder
from tests.ondevice.small_kit import write


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tiny-bert's own, beside a cache folder of its own."""
    shutil.copytree(folder("tiny-bert"), tmp_path / "model")
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "model"


def here(model: Path) -> Workshop:
    data = {"name": "each node's own", "task": "classify", "classes": ["a", "b", "c"]}
    own = {"fleet": {"own_data": True, "nodes": 2}, "evaluation": {"central": False}, "data": data}
    return without_data(experiment({"model": {"name": str(model)}, "partition": {"name": "iid", "clients": 2}, **own}))


def say(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_kit_is_for_one_name_configuration_and_tokenizer(model: Path) -> None:
    first = kept_kit(here(model), "none")
    assert first.parent == cache_folder() / "kits"
    assert kept_kit(here(model), "none") == first
    assert kept_kit(here(model), "int8") != first
    shutil.copytree(model, model.parent / "other")
    seen = {first, kept_kit(here(model.parent / "other"), "none")}  # whose kit says another model.name
    for file, changes in (
        ("tokenizer_config.json", {"truncation_side": "left"}),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
        ("config.json", {"chunk_size_feed_forward": 2}),  # which no fingerprint has
    ):
        say(model / file, **changes)
        seen.add(kept_kit(here(model), "none"))
    assert len(seen) == 5


def test_kits_that_were_used_longest_ago_make_room(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_step, "export_step", lambda trainer, out, progress=None: write(out))
    monkeypatch.setenv("FEDPEFT_CACHE_LIMIT", "1")
    old = cache_folder() / "kits" / ("ab" * 32)
    shutil.copytree(write(model.parent / "old").folder, old)
    kept = kit_of(here(model), "none").folder
    assert list(old.parent.iterdir()) == [kept]


def test_a_kept_kit_that_is_damaged_or_half_is_made_anew(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[Path]()

    def export(trainer: object, out: Path, progress: object = None) -> None:
        made.append(out)
        write(out)

    monkeypatch.setattr(export_step, "export_step", export)
    shop = here(model)
    kept = kit_of(shop, "none").folder
    assert kit_of(shop, "none").folder == kept
    assert made == [kept]
    (kept / "step.onnx").write_bytes(b"damaged")
    assert kit_of(shop, "none").folder == kept
    (kept / "kit.json").unlink()
    assert kit_of(shop, "none").folder == kept
    assert made == [kept] * 3
    assert export_kit(shop.found, model.parent / "out", None)[1] == "kept"
    (kept / "base.safetensors").unlink()
    assert export_kit(shop.found, model.parent / "out", None)[1] == "new"
    assert len(made) == 4
    assert missing(shop) == []
