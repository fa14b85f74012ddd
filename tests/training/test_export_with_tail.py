"""Adapters with a tail, exported: stock peft and plain transformers say what the run's own evaluation says."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedpeft.adapters import LowRank, Update, same
from fedpeft.rules import FedEx, FLoRA, ServerState, Task
from fedpeft.training.bridge import Bridge
from fedpeft.training.export import export_merged, export_peft
from fedpeft.training.methods import Method
from fedpeft.training.tails import beside, joined
from tests.laws.cohorts import play
from tests.training.peft_cases import PEFT_WARNINGS, TASKS, build, logits

THEIRS = (  # what stock peft says of itself and of transformers 5
    "ignore:`is_gradient_checkpointing` is deprecated",
    "ignore:fan_in_fan_out is set to False",
)
pytestmark = [pytest.mark.filterwarnings(x) for x in (*PEFT_WARNINGS, *THEIRS)]
TARGETS = {"bert": ("intermediate.dense", "query"), "gpt2": ("c_attn", "c_fc")}
OPTIONS = {
    "plain": lambda wide, narrow: {},
    "rslora": lambda wide, narrow: {"use_rslora": True},
    "patterns": lambda wide, narrow: {"rank_pattern": {wide: 6}, "alpha_pattern": {narrow: 3}},
    "rslora, patterns": lambda wide, narrow: {
        "rank_pattern": {wide: 6},
        "alpha_pattern": {narrow: 3},
        "use_rslora": True,
    },
}
CPU = torch.device("cpu")


def attached(model, options="plain"):
    wide, narrow = TARGETS[model]
    method = Method("lora", 4, 7, (wide, narrow), options=OPTIONS[options](wide, narrow))
    return Bridge.attach(build(model), method, TASKS[model], seed=1)


def after_rounds(bridge, rule, rounds=2):
    """The state after some rounds of clients that move at random, the model's layers and its head too."""
    rng, first = np.random.default_rng(0), bridge.read()
    state = ServerState(Task(first.spec), first)
    for _ in range(rounds):
        clients = {}
        for client in range(3):
            sent = rule.send(state, 1 << 30).adapter
            moved = {n: (x + 0.2 * rng.normal(size=x.shape)).astype(np.float32) for n, x in sent.tensors().items()}
            clients[client] = (Update(sent, sent.put(moved)), 1.0 + client)
        state = play(rule, state, clients).state
    return state


def said(bridge, model, state):
    """What the run's own evaluation computes with."""
    bridge.write(state.adapter)
    with beside(bridge.model, state.tail, CPU), torch.no_grad():
        return logits(bridge.model, model).numpy()


def near(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, float(np.abs(want).max())))


CASES = [("bert", FLoRA(seed=3), "plain"), ("gpt2", FedEx(), "plain")]
CASES += [("bert", FedEx(largest=3), x) for x in OPTIONS] + [("gpt2", FLoRA(seed=3, energy=0.9), x) for x in OPTIONS]


@pytest.mark.parametrize(("model", "rule", "options"), CASES, ids=str)
def test_stock_peft_says_what_the_run_says_with_its_tail(model, rule, options, tmp_path):
    bridge = attached(model, options)
    state = after_rounds(bridge, rule)
    assert state.tail.keys() == state.adapter.layers.keys()
    want = said(bridge, model, state)
    without = said(bridge, model, ServerState(state.task, state.adapter))
    assert np.abs(want - without).max() > 0.05
    export_peft(bridge, tmp_path, origin="some/base", tail=state.tail)
    theirs = PeftModel.from_pretrained(build(model), tmp_path)
    near(logits(theirs, model).detach().numpy(), want)
    for name, x in state.adapter.layers.items():
        module = theirs.get_submodule(name)
        assert module.r["default"] == x.rank + state.tail[name].rank
        assert module.scaling["default"] == pytest.approx(x.scale, rel=1e-12)
    assert same(bridge.read(), state.adapter)
    near(said(bridge, model, state), want)  # and the model is as it was
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert set(config["rank_pattern"]) == {n.removeprefix("base_model.model.") for n in state.adapter.layers}
    assert bridge.model.peft_config["default"].rank_pattern == OPTIONS[options](*TARGETS[model]).get("rank_pattern", {})


@pytest.mark.parametrize(("model", "rule", "options"), [CASES[0], CASES[1], CASES[5]], ids=str)
def test_a_merged_model_has_the_tail_in_it(model, rule, options, tmp_path):
    bridge = attached(model, options)
    state = after_rounds(bridge, rule)
    want = said(bridge, model, state)
    assert export_merged(bridge, tmp_path, tail=state.tail) < 1e-4
    kind = AutoModelForSequenceClassification if model == "bert" else AutoModelForCausalLM
    got = logits(kind.from_pretrained(tmp_path), model).detach().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * float(np.abs(want).max()))
    near(said(bridge, model, state), want)


def test_layers_without_a_tail_keep_their_rank(tmp_path):
    bridge = attached("bert", "rslora, patterns")
    state = after_rounds(bridge, FedEx())
    some = dict(list(state.tail.items())[:1])
    want = said(bridge, "bert", ServerState(state.task, state.adapter, some))
    export_peft(bridge, tmp_path, tail=some)
    near(logits(PeftModel.from_pretrained(build("bert"), tmp_path), "bert").detach().numpy(), want)


def test_an_export_without_a_tail_has_the_config_that_it_had(tmp_path):
    bridge = attached("bert", "patterns")
    export_peft(bridge, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == {"intermediate.dense": 6}


def test_a_tail_for_what_is_no_linear_lora_layer_is_refused_and_the_model_stays_as_it_was():
    bridge = attached("bert")
    before, config = bridge.read(), bridge.model.peft_config["default"]
    tail = LowRank(np.ones((1, 24), np.float32), np.ones((24, 1), np.float32), 1.0)
    good = next(n for n in before.layers if n.endswith("query"))
    with (
        pytest.raises(ValueError, match=r"tail: base_model\.model\.bert\.pooler is a .*; want a linear layer"),
        joined(bridge.model, {good: tail, "base_model.model.bert.pooler": tail}),
    ):
        pass
    assert same(bridge.read(), before)
    assert bridge.model.peft_config["default"] is config
    with (
        pytest.raises(ValueError, match="tail: the model has no layer 'nowhere'"),
        joined(bridge.model, {"nowhere": tail}),
    ):
        pass
