"""The loop body shared by all back-ends: load, compute and store, as assignments valid in both Python and C.

`host` and `cuda_source` only add their loops, types and semicolons. The expressions are the same text in both.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from mpitrain.kernels.compile.equations import Equations
from mpitrain.kernels.compile.storage import Compute, Storage


@dataclass(frozen=True)
class Line:
    """An assignment ``target = text``. `declares` is true if `target` is new, so that C needs its type."""

    target: str
    text: str
    declares: bool = False
    guarded: bool = False  # the guard follows


def body(equations: Equations, storages: Sequence[Storage], compute: Compute, casts: dict[str, str]) -> list[Line]:
    """Return the body of the loop over the elements ``i`` of arrays with names ``<name>_at``.

    Args:
        equations: The equations to compute.
        storages: The storage of each array, in the declared order.
        compute: The type of every local variable.
        casts: The names of float32 and float64 in the generated language.
    """
    stored_as = dict(zip(equations.arrays, storages, strict=True))
    lines = [Line(name, f"{casts[compute]}({value!r})", declares=True) for name, value in equations.literals]
    for name in equations.loaded:
        lines.append(Line(name, _load(f"{name}_at[i]", stored_as[name], compute, casts), declares=True))
    known = set(equations.loaded)
    for target, expression in equations.statements:
        text = ast.unparse(expression)
        lines.append(Line(target, text, declares=target not in known, guarded=target == equations.guard))
        known.add(target)
    for name in equations.stored:
        lines.append(Line(f"{name}_at[i]", _store(name, stored_as[name], compute, casts)))
    return lines


def _load(element: str, storage: Storage, compute: Compute, casts: dict[str, str]) -> str:
    if storage.widen:
        element = f"{storage.widen}({element})"
    return (
        element
        if storage.name == compute or (storage.widen and compute == "float32")
        else _cast(element, compute, casts)
    )


def _store(value: str, storage: Storage, compute: Compute, casts: dict[str, str]) -> str:
    if storage.name != compute and compute == "float64":
        value = _cast(value, "float32", casts)
    return f"{storage.narrow}({value})" if storage.narrow else value


def _cast(value: str, to: Compute, casts: dict[str, str]) -> str:
    return f"{casts[to]}({value})"
