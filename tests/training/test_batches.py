"""Rows become tokens and pixels faithfully, and each is in one batch of an epoch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.data import Table, by_length, order
from fedpeft.errors import ConfigError
from fedpeft.training.bases import load_base
from fedpeft.training.batches import collate, normalised
from fedpeft.training.devices import choose
from fedpeft.training.pixels import Pixels
from fedpeft.training.settings import Model
from fedpeft.training.tokens import encode

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bert():
    return load_base(Model("tiny-bert"), "classify", ("a", "b", "c"), 0, choose("cpu"))


@pytest.fixture(scope="module")
def llama():
    return load_base(Model("tiny-llama"), "lm", (), 0, choose("cpu"))


@pytest.fixture(scope="module")
def vit():
    return load_base(Model("tiny-vit"), "image", ("a", "b", "c"), 0, choose("cpu"))


@given(n=st.integers(1, 200), batch=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_an_epoch_has_each_row_once_in_batches_that_are_full_but_for_pools_ends(n, batch, seed):
    lengths = np.random.default_rng(seed).integers(1, 40, n)
    batches = order(lengths, batch, np.random.default_rng(seed))
    assert sorted(np.concatenate(batches)) == list(range(n))
    assert len(batches) == -(-n // batch)
    again = order(lengths, batch, np.random.default_rng(seed))
    assert all(np.array_equal(x, y) for x, y in zip(batches, again, strict=True))


def test_another_seed_and_another_epoch_give_another_order():
    lengths, rng = np.full(40, 7), np.random.default_rng(1)
    first, second = order(lengths, 4, rng), order(lengths, 4, rng)
    other = order(lengths, 4, np.random.default_rng(2))
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))
    assert not np.array_equal(np.concatenate(first), np.concatenate(other))


def test_batches_of_like_length_need_little_padding_and_come_in_random_order():
    lengths = np.random.default_rng(0).integers(1, 100, 800)
    batches = order(lengths, 10, np.random.default_rng(3))
    longest = np.array([lengths[x].max() for x in batches])
    padded = sum(longest) * 10
    assert 1 - lengths.sum() / padded < 0.08  # in random batches of 10, about half is padding
    assert np.count_nonzero(np.diff(longest) < 0) > 20  # sorted batches would never get shorter within a pool


def test_evaluation_goes_by_length():
    batches = by_length(np.array([5, 1, 4, 2, 3]), 2)
    assert [x.tolist() for x in batches] == [[1, 3], [4, 2], [0]]


def test_a_classifiers_batch_is_padded_and_masked_to_its_longest_row(bert):
    rows = encode(Table("classify", ("ab", "c", ""), np.array([2, 0, 1]), ("a", "b", "c")), bert, 16)
    batch = collate(rows, np.array([1, 0]), bert, None, CPU)
    a, b, c = bert.words("abc", add_special_tokens=False)["input_ids"]
    assert batch.inputs["input_ids"].tolist() == [[2, c, 3, 0], [2, a, b, 3]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.targets.tolist() == [0, 2]
    assert batch.units == 2


def test_a_text_is_cut_to_the_length(bert):
    rows = encode(Table("classify", ("a" * 50,), np.array([0]), ("a", "b", "c")), bert, 10)
    assert rows.lengths.tolist() == [10]


def replied(base, rows, index):
    batch = collate(rows, np.array(index), base, None, CPU)
    return batch, base.words.decode(batch.targets)


def test_the_targets_of_a_dialogue_are_the_reply_and_its_end_and_nothing_of_the_prompt(llama):
    rows = encode(Table("lm", ("hi you", "say"), ("yes!", "ab c")), llama, 64)
    assert llama.words.decode(rows.store.row(0)) == "<user>hi you</s><bot>yes!</s>"
    batch, text = replied(llama, rows, [1, 0])
    assert text == "ab c</s>yes!</s>"
    assert batch.units == 10
    after = torch.roll(batch.inputs["input_ids"], -1, dims=1)[batch.where]
    assert torch.equal(after, batch.targets), "a target is the token after its position"


def test_truncation_keeps_a_replys_start_and_drops_and_counts_rows_whose_reply_is_gone(llama):
    table = Table("lm", ("a" * 5, "b" * 40, "c" * 5), ("reply", "reply", "abcdefghij"))
    rows = encode(table, llama, 14)
    assert rows.dropped == 1
    assert len(rows) == 2
    assert rows.lengths.tolist() == [14, 14]
    assert replied(llama, rows, [0])[1] == "reply</s>"
    assert replied(llama, rows, [1])[1] == "abcdef"
    at_the_edge = encode(Table("lm", ("a" * 5,), ("reply",)), llama, 8)  # <user>aaaaa</s><bot> has 8 tokens
    assert (len(at_the_edge), at_the_edge.dropped) == (0, 1)
    assert replied(llama, encode(Table("lm", ("a" * 5,), ("reply",)), llama, 9), [0])[1] == "r"


def test_without_a_chat_template_prompt_and_reply_are_a_line_each(llama):
    words = type(llama.words)(
        tokenizer_object=llama.words.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    plain = replace(llama, tokenizer=words)
    rows = encode(Table("lm", ("hi",), ("yes",)), plain, 64)
    assert words.decode(rows.store.row(0)) == "<s>hi\nyes</s>"
    assert replied(plain, rows, [0])[1] == "yes</s>"


def test_plain_text_has_no_prompt_and_all_of_it_is_predicted(llama):
    rows = encode(Table("lm", ("",), ("some text",)), llama, 64)
    assert llama.words.decode(rows.store.row(0)) == "<s>some text</s>"
    assert replied(llama, rows, [0])[1] == "some text</s>"


def test_a_template_that_changes_what_stands_before_the_reply_is_refused(llama, monkeypatch):
    monkeypatch.setattr(
        llama.words, "chat_template", "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match="the chat template does not put the reply right after its generation prompt"):
        encode(Table("lm", ("hi",), ("yes",)), llama, 64)


def test_no_rows_are_no_rows(bert, llama, vit):
    empty = np.zeros(0, np.int64)
    assert len(encode(Table("classify", (), empty, ("a", "b", "c")), bert, 8)) == 0
    assert len(encode(Table("lm", (), ()), llama, 8)) == 0
    assert len(encode(Table("image", np.zeros((0, 5, 5), np.uint8), empty, ("a", "b", "c")), vit, 8)) == 0


def test_a_table_of_another_task_is_refused(bert):
    with pytest.raises(ValueError, match="the table is for lm; want one for classify"):
        encode(Table("lm", ("a",), ("b",)), bert, 8)


def test_grey_pixels_are_scaled_normalised_and_repeated_for_each_channel():
    pixels = Pixels(size=6, patch=3, fixed=6, mean=(0.5, 0.25, 0.0), deviation=(0.5, 0.25, 2.0))
    x = normalised(torch.full((2, 4, 4), 51, dtype=torch.uint8)[:, None], 6, pixels)
    assert x.shape == (2, 3, 6, 6)
    # 51 / 255 = 0.2: (0.2 − 0.5) / 0.5, (0.2 − 0.25) / 0.25, 0.2 / 2
    torch.testing.assert_close(x[1, :, 5, 0], torch.tensor([-0.6, -0.2, 0.1]))


def test_colours_keep_their_order_and_images_their_way_up(vit):
    images = np.zeros((1, 28, 28, 3), np.uint8)
    images[0, :14, :, 0] = 255  # red above
    images[0, 14:, :, 2] = 255  # blue below
    rows = encode(Table("image", images, np.array([1]), ("a", "b", "c")), vit, 8)
    batch = collate(rows, np.array([0]), vit, None, CPU)
    x = batch.inputs["pixel_values"]
    assert x[0, :, 0, 0].tolist() == [1, -1, -1]
    assert x[0, :, 27, 0].tolist() == [-1, -1, 1]
    assert "interpolate_pos_encoding" not in batch.inputs
    assert batch.targets.tolist() == [1]


def test_a_model_is_told_of_another_image_size(vit):
    rows = encode(Table("image", np.zeros((1, 9, 9), np.uint8), np.array([1]), ("a", "b", "c")), vit, 8)
    batch = collate(rows, np.array([0]), vit, 35, CPU)
    assert batch.inputs["interpolate_pos_encoding"] is True
    with torch.no_grad():
        assert vit.model(**batch.inputs).logits.shape == (1, 3)
