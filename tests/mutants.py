"""Break the core one small piece at a time; every break must fail a test.

    python tests/mutants.py [part of a path ...]

Each expression and statement of rules/, adapters/ and channel/ is changed in turn: operators and comparisons swapped,
constants moved, operands, arguments, conditions and statements left out. Docstrings, annotations, decorators and the
texts of errors are left alone. Prints each survivor; the exit code is the number of survivors.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, FrameType, FunctionType

import hypothesis  # noqa: F401  (loaded once, before the forks)
import numpy.testing  # noqa: F401
import pytest
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("adapters", "rules", "channel")
TESTS = ("adapters", "channel", "rules", "oracles", "laws", "rounds")
WORKERS = 2
BROKEN = 3  # a fork's exit code when it is this script that failed
SECONDS = 60  # for one mutant; one that hangs is killed

EQUIVALENT: dict[tuple[str, str], str] = {}
"""(function, change) of changes that make no difference, and why."""

SWAPS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitOr: (ast.BitAnd,),
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
PAIRS = ("a b", "received trained", "d k", "left right", "new old", "m v", "missing extra", "beta1 beta2", "q p", "u vt")
OTHER = {x: y for pair in PAIRS for x, y in (pair.split(), reversed(pair.split()))}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: ``edit`` swaps it in and, called again, out of the module's tree."""

    path: Path
    function: str
    line: int
    change: str
    tree: ast.Module
    edit: Callable[[], None]

    def code(self) -> CodeType:
        """The changed module, compiled."""
        self.edit()
        try:
            return compile(ast.fix_missing_locations(self.tree), str(self.path), "exec")
        finally:
            self.edit()


def instead(node: ast.AST) -> Iterator[ast.AST]:
    """What to put in place of an expression."""
    match node:
        case ast.BinOp(left, op, right):
            for other in SWAPS.get(type(op), ()):
                yield ast.BinOp(left, other(), right)
            if isinstance(op, ast.MatMult):
                yield ast.BinOp(right, op, left)
            yield from (left, right)
        case ast.Compare(left, ops, comparators):
            for i, op in enumerate(ops):
                for other in SWAPS[type(op)]:
                    yield ast.Compare(left, [*ops[:i], other(), *ops[i + 1 :]], comparators)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(SWAPS[type(op)][0](), values)
            yield from (x if len(values) == 2 else ast.BoolOp(op, [v for v in values if v is not x]) for x in values)
        case ast.UnaryOp(_, operand):
            yield operand
        case ast.IfExp(_, body, orelse):
            yield from (body, orelse)
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() as value):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.Constant(float() as value):
            yield from (ast.Constant(3 * value if value else 1.0), ast.Constant(value / 3))
        case ast.Constant(str() as value):
            yield ast.Constant(value + "X")
            yield from (ast.Constant(x) for x in [OTHER.get(value), value[1:]] if x)
        case ast.Attribute(value, name, ctx) if name in OTHER:
            yield ast.Attribute(value, OTHER[name], ctx)
        case ast.Name(name, ast.Load()) if name in OTHER:
            yield ast.Name(OTHER[name], ast.Load())
        case ast.Slice(lower, upper, None):
            yield from (x for x in (ast.Slice(upper=upper), ast.Slice(lower)) if lower or upper)
        case ast.Subscript(value, _, ast.Load()):
            yield value
        case ast.comprehension(target, source, ifs) if ifs:
            yield from (ast.comprehension(target, source, [x for x in ifs if x is not out], 0) for out in ifs)
        case ast.Call(function, args, keywords):
            yield from args[:1]
            if isinstance(function, ast.Attribute) and ast.unparse(function.value) != "np":
                yield function.value
            if len(args) > 1:
                yield ast.Call(function, [args[1], args[0], *args[2:]], keywords)
                yield ast.Call(function, args[:-1], keywords)
            yield from (ast.Call(function, args, [k for k in keywords if k is not out]) for out in keywords)


def instead_of_statement(node: ast.stmt, in_function: bool) -> Iterator[ast.stmt]:
    """What to put in place of a statement."""
    match node:
        case ast.Return(value) if value is not None:
            yield ast.Return(ast.Constant(None))
        case ast.If(_, body, orelse):
            yield from (ast.If(ast.Constant(value), body, orelse) for value in (True, False))
        case ast.Assign() | ast.AnnAssign() | ast.AugAssign() | ast.Expr() | ast.Raise() | ast.For() | ast.Return():
            if in_function:
                yield ast.Pass()


def is_left_alone(node: ast.AST) -> bool:
    """Docstrings, imports, types and what dataclasses are told of a field."""
    match node:
        case ast.Expr(ast.Constant()) | ast.Import() | ast.ImportFrom():
            return True
        case ast.AnnAssign(_, ast.Name("TypeAlias")) | ast.Assign([ast.Name("__all__")]):
            return True
        case ast.AnnAssign(value=None):
            return True
        case ast.keyword("init" | "repr" | "kw_only"):
            return True
        case ast.Subscript(ast.Name("dict")):
            return True
    return False


def mutants(path: Path) -> Iterator[Mutant]:
    """All changes to one module, top to bottom."""
    tree = ast.parse(path.read_text())

    def swap(holder: list[ast.AST] | ast.AST, at: int | str, new: ast.AST) -> Callable[[], None]:
        held = [new]

        def edit() -> None:
            if isinstance(holder, list):
                holder[at], held[0] = held[0], holder[at]
            else:
                old = getattr(holder, at)
                setattr(holder, at, held[0])
                held[0] = old

        return edit

    def visit(holder: list[ast.AST] | ast.AST, at: int | str, name: str, inside: bool, line: int) -> Iterator[Mutant]:
        node = holder[at] if isinstance(holder, list) else getattr(holder, at)
        if not isinstance(node, ast.AST) or is_left_alone(node):
            return
        line = getattr(node, "lineno", line)
        news = instead_of_statement(node, inside) if isinstance(node, ast.stmt) else instead(node)
        for new in news:
            old_text, new_text = ast.unparse(node), ast.unparse(ast.fix_missing_locations(new))
            if old_text != new_text:
                change = f"{old_text}  →  {new_text}" if len(old_text) < 200 else f"{old_text[:90]} …  →  {new_text[:90]} …"
                yield Mutant(path, name if inside else "", line, change, tree, swap(holder, at, new))
        if isinstance(node, ast.Raise):
            return
        within = isinstance(node, ast.FunctionDef)
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            name = f"{name}.{node.name}".lstrip(".")
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "bases", "target", "targets"):
                continue
            deeper = inside or (within and field == "body")
            if isinstance(value, list):
                for i in range(len(value)):
                    yield from visit(value, i, name, deeper, line)
            else:
                yield from visit(node, field, name, deeper, line)

    for i in range(len(tree.body)):
        yield from visit(tree.body, i, "", False, 0)


def in_forks(tasks: Sequence[Mutant], survives: Callable[[Mutant], bool]) -> list[Mutant]:
    """The mutants that survive, each tried in a fork of this process; one that outlives its time is killed."""
    running: dict[int, Mutant] = {}
    alive: list[Mutant] = []
    waiting = list(reversed(tasks))
    sys.stdout.flush()
    while waiting or running:
        while waiting and len(running) < WORKERS:
            mutant = waiting.pop()
            if not (child := os.fork()):
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
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


def main(only: Iterable[str]) -> int:
    """The number of survivors."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for room in (*ROOMS, "rounds"):
            shutil.copytree(ROOT / "fedpeft" / room, copy / "fedpeft" / room, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("fedpeft/__init__.py", "fedpeft/errors.py", "pyproject.toml"):
            shutil.copy(ROOT / name, copy / name)
        for part in TESTS:
            shutil.copytree(ROOT / "tests" / part, copy / "tests" / part, ignore=shutil.ignore_patterns("__pycache__"))
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        paths = [p for room in ROOMS for p in sorted((copy / "fedpeft" / room).glob("*.py"))]
        found = [m for p in paths if all(part in str(p) for part in only) for m in mutants(p)]
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
