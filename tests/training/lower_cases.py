"""Tiny models of the three families with an adapter on their top layer: shared by the tests of what is kept below."""

from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedpeft.rounds import Done, Job
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.settings import Method, Model, Training
from fedpeft.training.tiny import write
from tests.training.cohort_cases import federation, table

TRAINING = Training(
    optimiser="sgd", lr=0.1, clip=None, batch=3, epochs=2, length=40, device="cpu", precision="fp32", threads=1
)
MODELS = ("tiny-bert", "tiny-llama", "gpt2")
SIZES = (7, 5)
CLOSE = 3e-6  # of the largest change, which is a tenth of the values that it is the difference of; 1e-6 was seen


def gpt2(folder: Path) -> Path:
    """A random GPT-2 of three layers, with the tokenizer of the tiny Llama."""
    write("tiny-llama", folder)
    (folder / "model.safetensors").unlink()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=262, n_embd=24, n_layer=3, n_head=2, n_inner=36, n_positions=64, bos_token_id=2)
        )
        for x in model.parameters():
            if x.ndim > 1:
                x.data.mul_(6.0)
    model.save_pretrained(folder)
    return folder


def load(model: str, folder: Path, settings: Training = TRAINING, layers: int = 1, **base) -> TorchTrainer:
    """A trainer of two clients, with LoRA on so many top layers."""
    name = str(gpt2(folder)) if model == "gpt2" else model
    data = federation(table("tiny-bert" if model == "tiny-bert" else "tiny-llama", sum(SIZES) + 3), SIZES)
    return TorchTrainer.load(Model(name, **base), Method(rank=2, layers=layers), settings, data, 1)


def begun(trainer: TorchTrainer, client: int = 0) -> Job:
    """A client's job on an adapter of which no tensor is zero, so that all have gradients."""
    rng = np.random.default_rng(4)
    start = trainer.start()
    return Job(client, 0, 5, start.moved({n: 0.1 * rng.standard_normal(x.shape) for n, x in start.tensors().items()}))


def trained(trainer: TorchTrainer, job: Job) -> Done:
    """The result of one job."""
    (done,) = trainer.train_many([job])
    assert isinstance(done, Done), done
    return done


def changes(done: Done, job: Job) -> dict[str, np.ndarray]:
    """What each tensor has become, less what it was."""
    return {n: x - job.start.tensors()[n] for n, x in done.trained.tensors().items()}


def apart(one: Done, other: Done, job: Job) -> float:
    """The largest difference between two results, as a share of the largest change."""
    x, y = changes(one, job), changes(other, job)
    return max(float(abs(x[n] - y[n]).max()) for n in x) / max(float(abs(v).max()) for v in y.values())
