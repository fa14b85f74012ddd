"""Evaluation gives the sums that can be counted by hand, and changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeft.adapters import LowRank, same
from fedpeft.rounds import Failed, Job, Metrics, Trial
from fedpeft.training import evaluate, loop
from fedpeft.training.evaluate import measure
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.settings import Method, Model, Training

TRAINING = Training(lr=0.02, batch=4, length=40, device="cpu")


@pytest.fixture
def words(sentences, share):
    return TorchTrainer.load(Model("tiny-bert"), Method(targets=("query",)), TRAINING, share(sentences, 9, 13), 3)


@pytest.fixture
def talk(dialogues, share):
    return TorchTrainer.load(Model("tiny-llama"), Method(targets=("q_proj",)), TRAINING, share(dialogues, 9), 3)


def test_a_classifiers_sums_are_those_of_its_rows_one_by_one(words):
    table = words.federation.part(None, "test")
    loss = correct = 0.0
    with torch.no_grad():
        for text, label in zip(table.texts, table.labels, strict=True):
            logits = words.bridge.model(**words.frozen.words(text, return_tensors="pt")).logits[0]
            loss -= torch.log_softmax(logits, 0)[label].item()
            correct += logits.argmax().item() == label
    (found,) = words.evaluate_many([Trial(None, "test", words.start())])
    assert (found.units, found.examples, found.correct) == (7, 7, correct)
    assert found.loss == pytest.approx(loss, rel=1e-5)


def test_a_language_models_sums_are_over_the_tokens_of_replies(talk):
    table = talk.federation.part(None, "test")
    loss = correct = units = 0.0
    words = talk.frozen.words
    with torch.no_grad():
        for prompt, reply in zip(table.texts, table.replies, strict=True):
            before = words(f"<user>{prompt}</s><bot>", add_special_tokens=False)["input_ids"]
            after = words(f"{reply}</s>", add_special_tokens=False)["input_ids"]
            ids = (before + after)[:40]
            logits = talk.bridge.model(input_ids=torch.tensor([ids])).logits[0]
            for place in range(len(before), len(ids)):
                loss -= torch.log_softmax(logits[place - 1], 0)[ids[place]].item()
                correct += logits[place - 1].argmax().item() == ids[place]
                units += 1
    (found,) = talk.evaluate_many([Trial(None, "test", talk.start())])
    assert (found.units, found.examples, found.correct) == (units, len(table), correct)
    assert found.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("fixture", ["words", "talk"])
def test_the_sums_do_not_depend_on_how_rows_are_batched(request, fixture):
    found = request.getfixturevalue(fixture)
    rows = found.rows(0, "train")
    many, few = (
        measure(found.bridge.model, found.frozen, rows, replace(TRAINING, batch=100, micro=n), found.place)
        for n in (100, 1)
    )
    assert few.loss == pytest.approx(many.loss, rel=1e-5)
    assert (few.units, few.correct, few.examples) == (many.units, many.correct, many.examples)


@pytest.mark.parametrize(
    ("fixture", "batch", "micro", "passes"),
    [("words", 4, None, [9]), ("words", 4, 4, [4, 4, 1]), ("words", 4, 9, [4, 4, 1]), ("words", 99, 5, [5, 4]),
     ("talk", 4, None, [4, 4, 1]), ("talk", 4, 3, [3, 3, 3])],
)  # fmt: skip
def test_a_pass_takes_no_more_rows_than_the_settings_say(request, monkeypatch, fixture, batch, micro, passes):
    found, sizes = request.getfixturevalue(fixture), []
    whole = evaluate.collate
    monkeypatch.setattr(
        evaluate, "collate", lambda store, rows, *rest: sizes.append(len(rows)) or whole(store, rows, *rest)
    )
    trainer = found.over(found.federation, replace(TRAINING, batch=batch, micro=micro))
    (metrics,) = trainer.evaluate_many([Trial(0, "train", trainer.start())])
    assert (metrics.examples, sorted(sizes, reverse=True)) == (9, passes)


def test_a_client_without_rows_for_it_has_sums_of_zero(words):
    (found,) = words.evaluate_many([Trial(1, "test", words.start())])
    assert found == Metrics()


def test_consecutive_trials_of_one_adapter_set_it_up_once(words, monkeypatch):
    start, other = words.start(), replace(words.start())
    written = []
    kind = type(words.bridge)
    write = kind.write
    monkeypatch.setattr(kind, "write", lambda self, adapter: (written.append(adapter), write(self, adapter)))
    trials = [Trial(0, "train", start), Trial(1, "train", start), Trial(1, "train", other), Trial(0, "train", start)]
    first, _, _, last = words.evaluate_many(trials)
    assert first == last
    assert [id(x) for x in written] == [id(x) for x in (start, other, start)]


def test_an_evaluation_that_fails_says_why_and_the_next_goes_on(words):
    start = words.start()
    stranger, split, none, good = words.evaluate_many(
        [Trial(9, "test", start), Trial(0, "exam", start), Trial(None, "train", start), Trial(0, "train", start)]
    )
    assert stranger == Failed("client 9: got client 9; want 0 to 1")
    assert split == Failed("client 0: split: got 'exam'; want train, validation, test")
    assert none == Failed("central: got 'train' of no client; want 'test', and a share split.central above 0")
    assert good.examples == 9


def test_evaluation_in_between_does_not_change_what_training_gives(words):
    start = words.start()
    job = Job(0, 0, 7, start)
    (first,) = words.train_many([job])
    list(words.evaluate_many([Trial(1, "train", first.trained)]))
    (again,) = words.train_many([job])
    assert same(first.trained, again.trained)


def test_another_adapter_is_evaluated_as_itself(words):
    start = words.start()
    (job,) = words.train_many([Job(0, 0, 7, start)])
    one, two, three = words.evaluate_many([Trial(0, "train", x) for x in (start, job.trained, start)])
    assert one == three
    assert abs(two.loss - one.loss) > 1e-3


def passes(found, trials):
    """The results, and how many forward passes they took."""
    count = []
    hook = found.bridge.model.register_forward_hook(lambda *_: count.append(1))
    results = list(found.evaluate_many(trials))
    hook.remove()
    return results, len(count)


def assert_equal(got, want):
    assert (got.units, got.correct, got.examples) == (want.units, want.correct, want.examples)
    assert got.loss == pytest.approx(want.loss, rel=1e-5)  # rows are padded to another length


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-llama", "tiny-vit"])
def test_trials_of_one_adapter_share_passes_and_each_has_its_own_sums(sentences, dialogues, pictures, share, model):
    table, method = {
        "tiny-bert": (sentences, Method(targets=("query",))),
        "tiny-llama": (dialogues, Method(targets=("q_proj",))),
        "tiny-vit": (pictures, Method(targets=("q_proj",))),
    }[model]
    found = TorchTrainer.load(Model(model), method, TRAINING, share(table, 3, 1, 0, 5, 2), 3)
    places = [(0, "train"), (1, "train"), (2, "train"), (3, "train"), (None, "test"), (0, "validation"), (4, "train")]
    trials = [Trial(client, split, found.start()) for client, split in places]
    each = [next(iter(found.evaluate_many([x]))) for x in trials]
    together, count = passes(found, trials)
    for got, want in zip(together, each, strict=True):
        assert_equal(got, want)
    assert together[2] == Metrics()
    assert len({x.loss for x in together}) == len(together), "the sums should differ"
    rows = 3 + 1 + 5 + 2 + 1 + len(found.rows(None, "test"))
    assert count == (-(-rows // 4) if model == "tiny-llama" else 1)


def test_a_row_that_two_trials_have_counts_for_both(words):
    one, other, alone = words.evaluate_many([Trial(0, "train", words.start())] * 2 + [Trial(1, "train", words.start())])
    assert one == other
    assert one.examples == 9
    assert alone.examples == 13


def test_more_trials_than_share_a_pass_come_in_their_order(words, monkeypatch):
    monkeypatch.setattr(loop, "_TRIALS", 3)
    trials = [Trial(i % 2 if i % 3 else None, "test" if i % 3 == 0 else "train", words.start()) for i in range(8)]
    results, count = passes(words, trials)
    assert [x.examples for x in results] == [7, 13, 9, 7, 9, 13, 7, 13]
    assert count == 3
    many = list(words.evaluate_many(trials[:1])) * 8
    assert_equal(results[6], many[0])


def test_trials_with_a_path_beside_the_adapter_are_kept_apart_from_those_without(words):
    start = words.start()
    name, x = next(iter(start.layers.items()))
    draw = np.random.default_rng(4).standard_normal
    a, b = (draw(shape).astype(np.float32) for shape in ((2, x.a.shape[1]), (x.b.shape[0], 2)))
    tail = {name: LowRank(a, b, 1.0)}
    plain, beside, also = Trial(0, "train", start), Trial(0, "train", start, tail), Trial(1, "train", start, tail)
    each = [next(iter(words.evaluate_many([x]))) for x in (plain, beside, also, plain)]
    for got, want in zip(words.evaluate_many([plain, beside, also, plain]), each, strict=True):
        assert_equal(got, want)
    assert abs(each[0].loss - each[1].loss) > 1e-3


def test_a_trial_that_breaks_the_pass_it_shares_fails_alone(words, monkeypatch):
    whole = loop.measure_each

    def fragile(model, base, clients, *rest):
        if any(len(x) == 13 for x in clients):
            raise RuntimeError("the file of an image is damaged")
        return whole(model, base, clients, *rest)

    trials = [Trial(0, "train", words.start()), Trial(1, "train", words.start()), Trial(None, "test", words.start())]
    want = [next(iter(words.evaluate_many([x]))) for x in trials]
    monkeypatch.setattr(loop, "measure_each", fragile)
    first, broken, last = words.evaluate_many(trials)
    assert broken == Failed("client 1: the file of an image is damaged")
    assert_equal(first, want[0])
    assert_equal(last, want[2])


def test_an_adapter_that_does_not_fit_fails_its_trials_and_the_next_go_on(words):
    start = words.start()
    wrong = replace(start, dense={})
    one, two, stranger, good = words.evaluate_many(
        [*(Trial(i, "train", wrong) for i in (0, 1)), Trial(9, "train", wrong), Trial(0, "train", start)]
    )
    assert one.reason.startswith("client 0: base_model.model.classifier")
    assert two.reason.startswith("client 1: base_model.model.classifier")
    assert stranger == Failed("client 9: got client 9; want 0 to 1")
    assert good.examples == 9


def test_after_an_adapter_that_could_not_be_set_up_the_one_before_is_set_up_again(words):
    start = words.start()
    wrong = replace(start, fixed={"more": np.zeros(1)}).moved({n: x + 1 for n, x in start.tensors().items()})
    before, broken, after = words.evaluate_many([Trial(0, "train", x) for x in (start, wrong, start)])
    assert "fixed/more" in broken.reason
    assert after == before


def test_a_path_that_does_not_fit_fails_each_of_its_trials(words):
    tail = {"nowhere": LowRank(np.ones((1, 2)), np.ones((2, 1)), 1.0)}
    results = list(words.evaluate_many([Trial(i, "train", words.start(), tail) for i in (0, 1)]))
    assert results == [Failed(f"client {i}: tail: the model has no layer 'nowhere'") for i in (0, 1)]
