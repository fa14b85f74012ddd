"""A stacked model's losses and gradients are each client's own, for every peft configuration that can be stacked.

In fp64, where rounding is below 1e-12: so that what is equal is the mathematics, not its size.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import RobertaConfig, RobertaForSequenceClassification, XLNetConfig, XLNetForSequenceClassification

from fedpeft.adapters import same
from fedpeft.training.bridge import Bridge
from fedpeft.training.methods import Method
from fedpeft.training.stack import Stack
from tests.training.peft_cases import CASES, PEFT_WARNINGS, TASKS, Case, attach, batch, build, logits, spread

SLOWER = "ignore:There is a performance drop"  # of vmap over attention, which some methods put into their own layer
pytestmark = [pytest.mark.filterwarnings(x) for x in (*PEFT_WARNINGS, SLOWER)]
CLIENTS, ROWS = 3, 2
COMPILED = "autograd.Function with functorch transforms"
BRANCH = "data-dependent control flow"
WRITES = "index_put_"
SPARSE = "SparseCPU"

REFUSED: Mapping[str, str] = {
    "c3a": COMPILED,
    "randlora": COMPILED,
    "loha": BRANCH,
    "lokr": BRANCH,
    "vblora": BRANCH,
    "velora": BRANCH,
    "fourierft": WRITES,
    "oft": WRITES,
    "waveft": WRITES,
    "frod": SPARSE,
    "shira": SPARSE,
    "shadow": "may have escaped from inside a function being vmapped",
    "alora": "shape of the mask",
    "parameters": "requires_grad",
    "p-tuning-lstm": "lstm",
}
"""Why torch will not run these under vmap, by how the names of the cases begin."""
DRAWS = ("dropout", "pvera")
"""What they draw in training is another for each pass."""
WRONG = ("osf",)
"""Their gradients are another's: a hook of peft's projects them with one client's tensors."""
IN_FP32 = ("deft",)
"""Peft computes these in fp32 whatever the model is in."""


def refused(case: Case) -> str | None:
    return next((x for n, x in REFUSED.items() if case.name.startswith(f"{n}-") or case.name == n), None)


def kind(case: Case, names: tuple[str, ...]) -> bool:
    return case.name.split("-")[0] in names


def in_fp64(bridge: Bridge) -> None:
    """The model in fp64, with what peft keeps outside of its modules."""
    bridge.model.double()
    for module in bridge.model.modules():
        for value in vars(module).values():
            if isinstance(value, dict):
                for key, x in value.items():
                    if isinstance(x, Tensor) and x.dtype == torch.float32 and not isinstance(x, torch.nn.Parameter):
                        value[key] = x.double()


def losses(bridge: Bridge, model: str, inputs: Mapping[str, Tensor], labels: Tensor, clients: int) -> Tensor:
    """The mean loss of each client."""
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    scores = bridge.model(**inputs).logits
    if scores.ndim == 3:
        scores, want = scores[:, bridge.prompt_length : -1], labels[:, 1:]
        each = functional.cross_entropy(scores.flatten(0, 1), want.flatten(), reduction="none")
    else:
        each = functional.cross_entropy(scores, labels, reduction="none")
    return each.reshape(clients, -1).mean(1)


def differences(bridge: Bridge, model: str, data: list[tuple[dict[str, Tensor], Tensor]]) -> tuple[float, float]:
    """The largest differences of losses, and of gradients by their size, of clients together and one by one."""
    clients, stack, live = len(data), Stack.on(bridge), bridge.live
    draw = torch.Generator().manual_seed(0)
    mine = {
        n: x.detach() + 0.1 * torch.randn((clients, *x.shape), generator=draw, dtype=torch.float64)
        for n, x in live.items()
    }
    bridge.model.train()
    alone, gradients = [], []
    for k, (inputs, labels) in enumerate(data):
        for name, x in bridge.trainable("ab").items():
            x.data = mine[name][k].clone()
        (loss,) = losses(bridge, model, inputs, labels, 1)
        loss.backward()
        alone.append(loss.item())
        gradients.append([torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in live.values()])
    for x in mine.values():
        x.requires_grad_()
    inputs = {n: torch.cat([x[n] for x, _ in data]) for n in data[0][0]}
    with stack.running():
        stack.put(mine, clients, len(data[0][1]))
        together = losses(bridge, model, inputs, torch.cat([x for _, x in data]), clients)
        together.sum().backward()
    want = [torch.stack(x) for x in zip(*gradients, strict=True)]
    got = [torch.zeros_like(x) if x.grad is None else x.grad for x in mine.values()]
    size = max(float(x.abs().max()) for x in want)
    off = max(float((x - y).abs().max()) for x, y in zip(want, got, strict=True))
    return float((together.detach() - torch.tensor(alone, dtype=torch.float64)).abs().max()), off / size


def of(case: Case) -> tuple[float, float]:
    bridge = attach(case, seed=1)
    in_fp64(bridge)
    return differences(bridge, case.model, [batch(case.model, k, ROWS) for k in range(CLIENTS)])


STACKED = [x for x in CASES if not refused(x) and not kind(x, DRAWS) and not kind(x, WRONG)]


def test_most_configurations_can_be_stacked() -> None:
    assert (len(STACKED), len(CASES)) == (119, 172)


@pytest.mark.parametrize("case", STACKED, ids=lambda x: x.name)
def test_losses_and_gradients_are_each_clients_own(case: Case) -> None:
    loss, gradient = of(case)
    bound = 1e-6 if kind(case, IN_FP32) else 1e-10
    assert loss <= bound
    assert gradient <= bound


@pytest.mark.parametrize("case", [x for x in CASES if refused(x)], ids=lambda x: x.name)
def test_what_torch_will_not_run_under_vmap_raises_and_is_no_silent_loss(case: Case) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, IndexError), match=refused(case)):
        of(case)


@pytest.mark.parametrize("case", [x for x in CASES if kind(x, WRONG)], ids=lambda x: x.name)
def test_gradients_that_come_out_wrong_are_still_wrong_so_that_the_trial_is_needed(case: Case) -> None:
    loss, gradient = of(case)
    assert loss <= 1e-6, "the forward pass is right"
    assert gradient > 0.01


class TestRow:
    """An adapter as a row of numbers."""

    def test_is_given_back_bit_for_bit(self) -> None:
        bridge = attach(Case("", "bert", Method("dora", rank=4, options={"bias": "all"})), 1)
        stack, given = Stack.on(bridge), spread(bridge.read(), seed=2)
        row = stack.row(given)
        assert (row.dtype, row.shape) == (np.float32, (sum(stack.sizes),))
        assert same(stack.adapter(row, given), given)
        assert list(stack.names) == list(given.tensors())

    def test_of_a_lower_rank_has_zeros_and_is_cut_again(self) -> None:
        bridge = attach(Case("", "llama", Method(rank=5)), 1)
        stack, given = Stack.on(bridge), spread(bridge.read(), seed=2).cut(2)
        row = stack.row(given)
        assert (row == 0).sum() == sum(3 * (x.d + x.k) for x in bridge.spec.layers)
        assert same(stack.adapter(row, given), given)
        whole = stack.adapter(row, bridge.read())
        assert same(whole.cut(2), given)
        assert {x.rank for x in whole.layers.values()} == {5}

    def test_keeps_what_is_fixed_and_owns_its_numbers(self) -> None:
        bridge = attach(Case("", "bert", Method("vera")), 1)
        stack, given = Stack.on(bridge), bridge.read()
        row = stack.row(given)
        back = stack.adapter(row, given)
        assert back.fixed is given.fixed
        assert not any(np.shares_memory(x, row) for x in back.tensors().values())

    def test_of_another_adapter_is_refused(self) -> None:
        bridge = attach(Case("", "bert", Method(rank=5)), 1)
        start = bridge.read()
        with pytest.raises(ValueError, match="of rank 6 and scale"):
            Stack.on(bridge).row(replace(start, layers={n: x.pad(6) for n, x in start.layers.items()}))


def test_sizes_are_those_of_the_shapes() -> None:
    stack = Stack.on(attach(Case("", "vit", Method(rank=3, targets=("projection",))), 1))
    assert stack.sizes == tuple(int(np.prod(x)) for x in stack.shapes)
    assert (3, 3, 4, 4) in stack.shapes


def test_a_stack_holds_the_modules_whose_tensors_are_trained() -> None:
    for targets, save, holds in ((("q_proj",), (), False), (("lm_head",), (), True), (("q_proj",), ("lm_head",), True)):
        bridge = attach(Case("", "llama", Method(rank=3, targets=targets, save=save)), 1)
        stack, inner = Stack.on(bridge), bridge.model.base_model.model
        assert stack.holds(inner.lm_head) is holds
        assert stack.holds(inner.model) is ("q_proj" in targets)
        assert stack.holds(inner.model.norm) is False
        assert stack.holds(None) is False


@pytest.mark.parametrize(
    ("method", "plain"),
    [
        (Method(rank=3), True),
        (Method("rslora", rank=3), True),
        (Method(rank=3, save=("pooler",)), True),
        (Method(rank=3, options={"bias": "all"}), False),
        (Method(rank=3, dropout=0.3), True),
        (Method("dora", rank=3), False),
        (Method(rank=3, options={"lora_bias": True}), False),
        (Method(rank=3, targets=("word_embeddings",)), False),
        (Method("ia3"), False),
        (Method("prompt_tuning"), False),
        (Method("prefix_tuning"), False),
    ],
    ids=lambda x: str(x) if isinstance(x, bool) else f"{x.method} {dict(x.options)} {x.targets}",
)
def test_plain_is_a_low_rank_pair_and_nothing_else(method: Method, plain: bool) -> None:
    assert Stack.on(attach(Case("", "bert", method), 1)).is_plain is plain


def test_the_model_is_as_before_outside_of_running_even_if_a_pass_raised() -> None:
    for method in (Method("dora", rank=3), Method("prompt_tuning"), Method("ia3")):
        bridge = attach(Case("", "llama", method), 1)
        before, stack = logits(bridge.model, "llama"), Stack.on(bridge)
        name = next(n for n, _ in bridge.model.named_modules() if n.endswith("q_proj"))
        hooks = len(bridge.model.get_submodule(name)._forward_hooks)
        with pytest.raises(KeyError), stack.running((name,)):
            logits(bridge.model, "llama")
        assert torch.equal(logits(bridge.model, "llama"), before)
        assert len(bridge.model.get_submodule(name)._forward_hooks) == hooks
        assert "get_prompt" not in vars(bridge.model)


def test_a_path_beside_a_layer_that_there_is_not_is_refused_and_leaves_nothing() -> None:
    bridge = attach(Case("", "bert", Method(rank=3)), 1)
    stack, before = Stack.on(bridge), logits(bridge.model, "bert")
    with pytest.raises(ValueError, match="tail: the model has no layer 'nowhere'"), stack.running(("nowhere",)):
        pass
    assert torch.equal(logits(bridge.model, "bert"), before)


def roberta() -> RobertaForSequenceClassification:
    """A tiny encoder whose head is two layers: dense and out_proj, with tanh between."""
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=36,
        num_labels=3,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return RobertaForSequenceClassification(config).eval()


def test_a_head_of_two_layers_is_each_clients_own() -> None:
    bridge = Bridge.attach(roberta(), Method(rank=3), "classify", 1)
    assert {"dense.weight", "out_proj.bias"} <= {n.split("default.")[-1] for n in bridge.read().dense}
    bridge.model.double()
    loss, gradient = differences(bridge, "bert", [batch("bert", k, ROWS) for k in range(CLIENTS)])
    assert max(loss, gradient) <= 1e-10


def test_a_model_that_moves_its_rows_about_comes_out_wrong_so_that_the_trial_is_needed() -> None:
    """XLNet keeps positions first and rows second: stacked, each client's pair sees all clients' rows."""
    config = XLNetConfig(
        vocab_size=50,
        d_model=24,
        n_layer=2,
        n_head=2,
        d_inner=36,
        num_labels=3,
        dropout=0.0,
        summary_last_dropout=0.0,
    )
    torch.manual_seed(0)
    fresh = ("logits_proj.weight", "logits_proj.bias")
    bridge = Bridge.attach(XLNetForSequenceClassification(config), Method(targets=("layer_1",)), "classify", 1, fresh)
    bridge.model.double()
    assert Stack.on(bridge).is_plain
    loss, gradient = differences(bridge, "bert", [batch("bert", k, ROWS) for k in range(CLIENTS)])
    assert min(loss, gradient) > 1e-3


@pytest.mark.parametrize("model", ["bert", "llama", "vit"])
@pytest.mark.parametrize(("clients", "rows"), [(1, 1), (2, 1), (1, 3), (5, 2)])
def test_any_number_of_clients_and_rows(model: str, clients: int, rows: int) -> None:
    for method in (Method("dora", rank=3), Method("ia3")):
        bridge = Bridge.attach(build(model), method, TASKS[model], 1)
        in_fp64(bridge)
        assert max(differences(bridge, model, [batch(model, k, rows) for k in range(clients)])) <= 1e-10
