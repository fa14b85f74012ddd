"""Tables: what they refuse, what a choice of rows keeps, and a fingerprint that sees everything."""

import numpy as np
import pytest

from fedpeft.data import Table


def texts(**changes: object) -> Table:
    fields: dict[str, object] = {
        "task": "classify",
        "inputs": ("one", "two", "three", "two"),
        "targets": np.array([0, 2, 1, 1]),
        "classes": ("x", "y", "z"),
        "clients": ("ann", "bob", "ann", "cy"),
    }
    return Table(**(fields | changes))  # type: ignore[arg-type]  # the fields are right by name


def images(shape: tuple[int, ...] = (3, 4, 5)) -> Table:
    pixels = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
    return Table("image", pixels, np.array([0, 1, 1]), ("x", "y"))


def talk() -> Table:
    return Table("lm", ("hi", "hi", "", "hi"), ("hello", "yo", "hello", "hello"))


def test_taking_rows_keeps_their_order_and_all_their_columns() -> None:
    taken = texts().take(np.array([3, 0, 3]))
    assert (taken.texts, taken.labels.tolist(), taken.clients) == (
        ("two", "one", "two"),
        [1, 0, 1],
        ("cy", "ann", "cy"),
    )
    assert (len(taken), taken.classes, taken.task) == (3, ("x", "y", "z"), "classify")
    picture = images().take(np.array([2]))
    assert np.array_equal(picture.pixels, images().pixels[2:])
    assert talk().take(np.array([1, 2])).replies == ("yo", "hello")


def test_taking_no_rows_gives_an_empty_table_of_the_same_kind() -> None:
    for table in (texts(), images(), talk()):
        empty = table.take(np.array([], np.int64))
        assert (len(empty), empty.task, empty.classes) == (0, table.task, table.classes)


def test_equal_rows_are_those_with_the_same_input_or_for_lm_the_same_prompt_and_reply() -> None:
    assert texts().distinct().tolist() == [0, 1, 2]
    assert talk().distinct().tolist() == [0, 1, 2]
    twice = images().take(np.array([1, 0, 1, 2]))
    assert twice.distinct().tolist() == [0, 1, 3]


def test_the_histogram_counts_every_class_even_unseen_ones() -> None:
    assert texts(targets=np.array([0, 2, 2, 2])).histogram() == (1, 0, 3)
    assert talk().histogram() == ()


def test_the_fingerprint_is_the_same_for_equal_content_and_differs_for_any_other() -> None:
    tables = [
        texts(),
        texts(inputs=("one", "two", "three", "twO")),
        texts(inputs=("on", "etwo", "three", "two")),
        texts(targets=np.array([0, 2, 1, 0])),
        texts(classes=("x", "y", "q")),
        texts(clients=("ann", "bob", "ann", "bob")),
        texts(clients=None),
        images(),
        images((3, 5, 4)),
        talk(),
        Table("lm", talk().replies, talk().texts),
    ]
    prints = [table.fingerprint for table in tables]
    assert len(set(prints)) == len(tables)
    assert prints[0] == texts(inputs=list(texts().texts)).fingerprint
    strided = Table("image", np.asfortranarray(images().pixels), images().labels, ("x", "y"))
    assert strided.fingerprint == images().fingerprint


def test_the_fingerprint_is_pinned_so_that_it_means_the_same_in_every_process_and_version() -> None:
    assert texts().fingerprint == "c058bed6c78a5e0cc872ce001f2e2025ee7bc8ae38957a26a0766a6d010cd761"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ("one",)}, "got 1 inputs, 4 targets, 4 clients; want as many of each"),
        ({"clients": ("ann",)}, "got 4 inputs, 4 targets, 1 clients; want as many of each"),
        ({"task": "image"}, "got tuple inputs for image; want pixels for image, else texts"),
        ({"task": "lm"}, "got ndarray targets for lm; want texts for lm, else an array"),
        ({"targets": ("a", "b", "c", "d")}, "got tuple targets for classify; want texts for lm, else an array"),
        ({"targets": np.zeros(4)}, r"got float64 targets of shape \(4,\); want int64"),
        ({"targets": np.zeros((4, 1), np.int64)}, r"got int64 targets of shape \(4, 1\); want int64"),
        ({"targets": np.array([0, 1, 2, 3])}, "got class numbers 0 to 3; want 0 to 2"),
        ({"targets": np.array([0, -1, 2, 1])}, "got class numbers -1 to 2; want 0 to 2"),
        ({"task": "lm", "targets": ("a", "b", "c", "d")}, "got 3 classes for lm; want none"),
        ({"inputs": np.zeros((4, 2, 2), np.uint8)}, "got ndarray inputs for classify"),
    ],
)
def test_a_table_refuses_columns_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        texts(**change)


@pytest.mark.parametrize("pixels", [np.zeros((3, 4, 5)), np.zeros((3, 4), np.uint8), np.zeros((3, 4, 5, 4), np.uint8)])
def test_a_table_refuses_pixels_of_another_type_or_shape(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"want uint8, \(N, H, W\) or \(N, H, W, 3\)"):
        Table("image", pixels, np.array([0, 1, 1]), ("x", "y"))


def test_colour_images_are_fine() -> None:
    assert images((3, 4, 5, 3)).pixels.shape == (3, 4, 5, 3)


def test_asking_for_the_wrong_kind_of_column_is_an_error_that_says_so() -> None:
    for table, column in ((images(), "texts"), (texts(), "pixels"), (talk(), "labels"), (texts(), "replies")):
        with pytest.raises(ValueError, match="got a table of"):
            getattr(table, column)
