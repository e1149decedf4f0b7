"""Vectors in which small changes add up."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpitrain import kernels


def wide_copy(vector: Any) -> Any:
    """Return a copy of a vector (n,) in at least float32, so that small changes are not lost by rounding."""
    copied = np.zeros_like(vector, dtype=kernels.accumulator(vector.dtype))
    kernels.copy(copied, vector)
    return copied
