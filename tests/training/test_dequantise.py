"""bitsandbytes' kernel gives the same weights from the same codes, in training too, and only who asks for it has it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from transformers import BertConfig, BertModel

from fedpeft.errors import ConfigError
from fedpeft.rounds import Job, Trial
from fedpeft.training import dequantise, quantised, tiny
from fedpeft.training.batches import collate
from fedpeft.training.dequantise import dequantised, need_kernel, turned
from fedpeft.training.fidelity import gradients
from fedpeft.training.formats import Packed, pack, unpack
from fedpeft.training.kept_bases import contents
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.quantised import FrozenLinear, compile_nf4, quantise
from fedpeft.training.settings import Method, Model, Training

CPU = torch.device("cpu")
ASKED = Model("tiny-bert", quantise="nf4", kernels="bitsandbytes")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def pair(out: int, into: int, format: str = "nf4") -> tuple[nn.Module, nn.Module]:
    """A packed layer expanded our own way, and one that is handed to the kernel."""
    both = []
    for compiled in (False, True):
        plain = nn.Linear(into, out).requires_grad_(False)
        plain.weight.copy_(drawn(out, into))
        plain.bias.copy_(drawn(out, seed=1))
        holder = nn.Sequential(plain)
        quantise(holder, format, {id(x): n for n, x in holder.named_parameters()}, torch.float32)
        if compiled:
            compile_nf4(holder)
        both.append(holder[0])
    return both[0], both[1]


@pytest.fixture(params=["whole", "in parts"])
def parts(request, monkeypatch):
    """Weights expanded whole, and a few rows at a time."""
    if request.param == "in parts":
        monkeypatch.setattr(quantised, "EXPANDED", 400)


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (5, 128), (9, 192)])
def test_it_gives_the_weights_that_the_codes_stand_for(rows, columns):
    packed = pack(drawn(rows, columns).numpy(), "nf4")
    codes, scales = torch.from_numpy(packed.codes), torch.from_numpy(packed.scales)
    found = dequantised(turned(codes), scales, torch.float32)
    np.testing.assert_array_equal(found.numpy(), unpack(packed))
    for half in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantised(turned(codes), scales, half), found.to(half))
    assert torch.equal(turned(turned(codes)), codes)


def test_only_nf4_in_whole_blocks_is_handed_to_it():
    assert pair(9, 128)[1].kind.compiled
    assert not pair(9, 128)[0].kind.compiled
    for out, into, format in ((9, 130, "nf4"), (9, 128, "int4"), (9, 128, "int8")):
        own, same = pair(out, into, format)
        assert same.kind == own.kind
        torch.testing.assert_close(same(drawn(2, into)), own(drawn(2, into)), rtol=0, atol=0)


def test_a_layer_gives_the_same_forward_and_backward_to_the_bit(parts):
    own, fast = pair(9, 192)
    x, g = drawn(2, 3, 192, seed=2).requires_grad_(), drawn(2, 3, 9, seed=3)
    for one, other in ((own(x), fast(x)), (own.weight, fast.weight)):
        assert torch.equal(one, other)
    assert torch.equal(*(torch.autograd.grad(layer(x), x, g)[0] for layer in (own, fast)))


def test_in_half_precision_it_is_no_further_from_the_weights_than_our_own_way():
    own, fast = pair(9, 192)
    x = drawn(4, 192, seed=2)
    exact = x.double() @ own.weight.double().T + own.bias.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = ((layer(x).double() - exact).norm() for layer in (own, fast))
    assert theirs < 1.1 * ours  # it rounds a weight once and not thrice; the sums' own rounding is alike
    assert theirs > 0
    assert torch.equal(own(x.double()), fast(x.double())), "fp64 is expanded our own way"


def test_many_clients_and_forward_mode_go_through_it():
    own, fast = pair(6, 64)
    rows, w = drawn(5, 2, 64), drawn(5, 6, seed=4)

    def loss(layer, bias, x):
        return functional_call(layer, {"bias": bias}, (x,)).square().sum()

    for argnums in (0, 1):
        one, other = (vmap(grad(lambda b, x, m=m: loss(m, b, x), argnums=argnums))(w, rows) for m in (own, fast))
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert one.abs().max() > 0.1
    one, other = (jvp(layer, (rows[0],), (rows[1],))[1] for layer in (own, fast))
    assert torch.equal(one, other)


@pytest.fixture
def wide(tmp_path):
    """A model's folder, whose rows are whole blocks."""
    tiny.write("tiny-bert", tmp_path)
    config = BertConfig.from_pretrained(tmp_path)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 128, 3
    tiny._save(BertModel(config), tmp_path)
    return str(tmp_path)


@pytest.fixture
def load(wide, sentences, share):
    """A function (settings of the model) -> trainer."""
    federation = share(sentences, 9, 13)
    training = Training(batch=4, length=40, device="cpu", precision="fp32", lr=0.01)

    def loaded(**settings):
        targets = ("query", "value")
        return TorchTrainer.load(
            Model(wide, quantise="nf4", **settings), Method(targets=targets), training, federation, 3
        )

    return loaded


def compiled(trainer: TorchTrainer) -> set[bool]:
    return {x.kind.compiled for x in trainer.bridge.model.modules() if isinstance(x, FrozenLinear)}


def test_clients_of_both_kinds_share_a_base_and_train_alike(load):
    own, fast, again = load(), load(kernels="bitsandbytes"), load(kernels="bitsandbytes")
    assert again.frozen.source is not None, "it was kept, and is filled from the same file as a base of our own kind"
    assert [compiled(x) for x in (own, fast, again)] == [{False}, {True}, {True}]
    assert own.base == fast.base == again.base
    mine, theirs = (contents(x.bridge.model, x.frozen.own)[0] for x in (own, fast))
    assert mine.keys() == theirs.keys()
    packed = [n for n, x in mine.items() if isinstance(x, Packed)]
    assert all(np.array_equal(mine[n].codes, theirs[n].codes) for n in packed)
    assert len(packed) > 6, "what a kit would be made of"
    jobs = [Job(0, 0, 5, own.start())]
    (want,) = own.train_many(jobs)
    for trainer in (fast, again):
        (done,) = trainer.train_many(jobs)
        assert done.metrics == want.metrics
        tensors = want.trained.tensors()
        assert all(np.array_equal(x, tensors[n]) for n, x in done.trained.tensors().items())


def test_an_evaluation_takes_no_gradients_from_the_training_after_it(load):
    fast = load(kernels="bitsandbytes")
    batch = collate(fast.rows(0, "train"), np.arange(4), fast.frozen, None, CPU)
    before = gradients(fast.frozen, fast.bridge, batch, fast.place)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast.bridge.model.eval()
        list(fast.evaluate_many([Trial(0, "train", fast.start())]))
    fast.bridge.model.train()
    after = gradients(fast.frozen, fast.bridge, batch, fast.place)
    lowest = [n for n in after if ".layer.0." in n]
    assert len(lowest) == 4
    for name in lowest:
        assert after[name].abs().max() > 1e-6
        assert torch.equal(after[name], before[name])


def test_where_it_is_not_asked_for_it_need_not_be_there(monkeypatch):
    monkeypatch.setattr(dequantise, "_kernel", lambda: pytest.fail("was asked for"))
    need_kernel(Model("tiny-bert", quantise="nf4"), CPU)
    need_kernel(Model("tiny-bert", quantise="int8", formats=("int8", "nf4"), kernels="bitsandbytes"), CPU)


def missing():
    raise ModuleNotFoundError("No module named 'bitsandbytes'")


def broken():
    raise RuntimeError("its library\n  is for another processor")


def other():
    return lambda codes, *_: torch.zeros(8, 64)


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (missing, r"got 'bitsandbytes', which is not here \(No module named 'bitsandbytes'\); install fedpeft\[bnb\]"),
        (broken, "got 'bitsandbytes', which does not run here: its library is for another processor; install"),
        (other, "the bitsandbytes that is here gives other weights than nf4's; install"),
    ],
)
def test_a_kernel_that_is_not_to_be_had_or_is_another_is_refused_by_key(monkeypatch, sentences, share, kernel, why):
    monkeypatch.setattr(dequantise, "_kernel", kernel)
    with pytest.raises(ConfigError, match=f"^model.kernels: .*{why}"):
        TorchTrainer.load(ASKED, Method(), Training(device="cpu"), share(sentences, 9), 3)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"kernels": "bitsandbytes"}, "kernels: got bitsandbytes, which is for nf4; want quantise ="),
        ({"kernels": "bitsandbytes", "quantise": "int4", "formats": ("int4", "int8")}, "which is for nf4"),
        ({"kernels": "triton", "quantise": "nf4"}, "kernels: got triton; want own or bitsandbytes"),
    ],
)
def test_settings_that_it_is_not_for_are_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        Model("tiny-bert", **settings)


PROCESS = """
import sys
from fedpeft.training.environment import prepare, starting
prepare(threads=1)
with starting():
    from fedpeft.training.loop import TorchTrainer
from fedpeft.training.bases import load_base
from fedpeft.training.bridge import Bridge
from fedpeft.training.dequantise import need_kernel
from fedpeft.training.devices import choose
from fedpeft.training.settings import Method, Model
frozen = load_base(Model("tiny-bert"), "classify", ("a", "b"), 0, choose("cpu"))
Bridge.attach(frozen.model, Method(), "classify", 0, frozen.fresh)
print("bitsandbytes" in sys.modules)
need_kernel(Model(quantise="nf4", kernels="bitsandbytes"), frozen.model.device)
print("bitsandbytes" in sys.modules)
frozen = load_base(Model("tiny-llama"), "lm", (), 0, choose("cpu"))
print(type(Bridge.attach(frozen.model, Method(), "lm", 0).model).__name__)
"""


@pytest.mark.slow
def test_a_process_has_it_in_memory_only_once_it_has_asked_for_it():
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROCESS], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["False", "True", "PeftModelForCausalLM"], "")
