"""A kernel is chosen by what was measured, once, and only where the win is clear; what the user says comes first."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, BertConfig, LlamaConfig

from fedpeft.errors import ConfigError
from fedpeft.training import devices, kernels
from fedpeft.training.bases import load_base, place_for
from fedpeft.training.devices import choose
from fedpeft.training.kernels import Shape, fast_in_bf16, fastest_attention, seconds
from fedpeft.training.packaged import folder
from fedpeft.training.settings import Model, Training

CPU = torch.device("cpu")
SHAPE = Shape(heads=3, size=8, width=24, inner=56, length=10)
HALF, FULL = torch.bfloat16, torch.float32


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def timed(cache, monkeypatch):
    """A function that sets what each way will be measured to take; and the number of measurements."""

    class Timed:
        count = 0

        def __call__(self, **times):
            def race(ways):
                self.count += 1
                assert set(ways) <= set(times)
                return {name: times[name] for name in ways}

            monkeypatch.setattr(kernels, "_race", race)

    return Timed()


@pytest.mark.parametrize(
    ("dtype", "sdpa", "eager", "chosen"),
    [
        (FULL, 1.0, 2.0, "sdpa"),
        (FULL, 1.0, 0.99, "sdpa"),
        (FULL, 1.0, 0.84, "sdpa"),
        (FULL, 1.0, 0.82, "eager"),
        (HALF, 2.0, 1.0, "eager"),
        (HALF, 0.99, 1.0, "eager"),
        (HALF, 0.84, 1.0, "eager"),
        (HALF, 0.82, 1.0, "sdpa"),
    ],
)
def test_attention_leaves_its_default_only_for_what_is_clearly_faster(timed, dtype, sdpa, eager, chosen):
    timed(sdpa=sdpa, eager=eager)
    assert fastest_attention(CPU, dtype, SHAPE) == chosen


@pytest.mark.parametrize(("fp32", "bf16", "fast"), [(1.0, 1.1, False), (1.0, 0.84, False), (1.0, 0.82, True)])
def test_bf16_is_fast_only_where_it_is_clearly_faster(timed, fp32, bf16, fast):
    timed(fp32=fp32, bf16=bf16)
    assert fast_in_bf16(CPU, SHAPE) is fast


def test_a_choice_is_measured_once_and_holds_whatever_a_later_measurement_would_say(timed, cache):
    timed(sdpa=1.0, eager=0.1)
    assert fastest_attention(CPU, FULL, SHAPE) == "eager"
    timed(sdpa=0.1, eager=1.0)
    assert fastest_attention(CPU, FULL, SHAPE) == "eager"
    assert timed.count == 1
    (file,) = cache.iterdir()
    told = json.loads(file.read_text())
    assert told["seconds"] == {"sdpa": 1.0, "eager": 0.1}
    assert told["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("change", [{"heads": 4}, {"size": 9}, {"width": 25}, {"inner": 57}, {"length": 11}])
def test_other_sizes_are_measured_anew(timed, change):
    timed(sdpa=1.0, eager=2.0)
    seconds("attention", CPU, FULL, SHAPE)
    seconds("attention", CPU, FULL, replace(SHAPE, **change))
    assert timed.count == 2


def test_another_precision_processor_torch_and_number_of_threads_are_measured_anew(timed, monkeypatch):
    timed(sdpa=1.0, eager=2.0)
    seconds("attention", CPU, FULL, SHAPE)
    seconds("attention", CPU, HALF, SHAPE)
    for name, value in (("torch.get_num_threads", lambda: 31), ("torch.__version__", "9.9")):
        monkeypatch.setattr(name, value)
        seconds("attention", CPU, FULL, SHAPE)
    monkeypatch.setattr(kernels, "_processor", lambda: ("abacus", "beads"))
    seconds("attention", CPU, FULL, SHAPE)
    assert timed.count == 5


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seconds": {"sdpa": "fast"}}', '{"seconds": {"sdpa": 1.0}}'])
def test_a_damaged_file_is_measured_anew_and_mended(timed, cache, content):
    timed(sdpa=1.0, eager=2.0)
    seconds("attention", CPU, FULL, SHAPE)
    (file,) = cache.iterdir()
    file.write_text(content)
    for _ in range(2):
        assert seconds("attention", CPU, FULL, SHAPE) == {"sdpa": 1.0, "eager": 2.0}
    assert timed.count == 2


def test_of_two_processes_that_measure_at_once_the_first_ones_figures_hold_for_both(cache, monkeypatch):
    def race(ways):  # while this process measures, another one is done
        monkeypatch.setattr(kernels, "_race", lambda ways: {"sdpa": 1.0, "eager": 0.1})
        assert fastest_attention(CPU, FULL, SHAPE) == "eager"
        return {"sdpa": 0.1, "eager": 1.0}

    monkeypatch.setattr(kernels, "_race", race)
    assert fastest_attention(CPU, FULL, SHAPE) == "eager"


def test_a_cache_that_can_not_be_written_is_no_error(timed, tmp_path, monkeypatch):
    (tmp_path / "x").write_text("in the way")
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "x"))
    timed(sdpa=1.0, eager=2.0)
    for count in (1, 2):
        assert fastest_attention(CPU, FULL, SHAPE) == "sdpa"
        assert timed.count == count


def test_what_is_measured_is_the_same_computation_twice():
    ways = kernels._attentions(CPU, FULL, SHAPE)
    torch.testing.assert_close(ways["sdpa"](), ways["eager"](), atol=1e-5, rtol=1e-4)  # fp32 sums in another order
    assert ways["sdpa"]().shape == (3, 102, 3, 10, 8)  # query, key, value; 1,024 tokens in rows of 10; heads
    assert ways["sdpa"]().abs().max() > 0.01
    both = kernels._linears(CPU, SHAPE)
    full, half = both["fp32"](), both["bf16"]()
    assert (full.dtype, half.dtype) == (FULL, HALF)
    # bf16 keeps 8 bits; an entry is a sum of 56 products of sums, none of which has to be small
    assert (full - half.float()).norm() < 0.02 * full.norm()


def test_a_measurement_takes_under_a_second_and_finds_a_slow_way(cache):
    x = torch.ones(3, 2)
    found = kernels._race({"slow": lambda: torch.randn(400, 400) @ torch.randn(400, 400), "quick": lambda: x})
    assert 0 < found["quick"] < found["slow"] < 1


def test_sizes_are_read_from_a_models_configuration():
    assert Shape.of(BertConfig(num_attention_heads=4, hidden_size=40, intermediate_size=100)) == Shape(
        4, 10, 40, 100, 128
    )
    llama = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, hidden_size=40, head_dim=16, intermediate_size=99)
    assert Shape.of(llama, length=50) == Shape(4, 16, 40, 99, 50)
    vit = AutoConfig.from_pretrained(folder("tiny-vit"))
    assert Shape.of(vit).length == (vit.image_size // vit.patch_size) ** 2 + 1
    assert Shape.of(object()) is None


def kernel(place=None):
    return load_base(
        Model("tiny-bert"), "classify", ("a", "b"), 0, place or choose("cpu")
    ).model.config._attn_implementation


def test_models_are_loaded_with_the_kernel_that_was_measured_to_be_faster(timed):
    timed(sdpa=1.0, eager=0.5)
    assert kernel() == "eager"
    timed(sdpa=0.5, eager=1.0)
    assert kernel() == "eager", "the first measurement holds"
    assert kernel(place=choose("cpu", "bf16")) == "sdpa"
    assert timed.count == 2


@pytest.mark.parametrize("asked", ["eager", "sdpa"])
def test_what_the_user_asks_for_is_not_measured(timed, asked):
    timed()
    training = Training(device="cpu", attention=asked, precision="fp32")
    assert kernel(place=place_for(Model("tiny-bert"), training)) == asked
    assert timed.count == 0


def test_both_kernels_give_the_same_logits(cache):
    x = torch.arange(6, 30).reshape(2, 12)
    mask = torch.ones_like(x)
    mask[1, 7:] = 0
    one, other = (
        load_base(Model("tiny-bert"), "classify", ("a", "b"), 0, choose("cpu", "fp32", way)).model(x, mask).logits
        for way in ("sdpa", "eager")
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)  # fp32 sums in another order


@pytest.mark.parametrize(
    ("precision", "bf16", "dtype", "measured"),
    [
        ("auto", 0.1, FULL, 0),
        ("fp32", 0.1, FULL, 0),
        ("bf16", 9.0, HALF, 0),
        ("fastest", 0.5, HALF, 1),
        ("fastest", 0.95, FULL, 1),
    ],
)
def test_only_fastest_measures_bf16_and_auto_stays_in_fp32_on_a_cpu(timed, precision, bf16, dtype, measured):
    timed(fp32=1.0, bf16=bf16)
    place = place_for(Model("tiny-bert"), Training(device="cpu", precision=precision))
    assert (place.dtype, timed.count) == (dtype, measured)


def test_fastest_is_fp32_for_a_model_whose_sizes_are_not_known(timed):
    timed()
    assert choose("cpu", "fastest").dtype == FULL


def test_fastest_for_a_model_that_is_not_there_is_the_same_error_as_ever():
    with pytest.raises(ConfigError, match=r"model.name: './none' is not a model"):
        place_for(Model("./none"), Training(device="cpu", precision="fastest"))


def test_threads_are_set_before_anything_is_measured(timed, monkeypatch):
    timed(fp32=1.0, bf16=0.5)
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", lambda n: seen.append((n, timed.count)))
    place_for(Model("tiny-bert"), Training(device="cpu", precision="fastest", threads=3))
    assert seen == [(3, 0)]


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="attention: got flash; want auto, eager or sdpa"):
        Training(attention="flash")


def test_doctor_says_what_is_faster_here(timed, monkeypatch):
    timed(sdpa=1.0, eager=4.0, fp32=3.0, bf16=1.0)
    found = devices.measure(side=8, repeats=1)
    assert found["faster here"] == {
        "attention in fp32": "sdpa; sdpa is 4 times as fast as eager",
        "attention in bf16": "sdpa; sdpa is 4 times as fast as eager",
        "linear layers": "bf16; bf16 is 3 times as fast as fp32",
    }


@pytest.mark.slow
def test_a_real_measurement_gives_the_same_choice_in_another_process(cache):
    code = (
        "import torch\n"
        "from fedpeft.training.kernels import *\n"
        "s = Shape(12, 32, 384, 1536, 128)\n"
        "c = torch.device('cpu')\n"
        "print(fastest_attention(c, torch.float32, s), seconds('attention', c, torch.float32, s))\n"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert first == second
