"""Training of cores: what a step by hand does, alone and many clients at once, and nothing left behind in the model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedpeft.adapters import Adapter, Basis, LowRank, Update, bases
from fedpeft.rounds import Done, Failed, Job
from fedpeft.rules import FedSB, Ravan, ServerState, Task
from fedpeft.training.batches import collate
from fedpeft.training.bridge import Bridge
from fedpeft.training.cores import CoreRows, cores
from fedpeft.training.methods import Method
from fedpeft.training.passes import groups
from tests.training.cohort_cases import (
    LINEARS,
    ROUNDING,
    SGD,
    TRAINING,
    assert_agree,
    broken,
    distance,
    stacked,
    start_of,
    trainers,
)
from tests.training.peft_cases import TASKS, build

RANK = 4
RULES = {"core": FedSB(), "heads": Ravan(seed=1, heads=2)}
each_kind = pytest.mark.parametrize("trains", RULES)


def method(model):
    return Method(rank=RANK, alpha=6.0, targets=LINEARS[model])


def jobs(trainer, trains, ranks, rounds=2):
    """A job for each client in core form, from a start that is not zero; those with a tail come last."""
    rule = RULES[trains]
    state = ServerState(Task(trainer.start().spec, rounds), start_of(trainer, 0, 0.2))
    found = []
    for client, rank in enumerate(ranks):
        sent = rule.send(state, rank)
        found.append(Job(client, rounds, 7 + client, sent.adapter, trains, sent.tail))
    return sorted(found, key=lambda job: len(job.tail))


def by_hand(trainer, job):
    """The b of each layer after the same steps: torch's own optimiser on small matrices, between frozen ones."""
    training, rows = trainer.training, trainer.rows(job.client, "train")
    bridge, basis = trainer.bridge, bases(job.start)
    bridge.write(job.start)
    names = {n: f"{n}.lora_B.default.weight" for n in basis}
    small, scales, lefts = {}, {}, {}
    for name, x in basis.items():
        heads, width = x.at.shape
        lefts[name] = [torch.tensor(x.left[:, at], dtype=torch.float64) for at in x.at]
        blocks = [job.start.layers[name].b[:, i * width : (i + 1) * width] for i in range(heads)]
        small[name] = [
            (left.T @ torch.tensor(block, dtype=torch.float64)).requires_grad_()
            for left, block in zip(lefts[name], blocks, strict=True)
        ]
        scales[name] = [torch.ones((), dtype=torch.float64, requires_grad=job.trains == "heads") for _ in range(heads)]
    live = dict(bridge.model.named_parameters())
    dense = {n: live[n].detach().clone().requires_grad_() for n in job.start.dense}
    chosen = [x for each in (*small.values(), *scales.values()) for x in each if x.requires_grad] + list(dense.values())
    make = torch.optim.SGD if training.optimiser == "sgd" else torch.optim.AdamW
    optimiser = make(chosen, training.lr, weight_decay=training.weight_decay)
    for group in groups(rows, training, np.random.default_rng(job.seed)):
        optimiser.zero_grad()
        weights = dict(dense)
        for name, key in names.items():
            parts = [s * left @ c for s, left, c in zip(scales[name], lefts[name], small[name], strict=True)]
            b = torch.cat(parts, dim=1).float()
            weights[key] = torch.nn.functional.pad(b, (0, RANK - b.shape[1]))
        for name, tail in job.tail.items():  # a frozen path is a change of the base's weight
            key = f"{name}.base_layer.weight"
            weights[key] = live[key].detach() + torch.tensor(tail.product(), dtype=torch.float32)
        (index,) = group
        batch = collate(rows, index, trainer.frozen, None, trainer.place.device)
        logits = torch.func.functional_call(bridge.model, weights, (), dict(batch.inputs)).logits
        cross_entropy(logits, batch.targets).backward()
        optimiser.step()
    b = {
        n: torch.cat([s * left @ c for s, left, c in zip(scales[n], lefts[n], small[n], strict=True)], dim=1)
        for n in basis
    }
    return {n: x.detach().numpy() for n, x in b.items()}, {n: x.detach().numpy() for n, x in dense.items()}


@each_kind
@pytest.mark.parametrize("rank", [RANK, 2])
@pytest.mark.parametrize(
    "training", [replace(SGD, clip=None), replace(TRAINING, clip=None, weight_decay=0.1)], ids=["sgd", "adamw"]
)
def test_a_client_trains_its_cores_as_by_hand(trains, rank, training):
    loop, _ = trainers("tiny-bert", method("tiny-bert"), training, sizes=(5, 4))
    job = jobs(loop, trains, (rank,))[0]
    assert bool(job.tail) is (rank < RANK)
    want, dense = by_hand(loop, job)
    [got] = loop.train_many([job])
    assert isinstance(got, Done), got
    for name, b in want.items():
        np.testing.assert_allclose(got.trained.layers[name].b, b, atol=2e-6)  # fp32, against cores in fp64
        np.testing.assert_array_equal(got.trained.layers[name].a, job.start.layers[name].a)
        assert got.trained.layers[name].scale == job.start.layers[name].scale
        assert np.abs(b - job.start.layers[name].b).max() > 1e-4, f"{name}: nothing was trained"
    for name, x in dense.items():
        np.testing.assert_allclose(got.trained.dense[name], x, atol=2e-6)
    assert got.trained.fixed is job.start.fixed


@each_kind
def test_what_is_trained_stays_between_the_frozen_directions(trains):
    loop, _ = trainers("tiny-llama", method("tiny-llama"), sizes=(5, 4))
    job = jobs(loop, trains, (RANK,))[0]
    [got] = loop.train_many([job])
    for name, basis in bases(job.start).items():
        b = got.trained.layers[name].b
        np.testing.assert_allclose(basis.b(basis.cores(b)), b, atol=1e-6)
    task = Task(job.start.spec, 2)
    sent = RULES[trains].encode(Update(job.start, got.trained), task)
    assert all(np.abs(x).max() > 1e-4 for n, x in sent.items() if n.endswith("/core"))


@each_kind
@pytest.mark.parametrize("model", ["tiny-bert", "tiny-llama"])
def test_the_cohort_trains_cores_as_the_loop_does_with_ranks_that_differ(trains, model):
    training = SGD if model == "tiny-bert" else TRAINING
    loop, cohort = trainers(model, method(model), training, group=3)
    assert_agree(loop, cohort, jobs(loop, trains, (4, 2, 4, 3, 1, 4)))


def test_the_cohort_trains_cores_with_clipping_and_a_proximal_term_as_the_loop_does():
    training = replace(SGD, clip=0.05, prox=0.5, momentum=0.9)
    loop, cohort = trainers("tiny-bert", method("tiny-bert"), training, sizes=(5, 2, 9))
    some = jobs(loop, "heads", (4, 4, 4))
    apart, together = list(loop.train_many(some)), stacked(cohort, some)
    for x, y in zip(apart, together, strict=True):
        assert distance(x.trained, y.trained) < 10 * ROUNDING


@each_kind
def test_nothing_of_the_cores_is_left_in_the_model(trains):
    loop, _ = trainers("tiny-bert", method("tiny-bert"), SGD, sizes=(5, 2))
    plain = Job(0, 0, 7, start_of(loop, 0, 0.1))
    [before] = loop.train_many([plain])
    done, failed = loop.train_many([job := jobs(loop, trains, (2,))[0], broken(job)])
    assert isinstance(done, Done)
    assert isinstance(failed, Failed)
    assert not [m for m in loop.bridge.model.modules() if "forward" in vars(m)]
    [after] = loop.train_many([plain])
    assert distance(before.trained, after.trained) == 0
    assert set(after.trained.fixed) == set(before.trained.fixed) == set()


def test_layers_that_are_not_in_core_form_train_both_factors():
    loop, cohort = trainers("tiny-bert", method("tiny-bert"), SGD, sizes=(5, 2, 4))
    some = []
    for job in jobs(loop, "core", (RANK,) * 3):
        first, *_ = job.start.layers
        fixed = {n: x for n, x in job.start.fixed.items() if not n.startswith(f"{first}/")}
        some.append(replace(job, start=replace(job.start, fixed=fixed)))
    assert_agree(loop, cohort, some)
    [done, *_] = loop.train_many(some)
    for name, x in done.trained.layers.items():
        assert np.array_equal(x.a, some[0].start.layers[name].a) is (name != first)


def test_a_cores_gradient_goes_through_a_transposed_layer_too():
    """GPT-2's Conv1D, whose weight is the other way round: the output's change is that of scale · left core right."""
    bridge = Bridge.attach(build("gpt2"), Method("lora", 4, 8, ("c_attn",)), TASKS["gpt2"], seed=1)
    state = ServerState(Task(bridge.spec, 2), bridge.read())
    sent = FedSB().send(state, 4).adapter
    bridge.write(sent)
    name, layer = next(iter(sent.layers.items()))
    assert layer.a.shape[1] != layer.b.shape[0]
    x = torch.randn(3, layer.a.shape[1], generator=torch.Generator().manual_seed(0))
    with cores(bridge, sent, "core", torch.device("cpu")) as (parameters, _):
        assert [n for n in parameters if n.startswith(name)] == [f"{name}/core"]
        assert {id(p) for p in bridge.model.parameters() if p.requires_grad} < {id(p) for p in parameters.values()} | {
            id(p) for n, p in bridge.live.items() if n in bridge.spec.leaves.places
        }
        module = bridge.model.get_submodule(name)
        with torch.no_grad():
            still = module(x)
            core = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(1))
            parameters[f"{name}/core"].copy_(core)
        got = (module(x) - still).detach().numpy()
    basis = bases(sent)[name]
    want = x.numpy() @ (layer.scale * basis.left @ core[0].numpy() @ basis.right - layer.product()).T
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_layer_that_is_not_linear_is_refused_by_its_name():
    bridge = Bridge.attach(build("gpt2"), Method("lora", 4, 8, ("wte",)), TASKS["gpt2"], seed=1)
    sent = FedSB().send(ServerState(Task(bridge.spec, 2), bridge.read()), 4).adapter
    bridge.write(sent)
    message = r"^base_model.model.*wte: got a Embedding in adapter.targets; cores want linear layers"
    with pytest.raises(ValueError, match=message), cores(bridge, sent, "core", torch.device("cpu")):
        pass
    with pytest.raises(ValueError, match=message):
        CoreRows.of(bridge, [Job(0, 2, 0, sent, "core")], 1, torch.device("cpu"))


def test_heads_of_different_widths_are_not_trained_together():
    loop, _ = trainers("tiny-bert", method("tiny-bert"), SGD, sizes=(5, 2))
    start = start_of(loop, 0, 0.2)
    state = ServerState(Task(start.spec, 2), start)
    some = [Job(0, 2, 7, Ravan(seed=1, heads=h).send(state, 4).adapter, "heads") for h in (2, 4)]
    with pytest.raises(ValueError, match=r"got heads of \[1, 2\] directions; want one width for all clients"):
        CoreRows.of(loop.bridge, some, 2, torch.device("cpu"))
    assert CoreRows.of(loop.bridge, [Job(0, 0, 7, start)], 2, torch.device("cpu")) is None


def test_the_model_takes_no_fixed_tensors_for_its_own():
    loop, _ = trainers("tiny-bert", method("tiny-bert"), SGD, sizes=(5, 2))
    sent = jobs(loop, "core", (RANK,))[0].start
    loop.bridge.write(sent)
    assert loop.bridge.read().fixed is sent.fixed
    strange = replace(sent, fixed=dict(sent.fixed) | {"unknown": np.ones(2)})
    with pytest.raises(ValueError, match=r"^fixed/unknown: got \(2,\) of float64; want none"):
        loop.bridge.write(strange)


def test_a_basis_is_of_one_layer():
    pair = LowRank(np.eye(2), np.eye(2), 1.0)
    x = Adapter({"w": pair}, fixed={"w/left": np.eye(2), "w/right": np.eye(2), "w/at": np.array([[0, 1]])})
    assert isinstance(bases(x)["w"], Basis)
