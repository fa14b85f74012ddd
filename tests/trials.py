"""How mutants are tried: in forks of one process that has the tests loaded, or each in a fork that loads all anew.

Each function gives, for each mutant, the id of the test that killed it, or "" if it survives. All work in the folder
that holds a copy of the core and of its tests.
"""

import ast
import importlib.util
import json
import mmap
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence, Set
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, FrameType, FunctionType

import hypothesis  # noqa: F401  (loaded once, before the forks)
import numpy.testing  # noqa: F401
import pytest
from _pytest.runner import runtestprotocol
from mutations import Mutant

TESTS = ("adapters", "channel", "rules", "oracles", "laws", "rounds")
OPTIONS = ["-p", "no:cacheprovider", "-x", "-W", "ignore::pytest.PytestAssertRewriteWarning"]  # loaded before the forks
WORKERS = 2
BROKEN = 3  # a fork's exit code when it is this script that failed
SECONDS = 60  # of computing for one mutant; one that hangs is killed

Note = Callable[[str], None]
"""Takes the id of the test that is about to run."""


def in_forks(
    tasks: Sequence[Mutant],
    survives: Callable[[Mutant, Note], bool],
    seconds: Callable[[Mutant], float] = lambda _: SECONDS,
) -> list[str]:
    """What killed each, "" for those that survive: the test that ran last in a fork of this process.

    seconds: of computing that each may take; one that takes more dies of the test that it is in.
    """
    running: dict[int, tuple[int, mmap.mmap]] = {}
    killers = [""] * len(tasks)
    waiting = list(reversed(range(len(tasks))))
    sys.stdout.flush()
    while waiting or running:
        while waiting and len(running) < WORKERS:
            mutant, board = tasks[i := waiting.pop()], mmap.mmap(-1, 4096)
            if not (child := os.fork()):
                signal.setitimer(signal.ITIMER_PROF, seconds(mutant))
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)

                def note(test: str, board: mmap.mmap = board) -> None:
                    board[:] = test.encode()[:4096].ljust(4096, b"\0")

                try:
                    note("?")
                    os._exit(0 if survives(mutant, note) else 1)
                finally:
                    os._exit(BROKEN)
            running[child] = i, board
        child, status = os.wait()
        i, board = running.pop(child)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == BROKEN:
            mutant = tasks[i]
            raise RuntimeError(f"could not try {mutant.path}:{mutant.line} {mutant.function}: {mutant.change}")
        if status != 0:
            killers[i] = board[:].rstrip(b"\0").decode(errors="replace")
        board.close()
    return killers


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


def run(item: pytest.Item) -> bool:
    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))


def passes(items: Collection[pytest.Item], mutant: Mutant | None, note: Note) -> bool:
    """Whether all of the tests pass, in this order, with a function's mutant in place."""
    if mutant is not None:
        function_of(mutant.path, mutant.function).__code__ = code_of(mutant.code(), mutant.function)
    for item in items:
        note(item.nodeid)
        if not run(item):
            return False
    return True


class InOneProcess:
    """A pytest plugin: runs the tests once, then the mutants of functions, each on some of them.

    hints: the test that killed each mutant before, on which alone it is tried; without them, on all that call it.
    """

    def __init__(self, tasks: Sequence[Mutant], hints: Sequence[str] = ()) -> None:
        self.tasks = tasks
        self.hints = hints
        self.killers: list[str] | None = None

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        seconds: dict[pytest.Item, float] = {}
        calls: dict[tuple[str, str], set[pytest.Item]] = {}
        named = set(self.hints)
        items = [x for x in session.items if not named or x.nodeid in named]
        for item in items:

            def note(frame: FrameType, event: str, _: object, item: pytest.Item = item) -> None:
                code = frame.f_code
                if event == "call" and "/fedpeft/" in code.co_filename:
                    calls.setdefault((code.co_filename, code.co_qualname.split(".<locals>")[0]), set()).add(item)

            begun = time.perf_counter()
            sys.setprofile(None if self.hints else note)
            passed = run(item)
            sys.setprofile(None)
            seconds[item] = time.perf_counter() - begun
            if not passed:
                print(f"the tests must pass before anything is broken: {item.nodeid} fails")
                return True

        known = {x.nodeid: x for x in items}
        hinted = {id(m): known.get(hint) for m, hint in zip(self.tasks, self.hints, strict=False)}

        def tests(mutant: Mutant) -> list[pytest.Item]:
            if self.hints:
                hint = hinted[id(mutant)]
                return [] if hint is None else [hint]
            return sorted(calls.get((str(mutant.path), mutant.function), ()), key=lambda x: seconds[x])

        if any(in_forks(self.tasks[:1], lambda _, note: passes(items, None, note))):
            print("the tests must pass in a fork before anything is broken")
            return True
        limit = (lambda m: 10 + 10 * sum(seconds[x] for x in tests(m))) if self.hints else (lambda _: SECONDS)
        self.killers = in_forks(self.tasks, lambda m, note: passes(tests(m), m, note), limit)
        return True


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


class Watched:
    """A pytest plugin: notes which test runs, or which file of tests can't be loaded.

    only: the tests to run, or whole files of them; all if there are none. What is noted is without its parameters,
    which are named for values that a mutant may change.
    """

    def __init__(self, note: Note, only: Set[str] = frozenset()) -> None:
        self.note = note
        self.only = only

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        names = [{x.nodeid, plainly(x.nodeid), x.nodeid.partition("::")[0]} for x in items]
        items[:] = [x for x, named in zip(items, names, strict=True) if not self.only or named & self.only]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.note(report.nodeid)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.note(plainly(nodeid))


def plainly(test: str) -> str:
    """A test's id without its parameters."""
    return test.partition("[")[0]


def of_functions(tasks: Sequence[Mutant], hints: Sequence[str] = ()) -> list[str] | None:
    """What killed each mutant of a function, "" where nothing did; None where tests fail with nothing broken."""
    if not tasks:
        return []
    result = Path("killers.json")
    result.unlink(missing_ok=True)
    if not (child := os.fork()):  # so that this process stays free of the modules under test
        plugin = InOneProcess(tasks, hints)
        pytest.main([*(files_of(hints) if hints else all_tests()), *OPTIONS], plugins=[plugin])
        if plugin.killers is not None:
            result.write_text(json.dumps(plugin.killers))
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    return list(json.loads(result.read_text())) if result.exists() else None


def anew(tasks: Sequence[Mutant], hints: Sequence[str] = ()) -> list[str] | None:
    """The same for mutants of any place, each in a process that loads everything anew: on its hint, else on all."""
    if not tasks:
        return []
    hinted = dict(zip(map(id, tasks), hints, strict=False))

    def survives(mutant: Mutant, note: Note) -> bool:
        sys.meta_path.insert(0, Changed(mutant))
        if not hints:
            return pytest.main([*all_tests(), *OPTIONS], plugins=[Watched(note)]) == 0
        hint = hinted[id(mutant)]
        ended = pytest.main([*files_of([hint]), *OPTIONS], plugins=[Watched(note, {hint})])
        # That the test is not there is no death.
        return ended not in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)

    nothing = Mutant(tasks[0].path, "", 0, "nothing", ast.parse(tasks[0].path.read_text()), lambda: None)

    def passes_unbroken(mutant: Mutant, note: Note) -> bool:
        sys.meta_path.insert(0, Changed(mutant))
        if not hints:
            return pytest.main([*all_tests(), *OPTIONS]) == 0
        ended = pytest.main([*files_of(hints), *OPTIONS], plugins=[Watched(note, set(hints))])
        return ended in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)

    if any(in_forks([nothing], passes_unbroken)):
        print("the tests must pass before anything is broken")
        return None
    return in_forks(tasks, survives)


def all_tests() -> list[str]:
    return [f"tests/{part}" for part in TESTS]


def files_of(tests: Sequence[str]) -> list[str]:
    """The files, as far as they are there, that tests stand in."""
    return sorted({file for x in tests if (file := x.partition("::")[0]) and Path(file).is_file()})


def killers_of(tasks: Sequence[Mutant], hints: Sequence[str]) -> list[str] | None:
    """What killed each mutant, "" for those that survive; hints: the test to try first, "" where there's none.

    None where tests fail with nothing broken.
    """
    killers = [""] * len(tasks)

    def settled(way: Callable[..., list[str] | None], inside: bool | None, on: Sequence[str] | None) -> bool:
        """Whether the mutants that still live could be tried: those within functions or not, on their hints or all."""
        chosen = [
            i
            for i, m in enumerate(tasks)
            if not killers[i] and inside in (None, bool(m.function)) and (on is None or files_of([on[i]]))
        ]
        found = way([tasks[i] for i in chosen], [] if on is None else [on[i] for i in chosen])
        for i, killer in zip(chosen, found or (), strict=False):
            killers[i] = killer
        return found is not None

    if (
        not settled(of_functions, True, hints)
        or not settled(anew, None, hints)
        or not settled(of_functions, True, None)
    ):
        return None
    guesses = guessed(tasks, killers)
    return killers if settled(anew, False, guesses) and settled(anew, None, None) else None


def guessed(tasks: Sequence[Mutant], killers: Sequence[str]) -> list[str]:
    """For each mutant the file of tests that killed most of its file's others; "" where none did."""
    by: dict[Path, Counter[str]] = {}
    for mutant, killer in zip(tasks, killers, strict=True):
        by.setdefault(mutant.path, Counter()).update(files_of([killer]))
    return [max(by[m.path], key=lambda x: (by[m.path][x], x), default="") for m in tasks]
