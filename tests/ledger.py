"""What is known of the core's mutants: the test that killed each, and for which bytes of the core they all died.

``mutants.json`` is a record of two things. *Killers* are hints: the test that failed when a mutant was last tried is
tried first the next time, and a hint that is wrong costs time and nothing else. The *digest* is of everything that a
death depends on (the core, its tests, what makes and tries the mutants, the packages that compute); it is written
only where every mutant died, and while it stays the same, they need not all be tried again.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
LETTERS = 8  # of a mutant's key


@dataclass(frozen=True, slots=True)
class Ledger:
    """The digest under which every mutant died, "" if they didn't, and killers: file -> mutant's key -> test's id."""

    digest: str
    killers: Mapping[str, Mapping[str, str]]

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        """What was written; nothing is known where the file is not there, or is no ledger."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            killers = {
                f: {k: t for t, keys in tests.items() for k in keys.split()} for f, tests in found["files"].items()
            }
            return cls(str(found["digest"]), killers)
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return cls("", {})

    def write(self, path: Path) -> None:
        """A line for each test and file, sorted, so that a change of one file is a change of few lines."""
        files: dict[str, dict[str, list[str]]] = {}
        for file, killers in sorted(self.killers.items()):
            tests = files.setdefault(file, {})
            for key, test in sorted(killers.items(), key=lambda x: (x[1], x[0])):
                tests.setdefault(test, []).append(key)
        lines = {f: {t: " ".join(keys) for t, keys in tests.items()} for f, tests in files.items()}
        text = json.dumps({"digest": self.digest, "files": lines}, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")

    def killer(self, file: str, key: str) -> str:
        """The id of the test that killed a mutant when it was last tried; "" if none is known."""
        return self.killers.get(file, {}).get(key, "")

    def after(
        self, digest: str, found: Mapping[str, Mapping[str, str]], files: Iterable[str], whole: bool, alive: int
    ) -> "Ledger":
        """The ledger once mutants were tried. found: killers of all mutants of the files that were tried as a whole.

        digest: of what they were tried on; files: all there are; whole: whether each mutant of each was tried;
        alive: how many lived. The digest is taken only from a whole try that none outlived, and given up where one did.
        """
        killers = {f: found.get(f, self.killers.get(f, {})) for f in files}
        if alive:
            return Ledger("", killers)
        return Ledger(digest if whole else self.digest, killers)


def keys(mutants: Sequence[tuple[str, str]]) -> list[str]:
    """A short name for each (function, change) of one file that does not depend on the lines before it.

    Equal ones are told apart by their order.
    """
    seen: dict[tuple[str, str], int] = {}
    out = []
    for function, change in mutants:
        nth = seen[function, change] = seen.get((function, change), 0) + 1
        out.append(hashlib.sha256(f"{function}\0{change}\0{nth}".encode()).hexdigest()[:LETTERS])
    return out


def digest(folder: Path, facts: Iterable[str]) -> str:
    """The SHA-256 of all files of a folder, their names and bytes, and of facts such as versions."""
    total = hashlib.sha256()
    for path in sorted(x for x in folder.rglob("*") if x.is_file() and "__pycache__" not in x.parts):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    for fact in facts:
        total.update(f"{fact}\n".encode())
    return total.hexdigest()


def sample(tasks: Sequence[T], count: int, seed: str) -> list[T]:
    """So many of them, the same for the same seed, in their order; all where there are no more."""
    chosen = random.Random(seed).sample(range(len(tasks)), min(count, len(tasks)))
    return [tasks[i] for i in sorted(chosen)]
