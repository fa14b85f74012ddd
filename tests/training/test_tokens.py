"""All clients share one store, and what a client sees of it is what its rows alone would give."""

import numpy as np
import pytest
import torch

from fedpeft.data import ABSENT, CUT, WHOLE, Table
from fedpeft.training.bases import load_base
from fedpeft.training.batches import collate
from fedpeft.training.devices import choose
from fedpeft.training.loop import TorchTrainer
from fedpeft.training.settings import Method, Model, Training
from fedpeft.training.tokens import encode, tokenise

CPU = torch.device("cpu")
LORA = Method(rank=3, alpha=6.0, targets=("query", "value"))


@pytest.fixture(scope="module")
def bert():
    return load_base(Model("tiny-bert"), "classify", ("red", "green", "blue"), 0, choose("cpu"))


@pytest.fixture(scope="module")
def llama():
    return load_base(Model("tiny-llama"), "lm", (), 0, choose("cpu"))


@pytest.fixture(scope="module")
def vit():
    return load_base(Model("tiny-vit"), "image", ("dark", "grey", "light"), 0, choose("cpu"))


def same_batch(x, y):
    assert x.inputs.keys() == y.inputs.keys()
    for name, value in x.inputs.items():
        other = y.inputs[name]
        assert value is other is True or (value.dtype == other.dtype and torch.equal(value, other)), name
    assert torch.equal(x.targets, y.targets)
    assert (x.where is None) == (y.where is None)
    assert x.where is None or torch.equal(x.where, y.where)


def ids(encoded):
    return [encoded.store.row(i).tolist() for i in encoded.index.tolist()]


def test_a_view_has_the_tokens_and_labels_of_its_rows_tokenised_alone(bert, sentences):
    rows = np.array([3, 29, 7, 4])
    seen, alone = tokenise(sentences, bert, 20).view(rows), encode(sentences.take(rows), bert, 20)
    assert ids(seen) == ids(alone)
    assert bert.words.decode(ids(seen)[0], skip_special_tokens=True) == "red thing thing th"  # 18 letters and two marks
    assert seen.targets.tolist() == alone.targets.tolist() == sentences.labels[rows].tolist()
    assert seen.lengths.tolist() == alone.lengths.tolist() == [len(x) for x in ids(seen)]
    for index in ([0, 1, 2, 3], [2], [3, 1]):
        same_batch(collate(seen, np.array(index), bert, None, CPU), collate(alone, np.array(index), bert, None, CPU))


def test_a_view_of_dialogues_counts_its_own_cut_rows(llama):
    table = Table("lm", ("a" * 5, "b" * 40, "c" * 5, "d" * 50, "e"), ("reply", "r", "abcdefghij", "s", "tt"))
    store = tokenise(table, llama, 14)
    assert store.state.tolist() == [WHOLE, CUT, WHOLE, CUT, WHOLE]
    for rows, index, dropped in (([0, 1, 2], [0, 2], 1), ([4, 3], [4], 1), ([1, 3], [], 2), ([2], [2], 0)):
        seen, alone = store.view(np.array(rows)), encode(table.take(np.array(rows)), llama, 14)
        assert (seen.index.tolist(), seen.dropped) == (index, dropped)
        assert (len(seen), seen.dropped, ids(seen)) == (len(alone), alone.dropped, ids(alone))
        assert seen.targets.tolist() == alone.targets.tolist()
    seen, alone = store.view(np.array([0, 2, 4])), encode(table.take(np.array([0, 2, 4])), llama, 14)
    same_batch(collate(seen, np.array([2, 0]), llama, None, CPU), collate(alone, np.array([2, 0]), llama, None, CPU))


def test_a_view_of_pictures_shares_the_tables_pixels(vit, pictures):
    store = tokenise(pictures, vit, 8)
    assert np.shares_memory(store.images, pictures.pixels)
    seen, alone = store.view(np.array([9, 2, 5])), encode(pictures.take(np.array([9, 2, 5])), vit, 8)
    assert seen.lengths.tolist() == [1, 1, 1]
    for side in (28, 35):
        same_batch(collate(seen, np.array([2, 0]), vit, side, CPU), collate(alone, np.array([2, 0]), vit, side, CPU))


@pytest.mark.parametrize("kind", ["classify", "lm"])
def test_rows_of_several_clients_make_one_batch(bert, llama, sentences, dialogues, kind):
    table, base = (sentences, bert) if kind == "classify" else (dialogues, llama)
    store = tokenise(table, base, 24)
    first, second = store.view(np.array([1, 8, 12])), store.view(np.array([5, 0]))
    rows = np.concatenate([first.index[[2, 0]], second.index[[1]]])
    together = collate(store, rows, base, None, CPU)
    same_batch(together, collate(encode(table, base, 24), np.array([12, 1, 0]), base, None, CPU))
    assert (rows.tolist(), len(together.inputs["input_ids"])) == ([12, 1, 0], 3)


def test_only_the_rows_that_are_asked_for_are_tokenised_and_others_are_refused(bert, sentences):
    some = np.array([2, 3, 11])
    store, whole = tokenise(sentences, bert, 20, some), tokenise(sentences, bert, 20)
    assert np.flatnonzero(store.state != ABSENT).tolist() == [2, 3, 11]
    assert len(store.tokens) == whole.lengths(some).sum()
    assert ids(store.view(some)) == ids(whole.view(some))
    assert store.holds(np.array([11, 2]))
    assert not store.holds(np.array([2, 4]))
    with pytest.raises(ValueError, match="got 2 rows that were not tokenised"):
        store.view(np.array([2, 4, 5]))


def test_a_federations_texts_are_tokenised_once(sentences, share, monkeypatch):
    federation = share(sentences, 9, 13)
    training = Training(batch=4, length=20, device="cpu")
    found = TorchTrainer.load(Model("tiny-bert"), LORA, training, federation, 3)
    calls = []
    tokenizer = type(found.frozen.words)
    original = tokenizer.__call__
    monkeypatch.setattr(tokenizer, "__call__", lambda self, *a, **k: calls.append(len(a[0])) or original(self, *a, **k))
    monkeypatch.setenv("FEDPEFT_CACHE", "/dev/null/nowhere")
    stores = {id(found.rows(client, "train").store) for client in (0, 1, 0)} | {id(found.rows(None, "test").store)}
    assert len(stores) == 1
    assert calls == [30]
    assert found.over(federation, training).rows(0, "train").store is found.store
    assert found.over(share(sentences.take(np.arange(20)), 7), training).rows(0, "train").store is not found.store
    shorter = found.over(federation, Training(batch=4, length=5, device="cpu"))
    assert shorter.rows(0, "train").lengths.max() == 5
    assert calls == [30, 20, 30]
