"""What exact rules compute, in models: the server's layer gives each input the mean of what the clients' layers give.

On nn.Linear and on GPT-2's Conv1D, whose weight is the other way round; with ranks, scales and weights that differ.
"""

import numpy as np
import pytest
import torch

from fedpeft.adapters import CORES, Update
from fedpeft.rules import FactorMean, FedEx, FedSB, FedSVD, FLoRA, ServerState, Subspace, Task
from fedpeft.training.bridge import Bridge
from fedpeft.training.methods import Method
from fedpeft.training.tails import beside, layer
from tests.laws.cohorts import play, train
from tests.training.peft_cases import TASKS, build

TARGETS = {"bert": ("intermediate.dense", "query"), "gpt2": ("c_attn", "c_fc")}
EXACT = {
    "fedex": FedEx(),
    "flora": FLoRA(seed=2),
    "fedsb": FedSB(),
    "fedsvd": FedSVD(),
    "ffa": FactorMean(("b",)),
    "rolora": FactorMean(("b", "a")),
}
RANKS = (1, 6, 3)


def attached(name):
    wide, narrow = TARGETS[name]
    options = {"rank_pattern": {wide: 6}, "alpha_pattern": {narrow: 3}, "use_rslora": True}
    return Bridge.attach(build(name), Method("lora", 4, 8, (wide, narrow), options=options), TASKS[name], seed=1)


def outputs(bridge, sent, adapter):
    """What each adapted layer gives for one input, with this adapter and the tail that was sent."""
    bridge.write(adapter)
    out = {}
    with beside(bridge.model, sent.tail, torch.device("cpu")), torch.no_grad():
        for name, x in adapter.layers.items():
            draw = torch.Generator().manual_seed(3)
            out[name] = layer(bridge.model, name)(torch.randn(5, x.a.shape[1], generator=draw)).numpy()
    return out


def moved(rule, sent, rng):
    if rule.trains(sent.task) in CORES:
        return train(rule, sent, rng).trained
    mine = sent.adapter.tensors(rule.trains(sent.task))
    return sent.adapter.put({n: (x + 0.3 * rng.normal(size=x.shape)).astype(x.dtype) for n, x in mine.items()})


@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("rule", EXACT.values(), ids=EXACT)
def test_the_servers_layer_gives_the_mean_of_the_clients_layers(model, rule):
    bridge, rng = attached(model), np.random.default_rng(0)
    first = bridge.read()
    assert len({x.scale for x in first.layers.values()}) == 2
    assert all(x.a.shape[1] != x.b.shape[0] for n, x in first.layers.items() if "query" not in n)
    state, weights = ServerState(Task(first.spec), first), (5.0, 1.0, 2.0)
    for _ in range(3):
        sent = [rule.send(state, rank) for rank in RANKS]
        trained = [moved(rule, x, rng) for x in sent]
        mean = {n: np.zeros(()) for n in first.layers}
        for x, adapter, weight in zip(sent, trained, weights, strict=True):
            for name, y in outputs(bridge, x, adapter).items():
                mean[name] = mean[name] + weight / sum(weights) * y
        updates = (Update(x.adapter, y) for x, y in zip(sent, trained, strict=True))
        state = play(rule, state, dict(enumerate(zip(updates, weights, strict=True)))).state
        whole = rule.send(state, 99)
        got = outputs(bridge, whole, whole.adapter)
        for name, want in mean.items():
            np.testing.assert_allclose(got[name], want, atol=2e-5 * np.abs(want).max())  # fp32, sums of up to 36


@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("rule", [*EXACT.values(), Subspace(seed=0)], ids=[*EXACT, "subspace"])
def test_clients_of_every_rank_run_the_servers_model(model, rule):
    bridge, rng = attached(model), np.random.default_rng(0)
    state = ServerState(Task(bridge.spec), bridge.read())
    for _ in range(2):
        sent = [rule.send(state, rank) for rank in RANKS]
        updates = {i: (Update(x.adapter, moved(rule, x, rng)), 1.0) for i, x in enumerate(sent)}
        state = play(rule, state, updates).state
    whole = rule.send(state, 99)
    want = outputs(bridge, whole, whole.adapter)
    for rank in RANKS:
        sent = rule.send(state, rank)
        for name, got in outputs(bridge, sent, sent.adapter).items():
            np.testing.assert_allclose(got, want[name], atol=2e-5 * np.abs(want[name]).max())
