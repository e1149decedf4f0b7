"""Evaluation of kernels in NumPy, one array operation per operator: the oracle of the compiled back-ends."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from mpitrain.kernels.compile.equations import Equations
from mpitrain.kernels.compile.storage import compute_type, storage_of

_OPERATIONS: Final[dict[type[ast.operator], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(equations: Equations, arrays: Sequence[np.ndarray], scalars: Sequence[float]) -> int:
    """Evaluate the equations in place, and return the number of elements that the guard has replaced."""
    compute = np.dtype(compute_type([storage_of(a.dtype) for a in arrays])).type
    given = dict(zip(equations.arrays, arrays, strict=True))
    n_nonfinite = 0
    with np.errstate(all="ignore"):
        values: dict[str, Any] = {name: compute(v) for name, v in zip(equations.scalars, scalars, strict=True)}
        values |= {name: compute(value) for name, value in equations.literals}
        values |= {name: given[name].astype(compute) for name in equations.loaded}
        for target, expression in equations.statements:
            value = _value(expression, values)
            if target == equations.guard:
                finite = np.isfinite(value)
                n_nonfinite = int(np.size(value) - np.count_nonzero(finite))
                value = np.where(finite, value, compute(0))
            values[target] = value
        for name in equations.stored:
            array = given[name]
            value = np.asarray(values[name])
            if array.dtype.itemsize == 2:
                value = value.astype(np.float32)  # all back-ends narrow float64 to 16 bits via float32
            array[...] = value.astype(array.dtype)
    return n_nonfinite


def _value(expression: ast.expr, values: dict[str, Any]) -> Any:
    if isinstance(expression, ast.Name):
        return values[expression.id]
    if isinstance(expression, ast.UnaryOp):
        return -_value(expression.operand, values)
    assert isinstance(expression, ast.BinOp)
    return _OPERATIONS[type(expression.op)](_value(expression.left, values), _value(expression.right, values))
