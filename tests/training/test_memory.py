"""The foretold memory grows with what it should, and is near what a real step takes."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from fedpeft.adapters import Layer, Spec
from fedpeft.training.memory import RUNTIME, estimate
from fedpeft.training.settings import Training

SPEC = Spec((Layer("q", 6, 10, 2, 1.0),), (("head", (3, 7)),))  # 2 · (6 + 10) + 21 = 53 numbers


class Config(dict):
    def to_dict(self):
        return self


BERT = Config(
    hidden_size=10,
    num_hidden_layers=4,
    intermediate_size=30,
    vocab_size=500,
    problem_type="single_label_classification",
)
TEXT = Training(batch=2, length=8)


def beyond(config=BERT, parameters=1000, training=TEXT):
    return estimate(config, parameters, SPEC, training) - RUNTIME


def test_the_formula_of_the_docstring_gives_the_estimate_of_a_classifier():
    layer = 6 * 10 + 75  # 2.5 · 30
    assert beyond() == 4 * 1000 + 4 * 53 * 5 + 4 * 16 * (4 + 1) * layer  # and one layer's gradients


def test_the_optimiser_says_how_many_moments_there_are():
    sgd = beyond(training=Training(batch=2, length=8, optimiser="sgd"))
    momentum = beyond(training=Training(batch=2, length=8, optimiser="sgd", momentum=0.5))
    assert (beyond() - sgd, momentum - sgd) == (4 * 53 * 2, 4 * 53)


def test_a_base_in_bf16_takes_half():
    assert beyond() - beyond(training=Training(batch=2, length=8, precision="bf16")) == 2 * 1000


def test_checkpointing_keeps_one_layers_activations_and_the_width_of_the_others():
    saved = beyond() - beyond(training=Training(batch=2, length=8, checkpointing=True))
    layer = 6 * 10 + 75
    assert saved == 4 * 16 * (4 * layer - layer - 4 * 10)


def test_a_language_model_has_its_vocabulary_twice_but_of_a_large_one_only_some_positions():
    assert beyond(Config(BERT, problem_type=None)) - beyond() == 4 * 16 * 2 * 500
    large = Config(BERT, problem_type=None, vocab_size=600_000)
    assert beyond(large) - beyond() == 4 * 2 * 2**23 < 4 * 16 * 2 * 600_000


@pytest.mark.parametrize(("format", "each"), [("int8", 8 + 32 / 10), ("nf4", (8 * 5 + 16) / 10)])
def test_a_quantised_base_takes_its_formats_bits_and_one_expanded_weight(format, each):
    """500 words of 10 numbers are in int8 in any format; of 7,000 parameters 2,000 are left."""
    whole = estimate(BERT, 7000, SPEC, TEXT) - 4 * 7000
    got = estimate(BERT, 7000, SPEC, TEXT, format) - whole
    assert got == 5000 * (8 + 32 / 10) / 8 + 2000 * each / 8 + 4 * 5000
    narrow = Config(BERT, vocab_size=20)  # whose largest matrix is 10 x 30
    assert estimate(narrow, 7000, SPEC, TEXT, format) - whole == (200 * 11.2 + 6800 * each) / 8 + 4 * 300
    assert estimate(BERT, 7000, SPEC, replace(TEXT, precision="bf16"), format) - whole == got
    wide = Config(BERT, vocab_size=10**7, problem_type="x")  # 10^8 numbers, of which 2^22 are expanded at a time
    assert estimate(wide, 10**8, SPEC, TEXT, format) - whole == round(10**8 * 11.2 / 8) + 4 * 2**22


def test_an_images_length_is_its_number_of_patches_and_one():
    vit = Config(hidden_size=10, num_hidden_layers=4, mlp_ratio=3, image_size=28, patch_size=7, problem_type="x")
    layer = 6 * 10 + 75
    without = 4 * 1000 + 4 * 53 * 5
    assert beyond(vit) == without + 4 * 2 * 17 * 5 * layer
    assert beyond(vit, training=Training(batch=2, image_size=14)) == without + 4 * 2 * 5 * 5 * layer


_STEP = """
import json, sys
from pathlib import Path
from fedpeft.training.environment import prepare; prepare(threads=2)
import numpy as np
from fedpeft.data import Federation, Table
from fedpeft.rounds import Job
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.memory import estimate
from fedpeft.training.settings import Method, Model, Training
rows, none = np.arange(32), np.arange(0)
table = Table("classify", ("word " * 100,) * 32, rows % 3, ("a", "b", "c"))
federation = Federation(table, ("all",), (rows,), (none,), (none,), none)
training = Training(batch=32, length=64, device="cpu", checkpointing=sys.argv[1] == "checkpointing")
found = TorchTrainer.load(Model("minilm"), Method(targets=("query", "value")), training, federation, 1)
(done,) = found.train_many([Job(0, 0, 0, found.start())])
assert done.metrics.units == 32
base = sum(x.numel() for x in found.frozen.model.parameters())
foretold = estimate(found.frozen.model.config, base, found.start().spec, found.training)
status = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
print(json.dumps([foretold, int(status["VmHWM"].split()[0]) * 1024]))  # ru_maxrss would count the parent's too
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("mode", ["plain", "checkpointing"])
def test_the_estimate_is_within_30_percent_of_a_real_steps_peak(mode):
    # The environment of the parent would hand down its allocator settings, which prepare() leaves as they are.
    environment = {n: x for n, x in os.environ.items() if not n.startswith("MALLOC_")} | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", _STEP, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    foretold, measured = json.loads(done.stdout)
    assert foretold == pytest.approx(measured, rel=0.3)
