"""The entry of a kernel: a generated function that checks the operands of a call and calls the compiled function.

A call with short vectors takes about a microsecond, most of it for these checks. Straight-line code takes half as long
as a loop over the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from mpitrain.kernels.compile.equations import Equations

# Bits of numpy.ndarray.flags.num: C contiguous, aligned and, for assigned arrays, writeable. One test instead of three.
READABLE: Final = 0x0001 | 0x0100
WRITEABLE: Final = READABLE | 0x0400


def flags_of(equations: Equations, array: str) -> int:
    """Return the flags that an array of these equations must have."""
    return WRITEABLE if array in equations.stored else READABLE


def source(equations: Equations) -> str:
    """Return the Python source of the function ``entry``."""
    first, *others = equations.arrays
    flags = {name: flags_of(equations, name) for name in equations.arrays}
    checks = [f"type({name}) is _ndarray and {name}.flags.num & {n} == {n}" for name, n in flags.items()]
    checks += [f"{first}.ndim == 1", *(f"{name}.shape == {first}.shape" for name in others)]
    arrays, scalars = _tuple(equations.arrays), _tuple(equations.scalars)
    operands = ", ".join([*equations.arrays, *equations.scalars])
    lines = [
        f"def entry({operands}):",
        f"    if {' and '.join(checks)}:",
        f"        _function = _functions.get({_tuple([f'{name}.dtype' for name in equations.arrays])})",
        "        if _function is not None:",
        f"            return _function({operands})",
        f"    return _otherwise({arrays}, {scalars})",
    ]
    return "\n".join([*lines, ""])


def _tuple(items: Sequence[str]) -> str:
    return f"({''.join(f'{item}, ' for item in items)})"


def entry(
    equations: Equations,
    functions: Mapping[tuple[np.dtype, ...], Callable[..., int]],
    otherwise: Callable[[Sequence[Any], Sequence[float]], int],
) -> Callable[..., int]:
    """Return the entry of a kernel.

    Args:
        equations: The kernel's equations. Their arrays and scalars are the parameters of the entry.
        functions: The compiled functions, by the dtypes of the arrays.
        otherwise: Called with the arrays and the scalars if the arrays are no NumPy vectors of one length that a
            compiled function can take, or if there is no compiled function for their dtypes yet.
    """
    names: dict[str, Any] = {"_ndarray": np.ndarray, "_functions": functions, "_otherwise": otherwise}
    exec(source(equations), names)
    made: Callable[..., int] = names["entry"]
    return made
