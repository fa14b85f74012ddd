"""The small changes that ``mutants.py`` makes to a module: which there are, and how one is swapped in.

Docstrings, annotations, decorators, imports and the texts of errors are left alone.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

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
PAIRS = (
    "a b",
    "received trained",
    "d k",
    "left right",
    "new old",
    "m v",
    "missing extra",
    "beta1 beta2",
    "q p",
    "u vt",
)
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
            for i, compared in enumerate(ops):
                for other in SWAPS[type(compared)]:
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
            yield from (x for x in args[:1] if not isinstance(x, ast.Starred))
            if isinstance(function, ast.Attribute) and ast.unparse(function.value) != "np":
                yield function.value
            if len(args) > 1:
                if ast.unparse(function) not in ("min", "max"):  # whose order makes no difference
                    yield ast.Call(function, [args[1], args[0], *args[2:]], keywords)
                yield ast.Call(function, args[:-1], keywords)
            for out in keywords:
                if not is_left_alone(out):
                    yield ast.Call(function, args, [k for k in keywords if k is not out])


def instead_of_statement(node: ast.stmt, in_function: bool) -> Iterator[ast.stmt]:
    """What to put in place of a statement."""
    match node:
        case ast.AugAssign(target, op, value) if type(op) in SWAPS:
            yield ast.AugAssign(target, SWAPS[type(op)][0](), value)
    match node:
        case ast.Return(returned) if returned is not None:
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

    def swap(holder: Any, at: Any, new: ast.AST) -> Callable[[], None]:
        held = [new]

        def edit() -> None:
            if isinstance(holder, list):
                holder[at], held[0] = held[0], holder[at]
            else:
                old = getattr(holder, at)
                setattr(holder, at, held[0])
                held[0] = old

        return edit

    def visit(holder: Any, at: Any, name: str, inside: bool, line: int) -> Iterator[Mutant]:
        node = holder[at] if isinstance(holder, list) else getattr(holder, at)
        if not isinstance(node, ast.AST) or is_left_alone(node):
            return
        line = getattr(node, "lineno", line)
        news = instead_of_statement(node, inside) if isinstance(node, ast.stmt) else instead(node)
        for new in news:
            old_text, new_text = ast.unparse(node), ast.unparse(ast.fix_missing_locations(new))
            if old_text != new_text:
                change = (
                    f"{old_text}  →  {new_text}" if len(old_text) < 200 else f"{old_text[:90]} …  →  {new_text[:90]} …"
                )
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
