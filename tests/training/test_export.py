"""Exported adapters and merged models, loaded by stock peft and transformers in a process with none of our code."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from fedpeft.adapters import same
from fedpeft.errors import ConfigError, DataError
from fedpeft.training import export, refusals
from fedpeft.training.bridge import Bridge
from fedpeft.training.export import export_merged, export_peft
from fedpeft.training.methods import Method
from fedpeft.training.packaged import folder
from tests.training.peft_cases import CASES, PEFT_WARNINGS, TASKS, Case, attach, batch, build, logits, save_bare, spread

pytestmark = [pytest.mark.filterwarnings(x) for x in PEFT_WARNINGS]
AUTO = {
    "classify": AutoModelForSequenceClassification,
    "lm": AutoModelForCausalLM,
    "image": AutoModelForImageClassification,
}
LABELS = {"bert": 3, "vit": 5}
README = {"lora-bert", "lora-llama", "lora-vit", "p_tuning-bert"}
BY_NAME = {x.name: x for x in CASES}


def trained(case: Case) -> Bridge:
    """The case with every trained tensor far from its start, a head's too."""
    bridge = attach(case, seed=1)
    bridge.write(spread(bridge.read(), seed=3))
    return bridge


def answers(theirs: Mapping[str, NDArray[np.float32]], name: str) -> dict[str, NDArray[np.float32]]:
    """What the other process said of a case."""
    readme = {"readme": theirs[f"{name}/readme"]} if name in README else {}
    return {"theirs": theirs[name]} | readme


def near(x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
    """Equal but for rounding: the same sums, in tensors that lie otherwise in memory, or prompts in other batches."""
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * max(1.0, float(np.abs(y).max())))


@pytest.fixture(scope="module")
def loaded(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Mapping[str, Exception | Mapping[str, NDArray[np.float32]]]]:
    """By case: our logits, and those of a fresh process that loaded the export; or the export's exception."""
    here = tmp_path_factory.mktemp("exports")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for model in TASKS:
        save_bare(model, here / model)
        np.savez(here / f"{model}.npz", **{n: x.numpy() for n, x in batch(model, 99)[0].items()})
    ours: dict[str, NDArray[np.float32] | Exception] = {}
    listed = []
    for case in CASES:
        try:
            bridge = trained(case)
            export_peft(bridge, here / "adapters" / case.name, origin=str(here / case.model))
            ours[case.name] = logits(bridge.model, case.model).numpy()
        except Exception as error:  # Told by the case's own test.
            ours[case.name] = error
            continue
        one = {
            "name": case.name,
            "model": case.model,
            "adapter": f"adapters/{case.name}",
            "labels": LABELS.get(case.model),
        }
        listed.append(one | {"class": AUTO[case.task].__name__, "readme": case.name in README})
    (here / "adapters.json").write_text(json.dumps(listed))
    torch.set_num_threads(threads)
    command = [sys.executable, str(Path(__file__).with_name("load_plainly.py")), str(here)]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(here / "logits.npz") as theirs:
        yield {n: x if isinstance(x, Exception) else {"ours": x} | answers(theirs, n) for n, x in ours.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda x: x.name)
def test_stock_peft_gives_the_same_logits_in_a_process_without_our_code(
    case: Case, loaded: Mapping[str, Exception | Mapping[str, NDArray[np.float32]]]
) -> None:
    got = loaded[case.name]
    if isinstance(got, Exception):
        raise got
    near(got["theirs"], got["ours"])


@pytest.mark.parametrize("name", sorted(README))
def test_the_readmes_own_code_loads_the_adapter(
    name: str, loaded: Mapping[str, Exception | Mapping[str, NDArray[np.float32]]]
) -> None:
    got = loaded[name]
    assert not isinstance(got, Exception)
    near(got["readme"], got["ours"])


def test_an_export_names_its_base_and_labels_and_leaves_the_bridge_as_it_was(tmp_path: Path) -> None:
    bridge = trained(BY_NAME["prefix-projected-bert"])
    bridge.model.config.id2label = {0: "arts", 1: "größe", 2: "war"}
    before = bridge.read()
    export_peft(bridge, tmp_path / "new" / "folder", origin="some/base")
    there = tmp_path / "new" / "folder"
    assert json.loads((there / "labels.json").read_text(encoding="utf-8")) == ["arts", "größe", "war"]
    assert json.loads((there / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    assert 'from_pretrained("some/base", num_labels=len(labels)' in (there / "README.md").read_text(encoding="utf-8")
    assert not (there / "config.json").exists()  # With one, transformers would take the folder for a whole model.
    assert same(bridge.read(), before)
    assert bridge.model.peft_config["default"].prefix_projection is True
    assert bridge.model.peft_config["default"].base_model_name_or_path != "some/base"


def test_a_language_models_export_has_no_labels(tmp_path: Path) -> None:
    export_peft(trained(BY_NAME["lora-llama"]), tmp_path)
    assert not (tmp_path / "labels.json").exists()


def test_tensors_that_are_not_read_back_as_they_were_written_are_an_error(tmp_path, monkeypatch):
    bridge = trained(BY_NAME["lora-bert"])
    export_peft(bridge, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    name = next(n for n in written if "lora_B" in n)
    others = {
        "another number": written | {name: written[name] + 1e-7},
        "another type": written | {name: written[name].double()},
        "one too few": {n: x for n, x in written.items() if n != name},
    }
    for case, tensors in others.items():
        monkeypatch.setattr(export, "load_peft_weights", lambda folder, device, tensors=tensors: tensors)
        with pytest.raises(DataError, match=rf"1 of {len(written)} tensors, such as {name}, are not what was"):
            export_peft(bridge, tmp_path / case)
    monkeypatch.undo()
    monkeypatch.setattr(type(bridge.model), "save_pretrained", lambda *_, **__: torn(tmp_path))
    with pytest.raises(DataError, match="can't be read back"):
        export_peft(bridge, tmp_path)


def torn(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


# That these can't be merged is peft's own word, said for the layer or option at hand.
NOT_HERE = {
    "beft-llama": "has no bias",
    "alora-llama": "aLoRA does not support merging",
    "layer-replication-llama": "shared",
}
MERGED = [x for x in CASES if x.method.name not in refusals.MERGES and x.name not in NOT_HERE]


@pytest.mark.parametrize("case", MERGED, ids=lambda x: x.name)
def test_a_merged_model_is_a_plain_folder_with_the_adapters_logits(case: Case, tmp_path: Path) -> None:
    bridge = trained(case)
    before, want = bridge.read(), logits(bridge.model, case.model)
    off = export_merged(bridge, tmp_path)
    assert 0 <= off < 1e-4
    assert not (tmp_path / "adapter_config.json").exists()
    plain = AUTO[case.task].from_pretrained(tmp_path)
    got = logits(plain, case.model)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert float((logits(build(case.model), case.model) - want).abs().max()) > 1e-2
    if case.method.options.get("coft") is None:  # Constrained OFT projects its own tensors in every forward pass.
        assert same(bridge.read(), before)


@pytest.mark.parametrize("case", [x for x in CASES if x not in MERGED], ids=lambda x: x.name)
def test_what_is_no_change_of_weights_is_not_merged_and_the_reason_is_said(case: Case, tmp_path: Path) -> None:
    reason = refusals.MERGES.get(case.method.name, NOT_HERE.get(case.name, ""))
    assert reason
    with pytest.raises(ConfigError, match=rf"adapter\.method: .* can't be merged.*{reason}.*export to peft instead"):
        export_merged(trained(case), tmp_path)


def test_a_merge_that_loads_as_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = trained(BY_NAME["lora-bert"])
    monkeypatch.setattr("fedpeft.training.export._unwrap", spoil)
    with pytest.raises(ConfigError, match=r"merged model's logits are off by .*; want at most 1e-04"):
        export_merged(bridge, tmp_path)


def spoil(model: torch.nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


def test_merging_an_update_of_a_tied_embedding_leaves_the_output_layer(tmp_path: Path) -> None:
    bridge = Bridge.attach(build("llama"), Method(rank=5, targets=("embed_tokens",)), "lm", seed=1)
    bridge.write(spread(bridge.read(), seed=3))
    export_merged(bridge, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config.tie_word_embeddings is False
    np.testing.assert_array_equal(plain.lm_head.weight.detach(), build("llama").lm_head.weight.detach())


def test_a_model_that_stays_tied_is_saved_tied(tmp_path: Path) -> None:
    export_merged(trained(BY_NAME["lora-llama"]), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config.tie_word_embeddings is True
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


@pytest.mark.slow
def test_a_new_head_on_minilm_reaches_who_loads_the_bare_encoder(tmp_path: Path) -> None:
    origin = folder("minilm")
    labels = {i: f"class {i}" for i in range(4)}
    model = AutoModelForSequenceClassification.from_pretrained(origin, num_labels=4, id2label=labels)
    bridge = Bridge.attach(model, Method(rank=5), "classify", seed=1)
    rng = np.random.default_rng(2)
    start = bridge.read()
    change = {n: rng.normal(0, 0.02, x.shape).astype(np.float32) for n, x in start.tensors().items()}
    bridge.write(start.moved(change))
    export_peft(bridge, tmp_path / "adapter", origin=str(origin))
    (tmp_path / "base").symlink_to(origin)
    tokens = torch.randint(1000, 20000, (3, 17), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    np.savez(tmp_path / "base.npz", **{n: x.numpy() for n, x in inputs.items()})
    one = {"name": "minilm", "model": "base", "adapter": "adapter", "labels": 4, "readme": True}
    (tmp_path / "adapters.json").write_text(json.dumps([one | {"class": "AutoModelForSequenceClassification"}]))
    command = [sys.executable, str(Path(__file__).with_name("load_plainly.py")), str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    with torch.no_grad():
        want = bridge.model.eval()(**inputs).logits.numpy()
    with np.load(tmp_path / "logits.npz") as theirs:
        near(theirs["minilm"], want)
        near(theirs["minilm/readme"], want)
    assert export_merged(bridge, tmp_path / "merged") < 1e-4
