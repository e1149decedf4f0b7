"""The equations of a kernel: Python assignments, parsed and checked when the kernel is declared.

The language is what Python, NumPy and CUDA C evaluate alike: names, numbers, ``+ - * /``, unary minus, parentheses.
Anything else is refused here, at import, rather than on the machine with the GPU.
"""

from __future__ import annotations

import ast
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

OPERATORS: Final = (ast.Add, ast.Sub, ast.Mult, ast.Div)

# Names that the generated code uses, and keywords of C++ that are valid names in Python.
RESERVED: Final = frozenset(
    """
    i n_nonfinite float32 float64 range len auto bool break case catch char class const constexpr continue
    default delete do double else enum explicit extern false float for friend goto if inline int long mutable
    namespace new nullptr operator private protected public register return short signed sizeof static struct
    switch template this throw true try typedef typename union unsigned using virtual void volatile while
    """.split()
)


@dataclass(frozen=True)
class Equations:
    """Parsed and checked equations.

    `statements` contains pairs (target, right-hand side) in order. In the right-hand sides, numbers are replaced by
    names ``_k0, _k1, ...``; `literals` contains their values. A back-end can therefore give the numbers the compute
    type, and an expression has the same text in Python and in C.
    """

    arrays: tuple[str, ...]
    scalars: tuple[str, ...]
    statements: tuple[tuple[str, ast.expr], ...]
    literals: tuple[tuple[str, float], ...]
    guard: str | None
    loaded: tuple[str, ...]  # arrays whose old value is used, in declared order
    stored: tuple[str, ...]  # arrays that are assigned, in declared order


def parse(text: str, arrays: str, scalars: str, guard: str | None) -> Equations:
    """Parse and check the equations of a kernel.

    Args:
        text: Assignments, one per line.
        arrays: Names of the arrays, separated by spaces.
        scalars: Names of the scalars, separated by spaces.
        guard: The assigned name whose non-finite elements are replaced by zero.

    Raises:
        ValueError: The equations are invalid; the message names the line and the mistake.
    """
    array_names, scalar_names = tuple(arrays.split()), tuple(scalars.split())
    declared = array_names + scalar_names
    _check_declared_names(declared)
    collector = _Expressions()
    statements: list[tuple[str, ast.expr]] = []
    assigned: list[str] = []
    loaded: set[str] = set()  # names whose value at the start of the call is used
    used: set[str] = set()
    for node in _syntax_tree(text).body:
        target, expression = _assignment(node, scalar_names)
        value = collector.visit(expression)
        for name in names_in(value):
            used.add(name)
            if name not in assigned:
                loaded.add(name)
                if name not in declared:
                    raise ValueError(
                        f"{name!r} in {ast.unparse(node)!r} is not an array, a scalar or a name assigned above"
                    )
        statements.append((target, value))
        assigned.append(target)
    _check_use(array_names, declared, used, assigned, guard)
    return Equations(
        arrays=array_names,
        scalars=scalar_names,
        statements=tuple(statements),
        literals=tuple(collector.literals),
        guard=guard,
        loaded=tuple(name for name in array_names if name in loaded),
        stored=tuple(name for name in array_names if name in assigned),
    )


def names_in(expression: ast.expr) -> Iterator[str]:
    """Return the declared or assigned names in an expression, without those of literals."""
    return (n.id for n in ast.walk(expression) if isinstance(n, ast.Name) and not n.id.startswith("_"))


class _Expressions(ast.NodeTransformer):
    """A visitor that refuses what is outside the language and gives numbers names."""

    def __init__(self) -> None:
        self.literals: list[tuple[str, float]] = []

    def visit_Name(self, node: ast.Name) -> ast.expr:
        _check_name(node.id)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{value!r} is not a finite number")
        name = f"_k{len(self.literals)}"
        self.literals.append((name, float(value)))
        return ast.Name(id=name, ctx=ast.Load())

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        if not isinstance(node.op, OPERATORS):
            raise ValueError(f"only + - * / are known, not {ast.unparse(node)!r}")
        return ast.BinOp(left=self.visit(node.left), op=node.op, right=self.visit(node.right))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        if not isinstance(node.op, ast.USub):
            raise ValueError(f"only - is known as a sign, not {ast.unparse(node)!r}")
        return ast.UnaryOp(op=node.op, operand=self.visit(node.operand))

    def generic_visit(self, node: ast.AST) -> ast.AST:
        raise ValueError(f"{ast.unparse(node)!r} is neither a name, a number, a sum nor a product")


def _syntax_tree(text: str) -> ast.Module:
    try:
        return ast.parse(textwrap.dedent(text).strip())
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno} is not an assignment: {error.text!r} ({error.msg})") from None


def _assignment(node: ast.stmt, scalars: tuple[str, ...]) -> tuple[str, ast.expr]:
    """Return the target and the right-hand side of a statement, which must be ``name = expression``."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
        raise ValueError(f"{ast.unparse(node)!r} is not of the form: name = expression")
    name = node.targets[0].id
    _check_name(name)
    if name in scalars:
        raise ValueError(f"{ast.unparse(node)!r} assigns to the scalar {name!r}")
    return name, node.value


def _check_use(
    arrays: tuple[str, ...], declared: tuple[str, ...], used: set[str], assigned: list[str], guard: str | None
) -> None:
    """Check that the equations use all that is declared, compute something, and assign the guard once."""
    if not set(assigned) & set(arrays):
        raise ValueError("no array is assigned, so the kernel would compute nothing")
    if unused := [name for name in declared if name not in used | set(assigned)]:
        raise ValueError(f"declared but not used in the equations: {', '.join(unused)}")
    if guard is not None and assigned.count(guard) != 1:
        raise ValueError(f"guard {guard!r} must be assigned exactly once, it is assigned {assigned.count(guard)} times")


def _check_declared_names(names: tuple[str, ...]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"a name is declared twice in: {' '.join(names)}")
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"{name!r} is not a name")
        _check_name(name)


def _check_name(name: str) -> None:
    if name in RESERVED or name.startswith("_") or name.endswith(("_at", "_in")) or not name.isascii():
        raise ValueError(f"{name!r} is reserved for the generated code; choose another name")
