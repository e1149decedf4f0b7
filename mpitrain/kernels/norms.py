"""Norms of long vectors of any dtype, without temporary vectors.

Vectors are processed in blocks that stay in the first-level cache, where each block is widened to float64 and squared.
A float32 sum of n squares may have a relative error of n/10^7, and a float16 sum overflows beyond 65504; in float64
neither happens at any length. On a GPU the sum of squares is one reduction kernel, and the host waits for its result;
for norms of other orders the vector is copied to the host.

Bytes moved per element: each vector is read once, nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from mpitrain.kernels import gpu

BLOCK: Final = 2048  # elements: 16 KiB of float64, half of the smallest first-level cache in use


def norm(x: Any) -> float:
    """Return the Euclidean norm of ``x`` (n,). It is not finite if an element is not finite."""
    return _root_of_squares(x, None)


def distance(x: Any, y: Any) -> float:
    """Return the Euclidean norm of ``x - y``, both (n,)."""
    return _root_of_squares(x, y)


def powers(x: Any, order: float) -> float:
    """Return the sum of ``|x_i|^order`` over ``x`` (n,). If the order is infinite, return the largest ``|x_i|``.

    The norm of a vector that consists of several parts is ``root(total([powers(part, order), ...], order), order)``.
    """
    if order == 2:
        return _root_of_squares(x, None, takes_root=False)
    return powers_of_sum([x], order)


def powers_of_sum(addends: Sequence[Any], order: float) -> float:
    """Return ``powers`` of the sum of some vectors, without storing the sum. They are all (n,) and of one dtype."""
    vectors = [gpu.to_host(vector) for vector in addends]
    block, found = np.empty(BLOCK), 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(vectors[0]), BLOCK):
            stop = min(start + BLOCK, len(vectors[0]))
            d = block[: stop - start]
            d[...] = vectors[0][start:stop]
            for vector in vectors[1:]:
                d += vector[start:stop]
            if order == 2:
                found += float(np.dot(d, d))
                continue
            np.abs(d, out=d)
            if math.isinf(order):
                found = float(np.maximum(found, d.max()))  # which keeps a NaN
            else:
                found += float((d if order == 1 else np.power(d, order, out=d)).sum())
    return found


def total(found: Any, order: float) -> float:
    """Return the ``powers`` of a vector from the ``powers`` of its parts, added in the order of the parts."""
    values = np.asarray(found, np.float64)
    return float(values.max(initial=0.0)) if math.isinf(order) else float(np.add.reduce(values))


def root(power: float, order: float) -> float:
    """Return the norm of a vector from its ``powers``."""
    return power if math.isinf(order) else float(np.sqrt(power)) if order == 2 else float(np.power(power, 1 / order))


def _root_of_squares(x: Any, y: Any | None, *, takes_root: bool = True) -> float:
    if gpu.is_device(x):
        squares = float(gpu.current().squares(x, y))
        return float(np.sqrt(squares)) if takes_root else squares
    block, squares = np.empty(BLOCK), 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(x), BLOCK):
            stop = min(start + BLOCK, len(x))
            d = block[: stop - start]
            d[...] = x[start:stop]
            if y is not None:
                d -= y[start:stop]
            squares += float(np.dot(d, d))
    return float(np.sqrt(squares)) if takes_root else squares
