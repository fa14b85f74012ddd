"""Packed layers compute what plain ones with the unpacked weights compute, forward, backward and under vmap."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedpeft.training import quantised
from fedpeft.training.formats import FORMATS, pack, unpack
from fedpeft.training.quantised import FrozenEmbedding, FrozenLinear, quantise

SIZES = [(7, 5), (6, 64), (9, 130), (5, 33), (4, 192)]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def named(model: nn.Module) -> dict[int, str]:
    return {id(x): n for n, x in model.named_parameters()}


def pair(format: str, out: int, into: int, bias: bool = True) -> tuple[FrozenLinear, torch.Tensor, torch.Tensor | None]:
    """A packed linear layer, the weight that it stands for, and its bias."""
    plain = nn.Linear(into, out, bias=bias).requires_grad_(False)
    plain.weight.copy_(drawn(out, into))
    holder = nn.Sequential(plain)
    quantise(holder, format, named(holder), torch.float32)
    return holder[0], torch.from_numpy(unpack(pack(plain.weight.numpy(), format))), plain.bias


@pytest.fixture(params=["whole", "in parts"])
def parts(request, monkeypatch):
    """Weights expanded whole, and a few rows at a time."""
    if request.param == "in parts":
        monkeypatch.setattr(quantised, "EXPANDED", 200)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("out", "into"), SIZES)
def test_a_packed_layer_is_the_plain_one_with_the_unpacked_weight(format, out, into, parts):
    layer, weight, bias = pair(format, out, into)
    assert isinstance(layer, FrozenLinear)
    x = drawn(2, 3, into, seed=1).requires_grad_()
    y = layer(x)
    want = functional.linear(x, weight, bias)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    g = drawn(2, 3, out, seed=2)
    (back,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(back, g @ weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight, weight)
    assert (layer.in_features, layer.out_features) == (into, out)


@pytest.mark.parametrize("format", FORMATS)
def test_its_bias_is_the_layers_own_and_can_be_trained(format, parts):
    layer, _, bias = pair(format, 9, 130)
    assert layer.bias is bias
    bias.requires_grad_()
    x, g = drawn(4, 2, 130, seed=1), drawn(4, 2, 9, seed=2)
    (slope,) = torch.autograd.grad(layer(x), bias, g)
    torch.testing.assert_close(slope, g.sum(dim=(0, 1)))


@pytest.mark.parametrize("format", FORMATS)
def test_a_conv1d_of_gpt2_is_packed_by_its_transpose(format):
    plain = Conv1D(9, 70).requires_grad_(False)
    plain.weight.copy_(drawn(70, 9))
    plain.bias.copy_(drawn(9, seed=4))
    holder = nn.Sequential(plain)
    quantise(holder, format, named(holder), torch.float32)
    weight = torch.from_numpy(unpack(pack(plain.weight.numpy().T, format)))
    x = drawn(3, 70, seed=1)
    torch.testing.assert_close(holder[0](x), x @ weight.T + plain.bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(holder[0].weight, weight.T)
    assert holder[0].codes.shape[0] == 9


@pytest.mark.parametrize("format", FORMATS)
def test_autograd_saves_the_packed_tensors_and_no_expanded_one(format):
    layer, _, _ = pair(format, 40, 192)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        layer(drawn(3, 192, seed=1).requires_grad_()).sum()
    assert {x.data_ptr() for x in saved} == {layer.codes.data_ptr(), layer.scales.data_ptr()}


class Two(nn.Module):
    """A trained layer between two frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(130, 6), nn.Linear(6, 6), nn.Linear(6, 3, bias=False)
        self.first.requires_grad_(False)
        self.last.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("format", FORMATS)
def test_many_clients_gradients_under_vmap_are_each_ones_own(format, parts):
    torch.manual_seed(0)
    model = Two()
    quantise(model, format, named(model), torch.float32)
    assert isinstance(model.first, FrozenLinear)
    assert isinstance(model.middle, nn.Linear)
    rows, wanted = drawn(5, 2, 130), drawn(5, 2, 3, seed=1)
    tensors = {"middle.weight": drawn(5, 6, 6, seed=2), "middle.bias": drawn(5, 6, seed=3)}

    def loss(some, x, y):
        return (functional_call(model, some, (x,)) - y).square().sum()

    together = vmap(grad(loss))(tensors, rows, wanted)
    by_input = vmap(grad(loss, argnums=1))(tensors, rows, wanted)
    for i in range(5):
        mine = {n: x[i].clone().requires_grad_() for n, x in tensors.items()}
        x = rows[i].clone().requires_grad_()
        apart = torch.autograd.grad(loss(mine, x, wanted[i]), [*mine.values(), x])
        for got, want in zip([*(together[n][i] for n in tensors), by_input[i]], apart, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("of_x", [None, 0, 1, 2])
def test_each_client_may_have_a_bias_of_its_own(format, of_x):
    layer, weight, _ = pair(format, 9, 130)
    x = drawn(*([4] if of_x == 0 else []), 2, *([4] if of_x == 1 else []), 3, *([4] if of_x == 2 else []), 130, seed=1)
    biases = drawn(9, 4, seed=2)

    def one(x, bias):
        return functional_call(layer, {"bias": bias}, (x,))

    got = vmap(one, in_dims=(of_x, 1))(x, biases)
    for i in range(4):
        mine = x if of_x is None else x.select(of_x, i)
        torch.testing.assert_close(got[i], functional.linear(mine, weight, biases[:, i]), rtol=1e-5, atol=1e-5)


def test_a_weight_for_each_client_is_refused():
    layer, _, _ = pair("int8", 9, 130)
    with pytest.raises(ValueError, match="want one that all share"):
        vmap(lambda codes: functional_call(layer, {"codes": codes}, (drawn(2, 130),)))(layer.codes.repeat(3, 1, 1))


@pytest.mark.parametrize("format", FORMATS)
def test_forward_mode_gives_the_derivative_along_input_and_bias(format):
    layer, weight, _ = pair(format, 9, 130)
    x, dx, bias, dbias = drawn(2, 130), drawn(2, 130, seed=1), drawn(9, seed=2), drawn(9, seed=3)

    def run(x, bias):
        return functional_call(layer, {"bias": bias}, (x,))

    _, both = jvp(run, (x, bias), (dx, dbias))
    torch.testing.assert_close(both, dx @ weight.T + dbias.expand(2, 9), rtol=1e-5, atol=1e-5)
    _, of_x = jvp(lambda x: run(x, bias), (x,), (dx,))
    torch.testing.assert_close(of_x, dx @ weight.T, rtol=1e-5, atol=1e-5)
    _, of_bias = jvp(lambda bias: run(x, bias), (bias,), (dbias,))
    torch.testing.assert_close(of_bias, dbias.expand(2, 9))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_arithmetic_is_that_of_the_input(format, dtype):
    layer, weight, bias = pair(format, 9, 130)
    x = drawn(4, 130, seed=1).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    exact = x.detach().double() @ weight.double().T + bias.double()
    # 8 bits of bf16 and 11 of fp16, in a sum of 130 products of size 1; fp64 from scales and levels of fp32
    tolerance = {torch.bfloat16: 0.2, torch.float16: 0.03, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance)
    (back,) = torch.autograd.grad(y.sum(), x)
    assert back.dtype == dtype
    torch.testing.assert_close(back[0].double(), weight.double().sum(dim=0), rtol=0, atol=tolerance)


def test_under_autocast_it_is_autocasts_and_the_input_keeps_its_own():
    layer, _, _ = pair("nf4", 9, 130)
    x = drawn(4, 130, seed=1).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    (back,) = torch.autograd.grad(y.float().sum(), x)
    assert back.dtype == torch.float32


@pytest.mark.parametrize("format", FORMATS)
def test_an_embedding_is_in_int8_and_gives_rows_in_the_type_asked_for(format):
    plain = nn.Embedding(11, 70, padding_idx=2).requires_grad_(False)
    holder = nn.Sequential(plain)
    quantise(holder, format, named(holder), torch.bfloat16)
    found = holder[0]
    assert isinstance(found, FrozenEmbedding)
    assert found.codes.dtype == torch.int8
    weight = torch.from_numpy(unpack(pack(plain.weight.numpy(), "int8")))
    ids = torch.tensor([[0, 10, 3], [3, 1, 2]])
    assert found(ids).dtype == torch.bfloat16
    # codes, scales and products rounded to 8 bits
    torch.testing.assert_close(found(ids).float(), weight[ids], rtol=2**-7, atol=0)
    torch.testing.assert_close(found.weight, weight)
    assert (found.num_embeddings, found.embedding_dim, found.padding_idx) == (11, 70, 2)


class Tied(nn.Module):
    """A head that is tied to the embedding, and a module that is in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.words.weight
        self.alias = self.words
        self.still, self.live = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.requires_grad_(False)
        self.live.weight.requires_grad_()


def test_a_tied_head_shares_the_embeddings_tensors_and_an_alias_its_module():
    model = Tied()
    table = model.words.weight.detach().clone()
    quantise(model, "nf4", named(model), torch.float32)
    assert model.alias is model.words
    assert model.head.codes is model.words.codes
    assert model.head.scales is model.words.scales
    assert model.head.codes.dtype == torch.int8
    assert model.inner.codes.dtype == torch.uint8
    x = drawn(2, 6)
    whole = torch.from_numpy(unpack(pack(table.numpy(), "int8")))
    torch.testing.assert_close(model.head(x), x @ whole.T, rtol=1e-5, atol=1e-5)


def test_what_is_trained_or_not_named_or_no_matrix_stays():
    model = Tied()
    names = named(model)
    del names[id(model.still.weight)]
    quantise(model, "int8", names, torch.float32)
    assert type(model.still) is type(model.live) is nn.Linear
    assert type(model.norm) is nn.LayerNorm
    assert type(model.inner) is FrozenLinear
    assert model.inner.name == "inner.weight"


@pytest.mark.parametrize(("format", "most"), [("int8", 0.26), ("nf4", 0.145), ("int4", 0.145)])
def test_the_plain_weights_are_gone(format, most):
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4))).requires_grad_(False)
    before = sum(x.nbytes for x in model.parameters())
    quantise(model, format, named(model), torch.float32)
    assert not list(model.parameters())
    after = sum(x.nbytes for x in model.buffers())
    assert after < most * before


def test_a_model_in_evaluation_stays_in_evaluation():
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False).eval()
    quantise(model, "int8", named(model), torch.float32)
    assert not model[0].training
