"""What rules compute, in models: an exact rule's layer gives each input the mean of what the clients' layers give.

Of FlexLoRA, which cuts this mean to the server's rank, it is the nearest of that rank.
On nn.Linear and on GPT-2's Conv1D, whose weight is the other way round; with ranks, scales and weights that differ.
"""

import numpy as np
import pytest
import torch

from fedpeft.adapters import CORES, Update
from fedpeft.rules import (
    FactorMean,
    FedEx,
    FedSB,
    FedSVD,
    FlexLoRA,
    FLoRA,
    LoRAA2,
    Ravan,
    ServerState,
    Subspace,
    Task,
)
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
    "ravan, one head": Ravan(seed=4, heads=1),
}
RANKS = (1, 6, 3)
FULL = (9, 6, 7)
"""Ranks at which every client trains the whole of the model, whose layers have ranks 6 and 4."""
WHERE_FULL = {"ravan": Ravan(seed=4, heads=2), "lora_a2": LoRAA2()}
"""Rules that are exact for what each client trains, or sends: that is all of it where its rank is the server's."""
CUT = {"flexlora": FlexLoRA(), "subspace": Subspace(seed=0)}
EACH = [pytest.param(x, RANKS, id=n) for n, x in EXACT.items()]
EACH += [pytest.param(x, FULL, id=n) for n, x in WHERE_FULL.items()]


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
@pytest.mark.parametrize(("rule", "ranks"), EACH)
def test_the_servers_layer_gives_the_mean_of_the_clients_layers(model, rule, ranks):
    bridge, rng = attached(model), np.random.default_rng(0)
    first = bridge.read()
    assert len({x.scale for x in first.layers.values()}) == 2
    assert all(x.a.shape[1] != x.b.shape[0] for n, x in first.layers.items() if "query" not in n)
    state, weights = ServerState(Task(first.spec), first), (5.0, 1.0, 2.0)
    for _ in range(3):
        sent = [rule.send(state, rank) for rank in ranks]
        trained = [moved(rule, x, rng) for x in sent]
        mean = {n: np.zeros(()) for n in first.layers}
        for x, adapter, weight in zip(sent, trained, weights, strict=True):
            for name, y in outputs(bridge, x, adapter).items():
                mean[name] = mean[name] + weight / sum(weights) * y
        updates = (Update(x.adapter, y) for x, y in zip(sent, trained, strict=True))
        clients = dict(enumerate(zip(updates, weights, strict=True)))
        state = play(rule, state, clients, ranks=dict(enumerate(ranks))).state
        whole = rule.send(state, 99)
        got = outputs(bridge, whole, whole.adapter)
        for name, want in mean.items():
            np.testing.assert_allclose(got[name], want, atol=2e-5 * np.abs(want).max())  # fp32, sums of up to 36


def matrices(bridge, sent, adapter):
    """ΔW of each adapted layer, (d, k), from what the layer gives for each unit vector, less what its base gives."""
    bridge.write(adapter)
    out = {}
    with beside(bridge.model, sent.tail, torch.device("cpu")), torch.no_grad():
        for name, x in adapter.layers.items():
            module, each = layer(bridge.model, name), torch.eye(x.a.shape[1])
            out[name] = (module(each) - module.base_layer(each)).numpy().T.astype(np.float64)
    return out


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_flexloras_layer_is_the_nearest_of_its_rank_to_the_mean_of_the_clients_layers(model):
    rule, bridge, rng = FlexLoRA(), attached(model), np.random.default_rng(0)
    first = bridge.read()
    state, weights = ServerState(Task(first.spec), first), (5.0, 1.0, 2.0)
    for _ in range(2):
        sent = [rule.send(state, rank) for rank in RANKS]
        trained = [moved(rule, x, rng) for x in sent]
        seen = [matrices(bridge, x, adapter) for x, adapter in zip(sent, trained, strict=True)]
        updates = (Update(x.adapter, y) for x, y in zip(sent, trained, strict=True))
        state = play(rule, state, dict(enumerate(zip(updates, weights, strict=True)))).state
        got = matrices(bridge, rule.send(state, 99), state.adapter)
        for name, held in first.layers.items():
            mean = sum(w / sum(weights) * x[name] for w, x in zip(weights, seen, strict=True))
            u, s, vt = np.linalg.svd(mean)
            assert s[held.rank - 1] > 1.01 * s[held.rank] > 0.05 * s[0]  # there is a cut, and one nearest to it
            want = (u[:, : held.rank] * s[: held.rank]) @ vt[: held.rank]
            np.testing.assert_allclose(got[name], want, atol=1e-4 * np.abs(want).max())  # fp32, over a gap of 1/100


@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("rule", (EXACT | WHERE_FULL | CUT).values(), ids=EXACT | WHERE_FULL | CUT)
def test_clients_of_every_rank_run_the_servers_model(model, rule):
    bridge, rng = attached(model), np.random.default_rng(0)
    state = ServerState(Task(bridge.spec), bridge.read())
    for _ in range(2):
        sent = [rule.send(state, rank) for rank in RANKS]
        updates = {i: (Update(x.adapter, moved(rule, x, rng)), 1.0) for i, x in enumerate(sent)}
        state = play(rule, state, updates, ranks=dict(enumerate(RANKS))).state
    whole = rule.send(state, 99)
    want = outputs(bridge, whole, whole.adapter)
    for rank in RANKS:
        sent = rule.send(state, rank)
        for name, got in outputs(bridge, sent, sent.adapter).items():
            np.testing.assert_allclose(got, want[name], atol=2e-5 * np.abs(want[name]).max())
