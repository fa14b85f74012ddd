"""Kits: what is in them, that torch trains from them as from the model itself, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.errors import ConfigError
from fedpeft.training import bases, export_step, step_compile
from fedpeft.training.kit import Kit
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.packed_file import read, write
from fedpeft.training.settings import Method, Model
from tests.training.cohort_cases import LINEARS, SGD, federation, jobs, table
from tests.training.peft_cases import PEFT_WARNINGS

pytestmark = [pytest.mark.filterwarnings(x) for x in PEFT_WARNINGS]
CASES = [("tiny-llama", "int8"), ("tiny-bert", "none")]


def load(model: str, quantise: str, name: str = "", method: Method | None = None) -> TorchTrainer:
    method = method or Method(rank=3, targets=LINEARS[model])
    return TorchTrainer.load(Model(name or model, quantise=quantise), method, SGD, federation(table(model)), 3)


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def made(request, tmp_path_factory):
    """A trainer, and its kit."""
    trainer, out, said = load(*request.param), tmp_path_factory.mktemp("kits") / "kit", list[str]()
    digest = export_step.export_step(trainer, out, progress=said.append)
    assert said == ["the frozen base", "the training step as a graph", "the graph beside torch"]
    kit = Kit.open(out)
    assert kit.digest == digest
    return trainer, kit


def test_a_kit_says_what_it_was_made_of(made):
    trainer, kit = made
    base, facts = trainer.frozen, kit.facts
    assert (facts.model, facts.plain, facts.quantise) == (base.name, base.plain, base.quantise)
    assert base.name in {m for m, _ in CASES}
    assert (facts.task, facts.classes, facts.method, facts.trains) == (base.task, base.classes, "lora", "ab")
    assert (facts.spec, facts.pad, facts.fresh) == (trainer.start().spec, base.pad, base.fresh)
    assert (facts.words, facts.vocabulary) == (262, 262 if base.task == "lm" else 0)
    assert facts.longest == base.model.config.max_position_embeddings
    assert (facts.bos, facts.eos) == ("<s>", "</s>")
    assert facts.seed == 3
    assert not facts.recompute
    assert 0 <= facts.checked["loss"] < 1e-5
    assert abs(facts.checked["gradient"]) < 1e-8
    for name, x in trainer.start().tensors().items():
        np.testing.assert_array_equal(kit.start().tensors()[name], x)


def test_its_base_has_each_tensor_once_and_nothing_of_a_fresh_head(made):
    trainer, kit = made
    file = read(kit.folder / "base.safetensors")
    names = {x.name for x in file.held} | set(file.whole)
    assert names == set(trainer.frozen.own.values())
    assert not names & set(trainer.frozen.fresh)
    assert {x.name for x in file.held} == {n for n, *_ in kit.facts.packed}
    assert bool(file.held) == (trainer.frozen.quantise != "none")


def test_torch_trains_from_a_kit_as_from_the_model(made, monkeypatch):
    trainer, kit = made

    def refused(*_):
        raise AssertionError("the fp32 model was loaded")

    monkeypatch.setattr(bases, "_weights", refused)
    model = kit.facts.model
    other = load(model, kit.facts.quantise, str(kit.folder))
    assert other.base == trainer.base
    for x, y in zip(trainer.train_many(jobs(trainer)), other.train_many(jobs(other)), strict=True):
        assert x.metrics == y.metrics
        for name, value in x.trained.tensors().items():
            np.testing.assert_array_equal(y.trained.tensors()[name], value)


def test_a_kit_of_something_else_is_refused_by_its_key(made):
    _, kit = made
    model, quantise = kit.facts.model, kit.facts.quantise
    other = "nf4"
    with pytest.raises(ConfigError, match=rf"model\.quantise: got '{other}'; the kit in .* was made for '{quantise}'"):
        load(model, other, str(kit.folder))
    with pytest.raises(ConfigError, match=r"adapter\.method: got 'ia3'; the kit in .* 'lora'"):
        load(model, quantise, str(kit.folder), Method("ia3"))
    with pytest.raises(ConfigError, match=r"adapter\.targets: got .*, which the kit in .* was not tried with"):
        load(
            model, quantise, str(kit.folder), Method(rank=2, targets=("k_proj",) if model == "tiny-llama" else ("key",))
        )
    with pytest.raises(ConfigError, match=r"data\.task: got"):
        TorchTrainer.load(
            Model(str(kit.folder), quantise=quantise),
            Method(rank=3),
            SGD,
            federation(table("tiny-bert" if model == "tiny-llama" else "tiny-llama")),
            3,
        )


def test_a_damaged_base_is_refused(made, tmp_path):
    _, kit = made
    for file in kit.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = bytearray((tmp_path / "base.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "base.safetensors").write_bytes(raw)
    with pytest.raises(ConfigError, match=r"base\.safetensors has SHA-256 .*damaged, or another kit's"):
        load(kit.facts.model, kit.facts.quantise, str(tmp_path))


def test_a_base_of_another_model_is_refused_though_it_is_whole_and_of_this_shape(made, tmp_path):
    _, kit = made
    for file in kit.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    base = read(kit.path("base.safetensors"))
    content = {x.name: base.matrix(x) for x in base.held} | {n: 2 * x for n, x in base.whole.items()}
    write(tmp_path / "base.safetensors", content, frozenset(x.name for x in base.held if x.transposed), base.facts)
    read(tmp_path / "base.safetensors")
    with pytest.raises(ConfigError, match=r"base\.safetensors has .*another kit's|base\.safetensors has .* bytes"):
        load(kit.facts.model, kit.facts.quantise, str(tmp_path))


def test_a_graph_that_is_wrong_is_no_kit(made, tmp_path, monkeypatch):
    trainer, kit = made
    real = export_step._torch

    def copied(*_, folder, **__):
        for name in ("step.onnx", "evaluate.onnx"):
            (folder / name).write_bytes(kit.path(name).read_bytes())

    def other(*x):
        losses, slopes = real(*x)
        return losses, {n: y * 1.001 for n, y in slopes.items()}

    monkeypatch.setattr(export_step, "_torch", other)
    monkeypatch.setattr(step_compile, "compile_step", copied)
    with pytest.raises(ConfigError, match=r"the step's graph is off by .* in its losses and 1\.0e-03 in the gradient"):
        export_step.export_step(trainer, tmp_path / "kit")
    assert list(tmp_path.iterdir()) == []
    for name, x in trainer.start().tensors().items():
        np.testing.assert_array_equal(trainer.bridge.read().tensors()[name], x)


def test_images_and_bf16_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.task: got image"):
        export_step.export_step(load("tiny-vit", "none"), tmp_path / "kit")
    half = TorchTrainer.load(
        Model("tiny-bert"), Method(rank=3), replace(SGD, precision="bf16"), federation(table("tiny-bert")), 3
    )
    with pytest.raises(ConfigError, match=r"training\.precision: got bf16"):
        export_step.export_step(half, tmp_path / "kit")
    assert list(tmp_path.iterdir()) == []


def test_the_command_makes_a_kit_and_the_second_time_a_copy(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from fedpeft.cli import app
    from fedpeft.training.environment import cache_folder
    from fedpeft.training.packaged import folder

    models = folder("tiny-llama")
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "models").mkdir(parents=True)
    (tmp_path / "cache" / "models" / models.name).symlink_to(models)
    assert cache_folder() == tmp_path / "cache"
    (tmp_path / "e.toml").write_text(
        'seed = 1\n[model]\nname = "tiny-llama"\n[data]\nname = "chitchat"\nexamples = 60\n[partition]\nname = "iid"\n'
        'clients = 3\n[adapter]\nrank = 3\ntargets = ["q_proj"]\n[training]\nlength = 48\ndevice = "cpu"\n'
    )
    said = []
    for out in ("one", "two"):
        done = CliRunner().invoke(
            app,
            [
                "export-step",
                str(tmp_path / "e.toml"),
                "--out",
                str(tmp_path / out),
                "--quantise",
                "int8",
                "--recompute",
            ],
        )
        assert done.exit_code == 0, done.output
        said.append(done.output)
    one, two = Kit.open(tmp_path / "one"), Kit.open(tmp_path / "two")
    assert one.digest == two.digest
    assert "(new)" in said[0]
    assert "(kept)" in said[1]
    assert all(one.digest in x for x in said)
    assert (one.facts.quantise, one.facts.recompute) == ("int8", True)
    assert (tmp_path / "one" / "base.safetensors").samefile(tmp_path / "two" / "base.safetensors")
