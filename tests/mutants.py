"""Break the core one small piece at a time; every break must fail a test.

    python tests/mutants.py [part of a path ...]

Each expression and statement of rules/, adapters/ and channel/ is changed in turn (``mutations.py``): operators and
comparisons swapped, constants moved, operands, arguments, conditions and statements left out. Prints each survivor;
the exit code is the number of survivors.

Works on a copy in a temporary folder. A change within a function is tried in a fork of one process that has all tests
loaded, on just the tests that call that function; what survives, and a change outside functions, is tried once more
in a fork that loads everything anew and runs all tests.
"""

import ast
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, FrameType, FunctionType

import hypothesis  # noqa: F401  (loaded once, before the forks)
import numpy.testing  # noqa: F401
import pytest
from _pytest.runner import runtestprotocol
from mutations import Mutant, mutants

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("adapters", "rules", "channel")
TESTS = ("adapters", "channel", "rules", "oracles", "laws", "rounds")
WORKERS = 2
BROKEN = 3  # a fork's exit code when it is this script that failed
SECONDS = 60  # of computing for one mutant; one that hangs is killed

EQUIVALENT: dict[tuple[str, str], str] = {
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


def in_forks(tasks: Sequence[Mutant], survives: Callable[[Mutant], bool]) -> list[Mutant]:
    """The mutants that survive, each tried in a fork of this process; one that computes for too long dies."""
    running: dict[int, Mutant] = {}
    alive: list[Mutant] = []
    waiting = list(reversed(tasks))
    sys.stdout.flush()
    while waiting or running:
        while waiting and len(running) < WORKERS:
            mutant = waiting.pop()
            if not (child := os.fork()):
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
                try:
                    os._exit(0 if survives(mutant) else 1)
                finally:
                    os._exit(BROKEN)
            running[child] = mutant
        child, status = os.wait()
        mutant = running.pop(child)
        if status == 0:
            alive.append(mutant)
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status) == BROKEN:
            raise RuntimeError(f"could not try {mutant.path}:{mutant.line} {mutant.function}: {mutant.change}")
    return alive


def code_of(module: CodeType, function: str) -> CodeType:
    """A function's code, by its qualified name."""
    code = module
    for part in function.split("."):
        code = next(x for x in code.co_consts if isinstance(x, CodeType) and x.co_name == part)
    return code


def function_of(path: Path, function: str) -> FunctionType:
    """The live function, by its module's path and its qualified name."""
    value: object = sys.modules[module_of(path)]
    for part in function.split("."):
        value = vars(value)[part]
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    value = getattr(value, "__wrapped__", value)  # behind a cache
    assert isinstance(value, FunctionType), (path, function)
    return value


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts[path.parts.index("fedpeft") :]).removesuffix(".__init__")


class InOneProcess:
    """A pytest plugin: runs the tests once, then the mutants of functions on the tests that call them."""

    def __init__(self, tasks: Sequence[Mutant]) -> None:
        self.tasks = tasks
        self.alive: list[Mutant] | None = None

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        seconds: dict[pytest.Item, float] = {}
        calls: dict[tuple[str, str], set[pytest.Item]] = {}
        for item in session.items:

            def note(frame: FrameType, event: str, _: object, item: pytest.Item = item) -> None:
                code = frame.f_code
                if event == "call" and "/fedpeft/" in code.co_filename:
                    calls.setdefault((code.co_filename, code.co_qualname.split(".<locals>")[0]), set()).add(item)

            begun = time.perf_counter()
            sys.setprofile(note)
            passed = run(item)
            sys.setprofile(None)
            seconds[item] = time.perf_counter() - begun
            if not passed:
                print(f"the tests must pass before anything is broken: {item.nodeid} fails")
                return True

        def survives(mutant: Mutant) -> bool:
            function_of(mutant.path, mutant.function).__code__ = code_of(mutant.code(), mutant.function)
            tests = calls.get((str(mutant.path), mutant.function), ())
            return all(run(item) for item in sorted(tests, key=lambda x: seconds[x]))

        if not in_forks(self.tasks[:1], lambda _: all(run(item) for item in session.items)):
            print("the tests must pass in a fork before anything is broken")
            return True
        self.alive = in_forks(self.tasks, survives)
        return True


def run(item: pytest.Item) -> bool:
    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))


class Changed:
    """An import hook that gives one module a mutant's code."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != module_of(self.mutant.path):
            return None
        code = self.mutant.code()

        class Loader(SourceFileLoader):
            def get_code(self, fullname: str) -> CodeType:
                return code

        return importlib.util.spec_from_file_location(
            name, self.mutant.path, loader=Loader(name, str(self.mutant.path))
        )


def main(only: Sequence[str]) -> int:
    """The number of survivors."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for room in (*ROOMS, "rounds", "secagg", "testing"):
            shutil.copytree(
                ROOT / "fedpeft" / room, copy / "fedpeft" / room, ignore=shutil.ignore_patterns("__pycache__")
            )
        for name in ("fedpeft/__init__.py", "fedpeft/errors.py", "pyproject.toml"):
            shutil.copy(ROOT / name, copy / name)
        for part in TESTS:
            shutil.copytree(ROOT / "tests" / part, copy / "tests" / part, ignore=shutil.ignore_patterns("__pycache__"))
        os.chdir(copy)
        sys.dont_write_bytecode = False  # into the copy, so that forks need not compile everything again
        sys.path.insert(0, str(copy))
        paths = [p for room in ROOMS for p in sorted((copy / "fedpeft" / room).glob("*.py"))]
        if only:
            paths = [p for p in paths if any(part in str(p.relative_to(copy)) for part in only)]
        found = [m for p in paths for m in mutants(p)]
        known = [m for m in found if (m.function, m.change) in EQUIVALENT]
        tasks = [m for m in found if m not in known]
        begun = time.perf_counter()
        options = [f"tests/{part}" for part in TESTS] + ["-p", "no:cacheprovider", "-x"]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # for what is loaded before the forks

        inner, outer = [m for m in tasks if m.function], [m for m in tasks if not m.function]
        result = copy / "alive.json"
        if not (child := os.fork()):  # so that this process stays free of the modules under test
            plugin = InOneProcess(inner)
            pytest.main(options, plugins=[plugin])
            if plugin.alive is not None:
                result.write_text(json.dumps([inner.index(m) for m in plugin.alive]))
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        if not result.exists():
            return 255

        def survives(mutant: Mutant) -> bool:
            sys.meta_path.insert(0, Changed(mutant))
            return pytest.main(options) == 0

        unchanged = Mutant(paths[0], "", 0, "nothing", ast.parse(paths[0].read_text()), lambda: None)
        if not in_forks([unchanged], survives):
            print("the tests must pass before anything is broken")
            return 255
        alive = in_forks([inner[i] for i in json.loads(result.read_text())] + outer, survives)
        for m in sorted(alive, key=lambda m: (m.path, m.line)):
            print(f"SURVIVED {m.path.relative_to(copy)}:{m.line} {m.function}: {m.change}")
        print(
            f"{len(tasks) - len(alive)} of {len(tasks)} mutants killed in {time.perf_counter() - begun:.0f} s; "
            f"{len(known)} make no difference"
        )
        return len(alive)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 254))
