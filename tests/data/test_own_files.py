"""The user's own data: what is read from JSONL, CSV and datasets folders, and every error names file, line and key."""

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from fedpeft.data import Source, load
from fedpeft.data.files import read_csv, read_jsonl
from fedpeft.errors import ConfigError, DataError

POEMS = [
    {"text": "rose, red", "label": "pos", "client": "ann"},
    {"text": 'he said "no"', "label": "neg", "client": "bob"},
    {"text": "two\nlines, and été", "label": "pos", "client": "ann"},
]


def jsonl(folder: Path, rows: list[object], name: str = "x.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf8")
    return str(path)


def csv(folder: Path, text: str, encoding: str = "utf8") -> str:
    path = folder / "x.csv"
    path.write_bytes(text.encode(encoding))
    return str(path)


def saved(folder: Path, columns: dict[str, list[object]], **features: object) -> str:
    """A datasets folder of these columns; ``features`` are the types of those that can't be guessed."""
    datasets = importlib.import_module("datasets")
    data = datasets.Dataset.from_dict(columns)
    for name, feature in features.items():
        data = data.cast_column(name, feature)
    data.save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def poems(name: str) -> None:
    table = load(Source(name))
    assert (table.task, table.classes, table.labels.tolist()) == ("classify", ("neg", "pos"), [1, 0, 1])
    assert table.texts == tuple(row["text"] for row in POEMS)
    assert table.clients == ("ann", "bob", "ann")


def test_jsonl_is_read_as_it_is(tmp_path: Path) -> None:
    poems(jsonl(tmp_path, POEMS))


def test_csv_is_read_with_quotes_commas_and_line_breaks_in_values(tmp_path: Path) -> None:
    text = 'text,label,client\n"rose, red",pos,ann\r\n"he said ""no""",neg,bob\n\n"two\nlines, and été",pos,ann\n'
    poems(csv(tmp_path, text))
    poems(csv(tmp_path, text, "utf-8-sig"))


def test_a_datasets_folder_is_read_with_text_labels(tmp_path: Path) -> None:
    poems(saved(tmp_path, {key: [row[key] for row in POEMS] for key in POEMS[0]}))


def test_a_datasets_folder_keeps_the_names_and_order_of_its_class_labels(tmp_path: Path) -> None:
    from datasets import ClassLabel

    name = saved(
        tmp_path, {"text": list("abc"), "label": [2, 0, 2], "other": [1, 2, 3]}, label=ClassLabel(names=["z", "y", "x"])
    )
    table = load(Source(name))
    assert (table.classes, table.labels.tolist(), table.clients) == (("z", "y", "x"), [2, 0, 2], None)
    chosen = load(Source(name, classes=("x", "y", "z")))
    assert (chosen.classes, chosen.labels.tolist()) == (("x", "y", "z"), [0, 2, 0])


def test_a_datasets_folder_with_several_parts_is_read_by_the_name_of_one(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    parts = {"train": ["a", "b"], "late": ["c"]}
    data = DatasetDict({k: Dataset.from_dict({"prompt": v, "reply": v}) for k, v in parts.items()})
    data.save_to_disk(str(tmp_path / "saved"))
    assert load(Source(str(tmp_path / "saved"))).texts == ("a", "b")
    assert load(Source(str(tmp_path / "saved"), split="late")).replies == ("c",)
    with pytest.raises(ConfigError, match=r"data.split: .*saved has no 'test'; it has train, late"):
        load(Source(str(tmp_path / "saved"), split="test"))


def test_columns_go_by_the_names_that_the_settings_give(tmp_path: Path) -> None:
    name = jsonl(tmp_path, [{"body": "a", "topic": 10, "who": 1}, {"body": "b", "topic": 9, "who": 2}])
    table = load(Source(name, text="body", label="topic", client="who"))
    assert (table.texts, table.classes, table.labels.tolist()) == (("a", "b"), ("9", "10"), [1, 0])
    assert table.clients == ("1", "2")


def test_labels_of_all_sorts_get_names(tmp_path: Path) -> None:
    def classes(*labels: object) -> tuple[str, ...]:
        return load(Source(jsonl(tmp_path, [{"text": "a", "label": x} for x in labels]))).classes

    assert classes(True, False) == ("false", "true")
    assert classes(2.0, -3, 10) == ("-3", "2", "10")
    assert classes(" b", "b ", "a") == ("a", "b")
    assert classes("10", "9", "x") == ("10", "9", "x")


def test_prompts_and_replies_are_language_modelling(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "reply": "hello", "client": "u"}, {"prompt": "", "reply": "yo", "client": "v"}]
    table = load(Source(jsonl(tmp_path, rows)))
    assert (table.task, table.texts, table.replies, table.classes) == ("lm", ("hi", ""), ("hello", "yo"), ())
    assert table.clients == ("u", "v")
    plain = load(Source(jsonl(tmp_path, [{"text": "a"}, {"text": "b"}]), reply="text", prompt=""))
    assert (plain.task, plain.texts, plain.replies) == ("lm", ("", ""), ("a", "b"))


def test_the_task_can_be_said_where_columns_allow_several(tmp_path: Path) -> None:
    both = jsonl(tmp_path, [{"text": "a", "label": x, "prompt": "b", "reply": "c"} for x in "xy"])
    assert load(Source(both)).task == "classify"
    assert load(Source(both, task="lm")).replies == ("c", "c")
    rated = jsonl(tmp_path, [{"label": x, "prompt": "b", "reply": "c"} for x in "xy"], "rated.jsonl")
    assert load(Source(rated)).task == "lm"
    assert load(Source(rated, task="classify", text="prompt")).texts == ("b", "b")


def test_a_client_column_can_be_left_alone(tmp_path: Path) -> None:
    assert load(Source(jsonl(tmp_path, POEMS), client="")).clients is None


def test_a_column_of_ranks_is_read_where_it_is_asked_for_and_stays_with_its_rows(tmp_path: Path) -> None:
    rows: list[object] = [row | {"size": x} for row, x in zip(POEMS, (4, "16", 2.0), strict=True)]
    name = jsonl(tmp_path, rows)
    table = load(Source(name), "size")
    assert (table.ranks, load(Source(name)).ranks) == ((4, 16, 2), None)
    assert table.take(np.array([2, 0])).ranks == (2, 4)
    assert load(Source(name, only=("ann",)), "size").ranks == (4, 2)
    assert load(Source(csv(tmp_path, "text,label,r\na,x,3\nb,y,12\n")), "r").ranks == (3, 12)
    assert table.fingerprint != load(Source(name)).fingerprint
    with pytest.raises(ConfigError, match=r"ranks.column: no column 'rank' in .*x.jsonl; it has text, label, client"):
        load(Source(name), "rank")
    with pytest.raises(ConfigError, match=r"ranks.name: got 'column', and data.name 'wiki11' is a packaged set"):
        load(Source("wiki11"), "rank")


@pytest.mark.parametrize("value", [0, -2, "", "four", 2.5, True, None, "01"])
def test_what_is_no_rank_is_named_with_its_line(tmp_path: Path, value: object) -> None:
    rows: list[object] = [POEMS[0] | {"size": 4}, POEMS[1] | {"size": value}]
    with pytest.raises(DataError, match=r"x.jsonl, line 2, column 'size': got .*; want a rank, a whole number of at"):
        load(Source(jsonl(tmp_path, rows)), "size")


def test_a_folders_column_of_ranks_is_read(tmp_path: Path) -> None:
    name = saved(tmp_path, {"text": list("ab"), "label": ["x", "y"], "size": [2, 8]})
    assert load(Source(name), "size").ranks == (2, 8)


def test_classes_that_are_named_are_numbered_so_in_every_file(tmp_path: Path) -> None:
    table = load(Source(jsonl(tmp_path, POEMS[:1]), classes=("pos", "odd", "neg")))
    assert (table.classes, table.labels.tolist()) == (("pos", "odd", "neg"), [0])
    with pytest.raises(
        DataError, match=r"x.jsonl, line 2, column 'label': got 'neg'; want one of data.classes: pos, odd"
    ):
        load(Source(jsonl(tmp_path, POEMS), classes=("pos", "odd")))


def test_only_some_natural_clients_can_be_kept(tmp_path: Path) -> None:
    name = jsonl(tmp_path, POEMS)
    table = load(Source(name, only=("ann",)))
    assert (table.clients, table.labels.tolist()) == (("ann", "ann"), [1, 1])
    with pytest.raises(ConfigError, match=r"data.only: no client is called 'eve'; there are ann, bob"):
        load(Source(name, only=("ann", "eve")))
    with pytest.raises(ConfigError, match=r"data.only: the data set does not say whose row is whose"):
        load(Source(name, only=("ann",), client=""))


def test_loading_again_gives_the_same_table_until_the_file_changes(tmp_path: Path) -> None:
    name = jsonl(tmp_path, POEMS)
    first = load(Source(name, examples=2))
    assert load(Source(name, examples=3)) is first
    assert len(first) == 3
    assert load(Source(name, client="")) is not first
    jsonl(tmp_path, [*POEMS, {"text": "new", "label": "pos", "client": "cy"}])
    os.utime(name, ns=(1, 1))
    assert len(load(Source(name))) == 4


# Images.


def picture(path: Path, mode: str, size: tuple[int, int], colour: object) -> str:
    from PIL import Image

    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]  # a colour of that mode
    return path.name


def test_images_are_read_from_files_beside_the_one_that_names_them(tmp_path: Path) -> None:
    rows = [{"image": picture(tmp_path / f"{i}.png", "L", (5, 3), 40 * i), "label": i % 2} for i in range(3)]
    table = load(Source(jsonl(tmp_path, rows)))
    assert (table.task, table.pixels.shape, table.labels.tolist()) == ("image", (3, 3, 5), [0, 1, 0])
    assert table.pixels[:, 0, 0].tolist() == [0, 40, 80]


def test_one_image_of_colour_makes_all_colour(tmp_path: Path) -> None:
    rows = [
        {"image": picture(tmp_path / "a.png", "L", (2, 2), 9), "label": "x"},
        {"image": picture(tmp_path / "b.png", "RGB", (2, 2), (1, 2, 3)), "label": "y"},
    ]
    pixels = load(Source(jsonl(tmp_path, rows))).pixels
    assert pixels[:, 1, 1].tolist() == [[9, 9, 9], [1, 2, 3]]


def test_images_of_different_sizes_are_refused_unless_a_side_is_given(tmp_path: Path) -> None:
    rows = [
        {"image": picture(tmp_path / "a.png", "L", (5, 3), 9), "label": "x"},
        {"image": picture(tmp_path / "b.png", "L", (4, 3), 7), "label": "y"},
    ]
    name = jsonl(tmp_path, rows)
    with pytest.raises(
        DataError, match=r"line 2, column 'image': got an image of 4 x 3 pixels, the first has 5 x 3; .* data.side"
    ):
        load(Source(name))
    pixels = load(Source(name, side=6)).pixels
    assert (pixels.shape, pixels[:, 2, 2].tolist()) == ((2, 6, 6), [9, 7])


def test_images_in_a_datasets_folder_may_be_pictures_or_arrays(tmp_path: Path) -> None:
    from datasets import Image
    from PIL import Image as Pillow

    pictures = [Pillow.new("RGB", (4, 3), (i, 2, 3)) for i in range(2)]
    table = load(Source(saved(tmp_path, {"image": pictures, "label": [1, 0]}, image=Image())))
    assert (table.pixels.shape, table.pixels[:, 0, 0, 0].tolist()) == ((2, 3, 4, 3), [0, 1])
    grids = [[[i, 200, 3], [4, 5, 6]] for i in range(2)]
    (tmp_path / "more").mkdir()
    table = load(Source(saved(tmp_path / "more", {"image": grids, "label": [1, 0]})))
    assert np.array_equal(table.pixels, np.array(grids))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere.png", r"no such file .*nowhere.png"),
        ("x.jsonl", r".*x.jsonl can't be read as an image"),
        ([1, 2], "got no image; want a path, a picture, or whole numbers from 0 to 255"),
        ([[1, 256]], "got no image; want a path"),
        ([[-1, 2]], "got no image; want a path"),
        ([[1.5, 2.0]], "got no image; want a path"),
        ([[1], [2, 3]], "got no image; want a path"),
        ([], "got no image; want a path"),
        (None, "got no image; want a path"),
    ],
)
def test_values_that_are_no_images_are_named_by_place(tmp_path: Path, value: object, message: str) -> None:
    name = jsonl(tmp_path, [{"image": [[1]], "label": "x"}, {"image": value, "label": "y"}])
    with pytest.raises(DataError, match=rf"x.jsonl, line 2, column 'image': {message}"):
        load(Source(name))


def test_images_of_sixteen_bits_are_refused(tmp_path: Path) -> None:
    rows = [{"image": picture(tmp_path / "a.png", "I;16", (5, 3), 900), "label": "x"}]
    with pytest.raises(
        DataError, match="line 1, column 'image': got an image of mode I;16; want 8 bits for each colour"
    ):
        load(Source(jsonl(tmp_path, rows)))


def test_images_without_pillow_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"data.image: images need pillow; install fedpeft\[datasets\]"):
        load(Source(jsonl(tmp_path, [{"image": "a.png", "label": "x"}])))


# Errors.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"label": "topic"},
            "data.label: no column 'topic' in .*x.csv; it has text, label, client; "
            "name the label column with data.label, or for language modelling the columns data.prompt and data.reply",
        ),
        ({"text": "body"}, "data.text: no column 'body' in .*x.csv; it has text, label, client; name the text column"),
        ({"client": "who"}, "data.client: no column 'who' in .*x.csv; it has text, label, client; name the client"),
        ({"task": "image"}, "data.image: no column 'image' in .*x.csv"),
        ({"task": "lm"}, "data.reply: no column 'reply' in .*x.csv"),
        ({"task": "lm", "reply": "text"}, 'data.prompt: no column .*data.prompt, or set it to "" where there are no'),
        ({"task": "classify", "label": "q"}, "data.label: no column 'q' in .*x.csv"),
    ],
)
def test_a_missing_column_is_named_with_its_key_and_what_there_is(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    name = csv(tmp_path, "text,label,client\nhello,x,ann\nbye,y,bob\n")
    with pytest.raises(ConfigError, match=message):
        load(Source(name, **changes))  # type: ignore[arg-type]  # right by name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.csv: has no rows; want at least one"),
        ("text,label\n", "x.csv: has no rows"),
        ("text,label\n\nhello,a,b\n", "x.csv, line 3: got 3 values; want 2, as the header has"),
        ("text,label\nhello\n", "x.csv, line 2: got 1 values; want 2"),
        ("text,text\nhello,a\n", r"x.csv, line 1: got the header \['text', 'text'\]; want a different name"),
        ("text,\nhello,a\n", "x.csv, line 1: got the header .*; want a different name for each column"),
        ('text,label\n"hello\nyou",a\n"bye,b\n', "x.csv, line 4: is not CSV: unexpected end of data"),
        ('text,label\n"hello"x,a\n', "x.csv, line 2: is not CSV"),
        ('text,label\n"a\nb",x\n ,y\n', "x.csv, line 4, column 'text': is empty; want text: fill it in or leave"),
        ("text,label\nhello,\n", "x.csv, line 2, column 'label': got ''; want text or a whole number"),
        ("text,label\nhello,a\nbye,a\n", "x.csv, column 'label': all labels are 'a'; want at least 2 classes"),
        ("text,label,client\nhello,a,\nbye,b,\n", "x.csv, line 2, column 'client': got ''; want text or a whole"),
    ],
)
def test_a_bad_csv_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(Source(csv(tmp_path, text)))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "x.jsonl: has no rows; want at least one"),
        ("\n\n{", "x.jsonl, line 3: is not JSON: Expecting property name"),
        ("[1, 2]", r"x.jsonl, line 1: got \[1, 2\]; want an object such as"),
        ("[" * 100_000, "x.jsonl, line 1: is not JSON"),
        ('{"text": "a", "label": "x"}\n\n{"text": "b"}', "line 3, column 'label': got nothing; want text or a whole"),
        ('{"text": "a", "label": 1.5}', "line 1, column 'label': got 1.5; want text or a whole number"),
        ('{"text": "a", "label": NaN}', "line 1, column 'label': got nan; want text or a whole number"),
        ('{"text": "a", "label": [1]}', r"line 1, column 'label': got \[1\]; want text or a whole number"),
        ('{"text": 3, "label": "x"}', "line 1, column 'text': got 3; want text"),
        ('{"text": null, "label": "x"}\n{"text": "b", "label": "y"}', "line 1, column 'text': got nothing; want text"),
        ('{"prompt": "a", "reply": " "}', "line 1, column 'reply': is empty; want text"),
        ('{"prompt": 1, "reply": "b"}', "line 1, column 'prompt': got 1; want text"),
        (
            '{"text": ' + str(["long"] * 50).replace("'", '"') + ', "label": "x"}',
            r"got \['long', .{40,55}\.\.\.; want text$",
        ),
        ('{"text": "a\\ud800", "label": "x"}', "line 1, column 'text': got half a character; want text"),
    ],
)
def test_a_bad_jsonl_file_is_named_with_its_line(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf8")
    with pytest.raises(DataError, match=message):
        load(Source(str(tmp_path / "x.jsonl")))


def test_a_class_number_without_a_name_is_refused(tmp_path: Path) -> None:
    from datasets import ClassLabel

    name = saved(tmp_path, {"text": list("abc"), "label": [1, 0, -1]}, label=ClassLabel(names=["z", "y"]))
    with pytest.raises(DataError, match="saved, row 2, column 'label': got -1; want a class number from 0 to 1"):
        load(Source(name))


def test_a_file_that_is_not_utf8_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x.csv: is not UTF-8 text: .*; want it saved as UTF-8"):
        load(Source(csv(tmp_path, "text,label\nété,a\n", "latin1")))


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    for name in ("x.jsonl", "folder/x"):
        with pytest.raises(DataError, match=rf"{name}: no such file or folder \(data.name\); want"):
            load(Source(str(tmp_path / name)))


def test_a_file_that_goes_away_while_it_is_opened_says_so(tmp_path: Path) -> None:
    for read in (read_jsonl, read_csv):
        with pytest.raises(DataError, match="gone: can't be read: No such file or directory"):
            read(tmp_path / "gone")


def test_a_file_of_another_kind_says_which_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("text\tlabel\n")
    with pytest.raises(DataError, match=r"x.tsv: got a file ending in '.tsv' \(data.name\); want .jsonl .*, .csv"):
        load(Source(str(tmp_path / "x.tsv")))


def test_a_name_that_is_unknown_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"data.name: got 'wiki12'; want one of chitchat, debian, .*, wordnet, or the path"
    ):
        load(Source("wiki12"))


def test_a_folder_that_datasets_did_not_save_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no datasets folder .*; want one made with save_to_disk"):
        load(Source(str(tmp_path)))
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="can't be read as a datasets folder"):
        load(Source(str(tmp_path)))


def test_a_folder_without_the_datasets_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"data.name: .* needs the datasets package; install fedpeft\[datasets\]"):
        load(Source(str(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "name: got ''; want some text"),
        ({"text": ""}, "text: got ''; want some text"),
        ({"split": ""}, "split: got ''; want some text"),
        ({"examples": 0}, "examples: got 0; want at least 1"),
        ({"side": 0}, "side: got 0; want at least 1"),
        ({"classes": ("a",)}, "classes: got a; want at least 2, all different"),
        ({"classes": ("a", "b", "a")}, "classes: got a, b, a; want at least 2, all different"),
    ],
)
def test_settings_that_mean_nothing_are_refused_when_made(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Source(**({"name": "wiki11"} | fields))  # type: ignore[arg-type]  # wrong on purpose
