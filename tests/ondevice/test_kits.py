"""A kit is what its manifest says, or it is refused with what to do."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedpeft.adapters import same
from fedpeft.errors import ConfigError
from fedpeft.training.kit import FORMAT, Kit, write_manifest
from tests.ondevice.small_kit import CLASSES, RANK, SCALE, start, write


@pytest.fixture
def kit(tmp_path):
    return write(tmp_path / "kit")


def said(kit: Kit) -> dict[str, object]:
    return json.loads((kit.folder / "kit.json").read_bytes())


def put(kit: Kit, **changes: object) -> None:
    """Change a manifest, or, for None, take a key out of it."""
    content = {n: x for n, x in (said(kit) | changes).items() if x is not None}
    (kit.folder / "kit.json").write_text(json.dumps(content))


def test_a_kit_reads_what_was_written(kit):
    assert (kit.facts.task, kit.facts.classes, kit.facts.trains) == ("classify", CLASSES, "ab")
    assert (kit.quantise, kit.plain, kit.template) == ("none", "0123", None)
    assert kit.spec == start("classify").spec
    assert same(kit.start(), start("classify"))
    assert {x.scale for x in kit.spec.layers} == {SCALE}
    assert {x.rank for x in kit.spec.layers} == {RANK}
    assert kit.facts.marks == {"bos_token": "<s>", "eos_token": "</s>"}
    assert set(kit.files) == {"base.safetensors", "evaluate.onnx", "start.safetensors", "step.onnx", "tokenizer.json"}


def test_every_fact_survives_the_way_through_the_file(kit):
    facts = replace(
        kit.facts,
        quantise="int4",
        packed=(("q.weight", "int4", 7, True), ("embed", "int8", 6, False)),
        fresh=("head",),
        recompute=True,
        cuts="left",
        checked={"loss": 1e-7, "gradient": 2},
    )
    digest = write_manifest(kit.folder, facts)
    found = Kit.open(kit.folder, digest=digest)
    assert found.facts == facts
    assert found.digest == digest != kit.digest
    assert found.quantise == "int4"
    assert isinstance(found.facts.checked["gradient"], float)


def test_a_kit_is_told_apart_by_its_digest(kit):
    assert write_manifest(kit.folder, kit.facts) == kit.digest
    with pytest.raises(ConfigError, match=rf"has digest {kit.digest[:16]}…; the coordinator wants 00ff00…: copy that"):
        Kit.open(kit.folder, digest="00ff00")


@pytest.mark.parametrize("name", ["base.safetensors", "step.onnx"])
def test_a_damaged_file_is_named_with_what_to_do(kit, name):
    file = kit.folder / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name} has SHA-256 .*kit.json wants .*damaged, or another kit's; copy"):
        Kit.open(kit.folder)
    assert Kit.open(kit.folder, check=False).digest == kit.digest
    file.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=rf"{name} has {len(content) - 1:,} bytes; kit.json wants {len(content):,}"):
        Kit.open(kit.folder, check=False)
    file.unlink()
    with pytest.raises(ConfigError, match=rf"{name} can't be read \(No such file or directory\); copy the kit again"):
        Kit.open(kit.folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": 99, "fedpeft": "9.1"}, rf"has format 99, of fedpeft 9.1; .* reads {FORMAT}: use one version"),
        ({"format": None}, f"says no format; want {FORMAT}"),
        ({"opset": 99}, "graphs are of ONNX opset 99; fedpeft .* runs up to 21: install fedpeft"),
        ({"opset": "21"}, "is not a kit's: opset: got '21'"),
        ({"pad": None}, "lacks 'pad'"),
        ({"trains": "a"}, "trains: got 'a'"),
        ({"recompute": 1}, "recompute: got 1"),
        ({"packed": [["q", "int8", 7]]}, "is not a kit's"),
        ({"packed": [["q", "int7", 7, False]]}, "packed: got 'int7'"),
        ({"spec": {"layers": [["q", 6, 7, 4]], "dense": []}}, "is not a kit's"),
        ({"spec": {"layers": [["q", 6, 7, 4, float("nan")]], "dense": []}}, "q is 6 x 7 of rank 4 and scale nan"),
        ({"spec": {"layers": [["q", 6, 7, 0, 0.5]], "dense": []}}, "q is 6 x 7 of rank 0 and scale 0.5"),
        ({"spec": {"layers": [["q", 6, 7, 4.5, 0.5]], "dense": []}}, "spec.layers: got 4.5"),
        ({"spec": {"layers": [["q", 6, 7, 4, 0.5]] * 2, "dense": []}}, "names each tensor once; got twice: .'q/a'"),
        ({"spec": {"layers": [], "dense": [["head", [3, -2]]]}}, r"spec.dense: head has shape \(3, -2\)"),
        ({"format": True}, f"says no format; want {FORMAT}"),
        ({"cuts": "middle"}, "cuts: got 'middle'"),
        ({"files": {}}, "names no base.safetensors; want"),
        (
            {"files": {"../kit/step.onnx": ["", 1]}},
            r"names the file '\.\./kit/step.onnx'; want files of its own",
        ),
        ({"files": [1]}, "is not a kit's"),
        ({"files": {"step.onnx": ["", float("inf")]}}, "step.onnx: got inf"),
        ({"files": {"..": ["", 1]}}, r"names the file '\.\.'; want files of its own"),
        ({"files": {"/etc/passwd": ["", 1]}}, "names the file '/etc/passwd'; want files of its own"),
        ({"files": {"..\\step.onnx": ["", 1]}}, "names the file .*; want files of its own"),
        ({"files": {"a\0b": ["", 1]}}, "names the file .*; want files of its own"),
    ],
)
def test_a_manifest_that_can_not_be_used_says_why(kit, changes, text):
    put(kit, **changes)
    with pytest.raises(ConfigError, match=text):
        Kit.open(kit.folder)


def test_a_folder_without_a_manifest_is_no_kit(tmp_path, kit):
    with pytest.raises(ConfigError, match=r"there is no kit.json in .*elsewhere.* want a folder that `fedpeft export"):
        Kit.open(tmp_path / "elsewhere")
    (kit.folder / "kit.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        Kit.open(kit.folder)
    (kit.folder / "kit.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="is not JSON"):
        Kit.open(kit.folder)
    (kit.folder / "kit.json").write_text("[]")
    with pytest.raises(ConfigError, match="says no format"):
        Kit.open(kit.folder)


def test_the_start_must_be_of_the_specs_shapes(kit):
    facts = replace(kit.facts, spec=start("classify").cut(2).spec)
    write_manifest(kit.folder, facts)
    with pytest.raises(ConfigError, match=r"start.safetensors has q/a of shape \(4, 7\); kit.json wants \(2, 7\)"):
        Kit.open(kit.folder).start()
    (kit.folder / "start.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"start.safetensors can't be read"):
        kit.start()


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda x: x.astype(np.float64), "in float64; want finite float32"),
        (lambda x: np.where(x == x.max(), np.float32("nan"), x), "in numbers that are not finite; want finite"),
    ],
)
def test_the_start_must_be_finite_fp32(kit, spoil, text):
    tensors = start("classify").tensors()
    save_file(tensors | {"q/b": spoil(tensors["q/b"])}, kit.folder / "start.safetensors")
    write_manifest(kit.folder, kit.facts)
    with pytest.raises(ConfigError, match=f"start.safetensors has q/b {text}"):
        Kit.open(kit.folder).start()


def test_files_are_asked_for_by_their_names(kit):
    assert kit.path("step.onnx") == kit.folder / "step.onnx"
    with pytest.raises(ValueError, match=r"got 'steps'; the kit in .* has base.safetensors"):
        kit.path("steps")


def test_a_manifest_is_written_for_whole_kits_alone(kit):
    (kit.folder / "step.onnx").unlink()
    with pytest.raises(ValueError, match=r"lacks step.onnx; want all of base.safetensors"):
        write_manifest(kit.folder, kit.facts)


def test_the_start_has_what_the_method_drew(kit):
    from safetensors.numpy import save_file

    drawn = np.arange(5, dtype=np.int64)
    save_file(start("classify").tensors() | {"fixed/choice": drawn}, kit.folder / "start.safetensors")
    write_manifest(kit.folder, kit.facts)
    [(name, found)] = Kit.open(kit.folder).start().fixed.items()
    assert name == "choice"
    np.testing.assert_array_equal(found, drawn)
