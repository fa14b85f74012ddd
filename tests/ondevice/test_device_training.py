"""A device's training is torch's, for every setting and every job, around a graph whose gradients are known."""

import resource
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import Adapter, Basis, LowRank, Pool, cored, same
from fedpeft.data import Encoded, Padded, joined
from fedpeft.errors import ConfigError
from fedpeft.ondevice.session import Graph
from fedpeft.ondevice.trainer import OnnxTrainer
from fedpeft.rounds import Done, Failed, Job, Metrics, Trial
from fedpeft.rules import Objective
from fedpeft.training.formats import of_run
from fedpeft.training.kit import EVALUATE, STEP
from fedpeft.training.passes import travel
from fedpeft.training.settings import Method, Model, Training
from tests.ondevice import in_torch
from tests.ondevice.small_kit import MIDDLE, RANK, SCALE, TOP, WIDTH, write

SGD = Training("sgd", lr=0.05, batch=2, epochs=2, length=18, clip=None)
MODEL = Model("by-hand")
CLOSE = {"rtol": 1e-5, "atol": 2e-6}  # after ten steps in fp32, whose sums are in another order


@pytest.fixture
def opened(kits, federations):
    """A function (task, training) -> OnnxTrainer, of one thread."""
    return lambda task, training=SGD: OnnxTrainer.open(kits[task], training, federations[task], MODEL, 1)


def drawn(*shape: int, seed: int = 5) -> np.ndarray:
    return 0.3 * np.random.default_rng(seed).standard_normal(shape)


def tail() -> dict[str, LowRank]:
    """On one layer alone, of a scale that is not the adapter's, in fp64."""
    return {"v": LowRank(drawn(2, MIDDLE), drawn(TOP, 2), 1.7)}


def done(trainer: OnnxTrainer, job: Job) -> Done:
    [found] = trainer.train_many([job])
    assert isinstance(found, Done), found
    return found


def need_torchs(trainer: OnnxTrainer, job: Job) -> Done:
    """The job, done; what it gives is what torch gives."""
    received = {n: x.copy() for n, x in job.start.tensors().items()}
    found, rows = done(trainer, job), trainer.rows(job.client, "train")
    values, metrics = in_torch.train(job, rows, trainer.training)
    for n, x in found.trained.tensors().items():
        np.testing.assert_allclose(x, values[n], **CLOSE, err_msg=n)
        np.testing.assert_array_equal(job.start.tensors()[n], received[n], err_msg=n)
    assert found.metrics.vector() == pytest.approx(metrics.vector(), rel=1e-5)
    assert found.travel == travel(trainer.training, len(rows))
    assert {n: x.scale for n, x in found.trained.layers.items()} == {"q": SCALE, "v": SCALE}
    return found


@pytest.mark.parametrize("task", ["classify", "lm"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 2, "clip": 0.3, "prox": 0.4, "momentum": 0.5, "weight_decay": 0.1},
        {"steps": 7, "batch": 4, "accumulate": 3, "clip": 1.0},
        {"optimiser": "adamw", "lr": 0.01, "weight_decay": 0.1, "prox": 0.4, "clip": 0.3},
    ],
)
def test_training_is_torchs(opened, task, changes):
    trainer = opened(task, replace(SGD, **changes))
    found = need_torchs(trainer, Job(1, 0, 8, trainer.start()))
    assert not same(found.trained, trainer.start())


@pytest.mark.parametrize("trains", ["a", "b", "ab"])
def test_only_what_the_rule_says_is_trained_beside_a_frozen_tail(opened, trains):
    trainer = opened("lm", replace(SGD, clip=0.5, accumulate=2))
    start = trainer.start().cut(3)
    start = replace(start, layers=start.layers | {"q": start.layers["q"].cut(2)})  # layers of unequal rank
    found = need_torchs(trainer, Job(0, 0, 8, start, trains, tail()))
    moved = {n for n, x in found.trained.tensors().items() if x.tobytes() != start.tensors()[n].tobytes()}
    assert moved == {"head", "bias", *(f"{n}/{p}" for n in "qv" for p in trains)}


def test_a_layer_without_a_direction_of_its_own_still_has_its_tail(opened):
    trainer = opened("classify")
    start = trainer.start().cut(0)
    found = need_torchs(trainer, Job(0, 0, 8, start, "ab", tail()))
    assert found.trained.layers["q"].a.shape == (0, WIDTH)
    need_torchs(trainer, Job(0, 0, 8, start))


def test_what_a_rule_adds_is_added(opened):
    trainer = opened("classify", replace(SGD, clip=0.2))
    shift = {"q/b": drawn(MIDDLE, RANK), "bias": drawn(3)}
    objective = Objective(0.3, {"q": 1, "v": 2}, shift)
    plain = done(trainer, Job(0, 0, 8, trainer.start()))
    found = need_torchs(trainer, Job(0, 0, 8, trainer.start(), objective=objective))
    assert not same(found.trained, plain.trained)


@pytest.mark.parametrize("trains", ["core", "heads"])
def test_cores_are_trained_between_their_frozen_directions(opened, trains):
    trainer = opened("classify", replace(SGD, clip=0.2, momentum=0.5))
    left = np.linalg.qr(drawn(MIDDLE, 4))[0].astype(np.float32)
    basis = Basis(left, drawn(4, WIDTH).astype(np.float32), np.array([[0, 2], [3, 1]]))
    start = cored(trainer.start(), {"q": basis}, {"q": drawn(2, 2, 2)})
    found = need_torchs(trainer, Job(1, 0, 8, start, trains)).trained
    assert found.layers["q"].a.tobytes() == start.layers["q"].a.tobytes()
    assert found.fixed is start.fixed
    assert not np.allclose(found.layers["q"].b, start.layers["q"].b, atol=1e-3)
    cores = basis.cores(found.layers["q"].b)
    np.testing.assert_allclose(basis.b(cores), found.layers["q"].b, atol=1e-6)  # nothing outside the directions


def test_a_result_depends_on_its_job_alone(opened):
    trainer = opened("lm")
    jobs = [Job(c, 0, 3, trainer.start()) for c in (0, 1, 0)]
    first, _, again = trainer.train_many(jobs)
    assert isinstance(first, Done)
    assert isinstance(again, Done)
    assert same(first.trained, again.trained)
    other = done(trainer, Job(0, 0, 4, trainer.start()))
    assert not same(first.trained, other.trained)


def test_evaluation_sums_losses_units_and_hits_with_the_tail_in_place(opened):
    trainer = opened("lm")
    start = trainer.start()
    trials = [
        Trial(None, "test", start, tail()),
        Trial(1, "validation", start),
        Trial(0, "validation", start),
        Trial(0, "train", start.cut(1)),
    ]
    found = list(trainer.evaluate_many(trials))
    for trial, x in zip(trials, found, strict=True):
        rows = trainer.rows(trial.client, trial.split)
        assert isinstance(x, Metrics), x
        assert x.vector() == pytest.approx(in_torch_measured(trial, rows).vector(), rel=1e-5)
    assert found[2] == Metrics()
    assert found[0].examples == 4


def test_an_evaluation_takes_no_more_rows_at_a_time_than_training(opened, monkeypatch):
    trainer, sizes = opened("lm"), list[int]()
    count, whole = len(trainer.rows(0, "train")), Graph.run

    def seen(graph: Graph, batch: Padded, *rest: Any) -> Any:
        sizes.append(len(batch.ids))
        return whole(graph, batch, *rest)

    monkeypatch.setattr(Graph, "run", seen)
    for micro, most in ((None, 3), (2, 2)):
        sizes.clear()
        some = trainer.over(trainer.federation, replace(trainer.training, batch=3, micro=micro))
        (metrics,) = some.evaluate_many([Trial(0, "train", some.start())])
        assert (metrics.examples, sum(sizes), max(sizes)) == (count, count, most)


def in_torch_measured(trial: Trial, rows: Encoded) -> Metrics:
    import torch

    from fedpeft.data import padded

    total = Metrics(examples=len(rows))
    values = {n: torch.tensor(x) for n, x in trial.adapter.tensors().items()}
    for i in rows.index:
        each, hits = in_torch.outcome(values, trial.tail, padded(rows.store, np.array([i]), 0, True))
        total += Metrics(float(each.sum()), len(each), int(hits.sum()))
    return total


def test_what_can_not_be_done_fails_by_itself_and_says_why(opened):
    trainer = opened("classify")
    start = trainer.start()
    wide = Adapter(start.layers | {"q": start.layers["q"].pad(5)}, start.dense)
    scaled = Adapter(start.layers | {"v": start.layers["v"].at(0.25)}, start.dense)
    bad = start.put({"head": start.dense["head"] * np.float32(np.inf)})
    jobs = [
        Job(2, 0, 3, start),
        Job(0, 0, 3, wide),
        Job(0, 0, 3, scaled),
        Job(0, 0, 3, replace(start, dense={"head": start.dense["head"]})),
        Job(0, 0, 3, bad),
        Job(0, 0, 3, start, tail={"k": tail()["v"]}),
        Job(0, 0, 3, start, tail={"q": tail()["v"]}),
        Job(0, 0, 3, replace(start, fixed={"drawn": np.zeros(2)})),
        Job(0, 0, 3, start),
    ]
    *found, last = trainer.train_many(jobs)
    assert isinstance(last, Done)
    for x, text in zip(
        found,
        (
            "client 2: got client 2; want 0 to 1",
            "client 0: q: got rank 5; want at most 4, the kit's",
            f"client 0: v: got ({TOP}, {MIDDLE}, 0.25); want ({TOP}, {MIDDLE}, {SCALE}): the adapter is for another",
            "client 0: bias: got none; want (3,)",
            "client 0: the loss is nan at step 1: lower training.lr, or set training.clip",
            "client 0: tail: the adapter has no layer 'k'",
            f"client 0: tail: q is ({MIDDLE}, {WIDTH}); got ({TOP}, {MIDDLE})",
            "client 0: the method's frozen draws are not the kit's",
        ),
        strict=True,
    ):
        assert isinstance(x, Failed)
        assert text in x.reason
    measured = list(
        trainer.evaluate_many([Trial(2, "test", start), Trial(None, "train", start), Trial(0, "test", start)])
    )
    assert [type(x) for x in measured] == [Failed, Failed, Metrics]
    assert "central: got 'train' of no client" in measured[1].reason


def test_a_client_whose_rows_were_all_cut_is_told_so(opened):
    trainer = opened("lm", replace(SGD, length=2))
    [found] = trainer.train_many([Job(0, 0, 1, trainer.start())])
    assert found == Failed("client 0: no rows to train on: all 9 were cut before their reply; raise training.length")


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_step_on_texts_of_one_token_goes_on_without_a_gradient_as_in_torch(opened, optimiser):
    momentum = 0.5 if optimiser == "sgd" else 0.0
    training = replace(SGD, optimiser=optimiser, batch=1, epochs=1, momentum=momentum, prox=0.4, weight_decay=0.1)
    trainer = opened("lm", training)
    store, rows = trainer.store, trainer.rows(1, "train").index
    short = [store.row(i)[:1] if i in rows[::2] else store.row(i) for i in range(len(store))]
    trainer._store = joined(short, np.arange(len(store)), store.targets, np.zeros(len(store), bool), len(store))
    found = need_torchs(trainer, Job(1, 0, 8, trainer.start()))
    assert found.metrics.units == sum(len(store.row(i)) - store.targets[i] for i in rows[1::2])


def test_a_graph_without_gradients_of_a_trains_b_alone(tmp_path, federations):
    kit = write(tmp_path, trains="b")
    trainer = OnnxTrainer.open(kit, SGD, federations["classify"], MODEL, 1)
    need_torchs(trainer, Job(0, 0, 2, trainer.start(), "b"))
    [found] = trainer.train_many([Job(0, 0, 2, trainer.start())])
    assert isinstance(found, Failed)
    assert "the job trains 'ab', and the kit's graph has gradients of b alone" in found.reason


def test_the_base_is_the_runs(kits, federations):
    spec = kits["lm"].spec

    def base(model: Model) -> str:
        return OnnxTrainer.open(kits["lm"], SGD, federations["lm"], model, 1).base

    assert base(MODEL) == of_run("0123", spec)
    assert base(replace(MODEL, formats=("none", "int8"))) != base(MODEL)


def test_one_graph_is_open_at_a_time(opened):
    trainer = opened("classify")
    assert trainer.graph(STEP) is trainer.graph(STEP)
    first = trainer.graph(STEP)
    trainer.graph(EVALUATE)
    assert trainer.graph(STEP) is not first
    trainer.close()
    assert list(trainer._opened) == []


def test_the_same_kit_serves_other_clients_and_settings(opened, federations):
    trainer = opened("classify")
    assert trainer.store is trainer.store
    other = trainer.over(federations["classify"], replace(SGD, epochs=1))
    assert other._store is trainer._store
    assert other.base == trainer.base
    assert other.training.epochs == 1
    assert trainer.over(federations["classify"], replace(SGD, length=9))._store is None
    with pytest.raises(ConfigError, match=r"training.length: got 21; the model takes at most 20 tokens"):
        trainer.over(federations["classify"], replace(SGD, length=21))


@pytest.mark.parametrize(
    ("task", "training", "model", "method", "text"),
    [
        ("classify", SGD, Model("minilm"), Method(), "model.name: got minilm; want by-hand, which the kit in"),
        ("classify", SGD, replace(MODEL, quantise="int8"), None, "model.quantise: got int8; want none, as the kit in"),
        ("classify", SGD, replace(MODEL, dropout=True), None, "model.dropout: got true; want false"),
        ("classify", SGD, MODEL, Method(dropout=0.1), r"adapter.dropout: got 0.1; want 0"),
        ("classify", SGD, MODEL, Method("ia3"), "adapter.method: got ia3; want lora, which the kit in"),
        ("lm", SGD, MODEL, None, "data: got classify; want lm, the task of the kit in"),
        ("classify", replace(SGD, precision="bf16"), MODEL, None, "training.precision: got bf16; want auto, fp32"),
        ("classify", replace(SGD, device="cuda"), MODEL, None, "training.device: got cuda; want auto or cpu"),
        ("classify", replace(SGD, length=21), MODEL, None, "training.length: got 21; the model takes at most 20 tok"),
    ],
)
def test_settings_that_a_kit_can_not_honour_are_refused_by_their_key(
    kits, federations, task, training, model, method, text
):
    with pytest.raises(ConfigError, match=text):
        OnnxTrainer.open(kits[task], training, federations["classify"], model, 1, method)


def test_the_classes_must_be_the_kits(kits, federations):
    federation = federations["classify"]
    other = replace(federation, table=replace(federation.table, classes=("red", "green", "grey")))
    with pytest.raises(ConfigError, match=r"data: got red, green, grey; want the classes of the kit in .*'blue'"):
        OnnxTrainer.open(kits["classify"], SGD, other, MODEL, 1)


def test_a_walk_takes_forward_passes_alone_and_tells_its_moves(tmp_path, federations):
    kit = write(tmp_path, "lm")
    trainer = OnnxTrainer.open(kit, replace(SGD, lr=1e-3), federations["lm"], MODEL, 1)
    (tmp_path / "step.onnx").unlink()
    pool, start = Pool(3, size=5, epsilon=0.01), trainer.start().cut(3)
    found = done(trainer, Job(1, 0, 8, start, tail=tail(), pool=pool))
    assert found.moves is not None
    assert np.count_nonzero(found.moves)
    moved = pool.moved(start.tensors(), found.moves)
    for n, x in found.trained.tensors().items():
        np.testing.assert_allclose(x, moved[n], atol=1e-6, err_msg=n)
    [after] = trainer.evaluate_many([Trial(1, "train", found.trained, tail())])
    [before] = trainer.evaluate_many([Trial(1, "train", start, tail())])
    assert isinstance(after, Metrics)
    assert isinstance(before, Metrics)
    assert after.mean_loss < before.mean_loss


def test_a_trainer_is_frugal_where_it_is_told_or_memory_is_limited(kits, federations):
    def opened(frugal: bool | None = None) -> OnnxTrainer:
        return OnnxTrainer.open(kits["classify"], SGD, federations["classify"], MODEL, 1, frugal=frugal)

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    assert soft == resource.RLIM_INFINITY
    assert not opened().frugal
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, hard))
    try:
        assert opened().frugal
        assert not opened(False).frugal
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    threads = [opened(), OnnxTrainer.open(kits["lm"], replace(SGD, threads=3), federations["lm"], MODEL)]
    assert [x.threads for x in threads] == [1, 3]


def test_a_graph_must_have_the_inputs_and_outputs_of_its_kit(tmp_path):
    kit = write(tmp_path)
    other = replace(kit, facts=replace(kit.facts, task="lm"))
    with pytest.raises(ConfigError, match=r"step.onnx has no input 'positions'; kit.json wants 10, such as 'bias'"):
        Graph.open(other, STEP, 1)
    other = replace(kit, facts=replace(kit.facts, trains="b"))
    with pytest.raises(ConfigError, match=r"step.onnx has output 'grad/q/a'; kit.json wants 6, such as 'grad/bias'"):
        Graph.open(other, STEP, 1, frugal=True)
    assert isinstance(Graph.open(other, EVALUATE, 1), Graph)
    content = (tmp_path / STEP).read_bytes()
    (tmp_path / STEP).write_bytes(content[: len(content) // 2])
    with pytest.raises(
        ConfigError, match=r"step.onnx can't be run by onnxruntime .*; install the version that the kit"
    ):
        Graph.open(kit, STEP, 1)
