"""A model of one rank holds adapters of lower ranks: padded with zeros, and cut again."""

from dataclasses import replace

import pytest
import torch

from fedpeft.adapters import same
from fedpeft.training.bridge import Bridge
from fedpeft.training.methods import Method
from tests.training.peft_cases import TASKS, build, logits, spread, train


def put(model: str, method: Method, seed: int = 1) -> Bridge:
    return Bridge.attach(build(model), method, TASKS[model], seed)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_layers_of_a_lower_rank_are_padded_with_zeros_and_read_at_their_own(name: str) -> None:
    bridge, lower = put("bert", Method(name, rank=5, alpha=20.0)), put("bert", Method(name, rank=3, alpha=12.0))
    whole = spread(bridge.read(), seed=4)
    given = whole.cut(3)
    bridge.write(whole)  # of which nothing may be left in the pads
    bridge.write(given)
    assert same(bridge.read(given), given)
    for x in bridge.read().layers.values():
        assert not x.a[3:].any()
        assert not x.b[:, 3:].any()
    lower.write(given)  # of the same scale, 4
    torch.testing.assert_close(logits(bridge.model, "bert"), logits(lower.model, "bert"), rtol=1e-5, atol=1e-5)


def test_layers_of_different_ranks_are_read_each_at_its_own() -> None:
    bridge = put("llama", Method(rank=5))
    whole = spread(bridge.read(), seed=4)
    ranks = {n: 1 + i for i, n in enumerate(whole.layers)}
    given = replace(whole, layers={n: x.cut(ranks[n]) for n, x in whole.layers.items()})
    bridge.write(given)
    assert {n: x.rank for n, x in bridge.read(given).layers.items()} == ranks
    assert same(bridge.read(given), given)


def test_training_leaves_the_pads_of_a_lower_rank_at_zero() -> None:
    bridge = put("bert", Method(rank=5))
    given = spread(bridge.read(), seed=4).cut(2)
    bridge.write(given)
    train(bridge, "bert", seed=1)
    after = bridge.read()
    assert not same(after.cut(2), given)
    for x in after.layers.values():
        assert not x.a[2:].any()
        assert not x.b[:, 2:].any()
