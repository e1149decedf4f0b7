"""Vectors in host or device memory: telling them apart and copying between the two."""

from __future__ import annotations

from typing import Any

import numpy as np


def is_device(array: Any) -> bool:
    """Return whether an array is in device memory."""
    # Ask the type: reading the interface of a CuPy array calls the driver.
    return type(array) is not np.ndarray and hasattr(type(array), "__cuda_array_interface__")


def address_of(array: Any) -> int:
    """Return the address of an array's first element, in host or device memory."""
    address: int = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return address


def assign(to: Any, values: Any) -> None:
    """Assign ``to[...] = values``, each in host or device memory."""
    if is_device(to):
        if isinstance(values, np.ndarray):
            to.set(np.ascontiguousarray(np.broadcast_to(values, to.shape), to.dtype))
        else:
            to[...] = values
    else:
        to[...] = values.get() if is_device(values) else values


def to_host(array: Any) -> np.ndarray:
    """Return a vector as a NumPy array. A vector in device memory is copied."""
    host: np.ndarray = array.get() if is_device(array) else array
    return host
