"""Evaluation gives the sums that can be counted by hand, and changes nothing."""

from dataclasses import replace

import pytest
import torch

from fedpeft.adapters import same
from fedpeft.rounds import Failed, Job, Metrics, Trial
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
    many, few = (measure(found.bridge.model, found.frozen, rows, n, None, found.place) for n in (100, 1))
    assert few.loss == pytest.approx(many.loss, rel=1e-5)
    assert (few.units, few.correct, few.examples) == (many.units, many.correct, many.examples)


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
