"""Break the core one small piece at a time; every break must fail a test.

    python tests/mutants.py [--all] [part of a path ...]

Each expression and statement of rules/, adapters/ and channel/ is changed in turn (``mutations.py``): operators and
comparisons swapped, constants moved, operands, arguments, conditions and statements left out. Prints each survivor;
the exit code is the number of survivors.

``mutants.json`` beside this file, which is to be committed, says which test killed each mutant the last time
(``ledger.py``). That test is tried first and settles most of them at once: it is run on the mutant itself each time,
so a ledger that is out of date costs time, but hides no survivor. Only where the core, its tests, these scripts, Python
and the packages that compute are byte for byte those that every mutant died with, all but a sample of 100 is taken as
dead; it is another sample each day (UTC). ``--all`` tries each as if there were no ledger; parts of paths try all the
mutants of those files. The ledger is written anew after each run that found something.

Works on a copy in a temporary folder. A change within a function is tried in a fork of one process that has the tests
loaded, on the test that killed it before, else on just the tests that call that function; what survives, and a change
outside functions that no known test kills, is tried once more in a fork that loads everything anew and runs all tests.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from ledger import Ledger, digest, keys, sample
from mutations import mutants
from trials import TESTS, killers_of

ROOT = Path(__file__).resolve().parents[1]
LEDGER = ROOT / "tests" / "mutants.json"
ROOMS = ("adapters", "rules", "channel")
SCRIPTS = ("mutants.py", "mutations.py", "trials.py", "ledger.py")
COMPUTES = ("numpy", "hypothesis", "pytest", "cryptography", "zstandard")
SAMPLE = 100

EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "Pool.direction",
        "np.random.PCG64(seed).random_raw(-(-size // 64)).astype('<u8')  →  np.random.PCG64(seed).random_raw(-(-size // 64))",  # noqa: E501
    ): "the order of bytes here",
    ("Pool.direction", "-size // 64  →  -size"): "more bits than are taken",
    ("Pool.direction", "64  →  63"): "more bits than are taken",
    ("Pool.direction", "'<u8'  →  'u8'"): "the order of bytes here",
    ("Pool.moved", "np.flatnonzero(moves).tolist()  →  np.flatnonzero(moves)"): "an index either way",
    (
        "Pool.moved",
        "float(moves[number]) * self.direction(number, now.size)  →  float(moves[number]) / self.direction(number, now.size)",  # noqa: E501
    ): "by plus or minus one",
    ("Pool.moved", "float(moves[number])  →  moves[number]"): "the same number",
    (
        "walked",
        "np.result_type(np.float32, *kinds)  →  np.result_type(*kinds, np.float32)",
    ): "the order makes no difference",
    ("retraced", "fixed[_SEED].tolist()  →  fixed[_SEED]"): "an index either way",
    (
        "FedKSeed.encode",
        "same(update.received, update.trained)  →  same(update.trained, update.received)",
    ): "who equals whom is the same",
    (
        "LoRAA2.is_for",
        "np.array_equal(sent.task.shared['rank'], [min(rank, _most(sent.task.spec))])  →  "
        "np.array_equal([min(rank, _most(sent.task.spec))], sent.task.shared['rank'])",
    ): "who equals whom is the same",
    ("Coding.encode", "np.packbits(rows).tobytes()  →  np.packbits(rows)"): "join takes arrays, types don't",
    ("Coding.encode", "np.packbits(columns).tobytes()  →  np.packbits(columns)"): "join takes arrays, types don't",
    ("Sign.encode", "(x >= 0).astype(np.uint8)  →  x >= 0"): "a shifted bool is a uint8, for types it isn't",
    ("LowRank.rank", "int(self.a.shape[0])  →  self.a.shape[0]"): "a shape holds ints: int() is for the type checker",
    ("PlainChannel.up", "length > self.clip  →  length >= self.clip"): "at equality the vector is scaled by 1",
    ("Ravan.sizes", "gcd(self.heads, layer.rank)  →  gcd(layer.rank, self.heads)"): "the order makes no difference",
}
"""(function, change) of changes that make no difference, and why."""


def copied(folder: Path) -> None:
    """Everything that a mutant's death depends on, in a folder of its own."""
    without = shutil.ignore_patterns("__pycache__")
    for room in (*ROOMS, "rounds", "secagg", "testing"):
        shutil.copytree(ROOT / "fedpeft" / room, folder / "fedpeft" / room, ignore=without)
    for name in ("fedpeft/__init__.py", "fedpeft/errors.py"):
        shutil.copy(ROOT / name, folder / name)
    for part in TESTS:
        shutil.copytree(ROOT / "tests" / part, folder / "tests" / part, ignore=without)
    for name in SCRIPTS:
        shutil.copy(ROOT / "tests" / name, folder / "tests" / name)


def facts(options: object) -> Iterator[str]:
    """What else a death depends on: Python, packages and pytest's own options."""
    yield ".".join(platform.python_version_tuple()[:2])
    yield from (f"{name} {version(name)}" for name in COMPUTES)
    yield json.dumps(options, sort_keys=True)


def main(only: Sequence[str], forget: bool = False) -> int:
    """The number of survivors; forget: as if there were no ledger."""
    begun = time.perf_counter()
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        copied(copy)
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
        now = digest(copy, facts(settings))
        shutil.copy(ROOT / "pyproject.toml", copy / "pyproject.toml")
        os.chdir(copy)
        sys.dont_write_bytecode = False  # into the copy, so that forks need not compile everything again
        sys.path.insert(0, str(copy))
        ledger = Ledger.read(LEDGER)
        paths = {str(p.relative_to(copy)): p for room in ROOMS for p in sorted((copy / "fedpeft" / room).glob("*.py"))}
        chosen = [name for name in paths if not only or any(part in name for part in only)]
        known, tasks = 0, []
        for name in chosen:
            found = list(mutants(paths[name]))
            named = zip(keys([(m.function, m.change) for m in found]), found, strict=True)
            these = [(name, key, m) for key, m in named if (m.function, m.change) not in EQUIVALENT]
            known += len(found) - len(these)
            tasks += these
        total, is_sample = len(tasks), ledger.digest == now and not only and not forget
        if is_sample:
            tasks = sample(tasks, SAMPLE, day)
        hints = ["" if forget else ledger.killer(name, key) for name, key, _ in tasks]
        killers = killers_of([m for _, _, m in tasks], hints)
        if killers is None:
            return 255
        alive = [m for (_, _, m), killer in zip(tasks, killers, strict=True) if not killer]
        for m in sorted(alive, key=lambda m: (m.path, m.line)):
            print(f"SURVIVED {m.path.relative_to(copy)}:{m.line} {m.function}: {m.change}")
        settled = sum(x == y != "" for x, y in zip(killers, hints, strict=True))
        print(
            f"{len(tasks) - len(alive)} of {len(tasks)} mutants killed in {time.perf_counter() - begun:.0f} s, "
            f"{settled} by the test that did last time; {known} more make no difference"
        )
        if is_sample:
            print(f"nothing has changed that they depend on since all {total} died: these are the sample of {day}")
        found_now: dict[str, dict[str, str]] = {} if is_sample else {name: {} for name in chosen}
        for (name, key, _), killer in zip(tasks, killers, strict=True):
            if killer and not is_sample:
                found_now[name][key] = killer
        after = ledger.after(now, found_now, paths, not only and not is_sample, len(alive))
        if after != ledger:
            after.write(LEDGER)
            print(f"{LEDGER.relative_to(ROOT)} is new: commit it")
        return len(alive)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Break the core one small piece at a time; every break must fail a test."
    )
    parser.add_argument("parts", nargs="*", help="parts of paths: all the mutants of those files")
    parser.add_argument("--all", action="store_true", help="try every mutant as if there were no ledger")
    given = parser.parse_args()
    sys.exit(min(main(given.parts, given.all), 254))
