"""Euclidean norms of long vectors of any dtype, without temporary vectors.

Vectors are processed in blocks that stay in the first-level cache, where each block is widened to float64 and squared.
A float32 sum of n squares may have a relative error of n/10^7, and a float16 sum overflows beyond 65504; in float64
neither happens at any length. On a GPU the sum is one reduction kernel, and the host waits for its result.

Bytes moved per element: each vector is read once, nothing is written.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from mpitrain.kernels import gpu

BLOCK: Final = 2048  # elements: 16 KiB of float64, half of the smallest first-level cache in use


def norm(x: Any) -> float:
    """Return the Euclidean norm of ``x`` (n,): NaN or infinite if an element is."""
    return _root_of_squares(x, None)


def distance(x: Any, y: Any) -> float:
    """Return the Euclidean norm of ``x - y``, both (n,)."""
    return _root_of_squares(x, y)


def _root_of_squares(x: Any, y: Any | None) -> float:
    if gpu.is_device(x):
        return float(np.sqrt(gpu.current().squares(x, y)))
    block, total = np.empty(BLOCK), 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(x), BLOCK):
            stop = min(start + BLOCK, len(x))
            d = block[: stop - start]
            d[...] = x[start:stop]
            if y is not None:
                d -= y[start:stop]
            total += float(np.dot(d, d))
    return float(np.sqrt(total))
