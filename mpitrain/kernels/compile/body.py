"""The one generator of a kernel's loop body: load, compute, store, as assignments that Python and C spell alike.

`host` and `cuda` only add their own loop, types and semicolons. The expressions are the same characters in both.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from mpitrain.kernels.compile.equations import Equations
from mpitrain.kernels.compile.storage import Compute, Storage


@dataclass(frozen=True)
class Line:
    """``target = text``; `declares` where `target` is new (C wants its type), `guarded` where the guard follows."""

    target: str
    text: str
    declares: bool = False
    guarded: bool = False


def body(equations: Equations, storages: Sequence[Storage], compute: Compute, casts: dict[str, str]) -> list[Line]:
    """The lines of the loop body for element ``i`` of arrays called ``<name>_at``.

    Args:
        equations: what to compute.
        storages: how each array is stored, in declared order.
        compute: the type of every local.
        casts: what the language calls float32 and float64.
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
