"""Operations under a lock of ``native.lock_words``, each in one compiled call: lock, work and release.

For a short vector, calls of the interpreter take most of the time of a visit to a mailbox. A call that finds the lock
taken does nothing, so that the caller can wait for the lock in its own way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from mpitrain.kernels.compile import cache, host
from mpitrain.kernels.compile.declare import Kernel
from mpitrain.kernels.compile.storage import Storage, compute_type, storage_of
from mpitrain.kernels.native.lock_words import ACQUIRE_AND_RELEASE, OWNER_MASK

TAKEN: Final = -1
"""The result of a call that found the lock taken."""

_HEAD: Final = f"""\
{ACQUIRE_AND_RELEASE}
from numba import njit
_acquire, _release = njit(acquire, nogil=True), njit(release, nogil=True)
"""


@functools.cache
def write(dtype: Any) -> Callable[..., int]:
    """Return the compiled function that replaces a vector and its tags under a lock.

    ``write(words, at, mine, data, tags, values, new_tags)`` copies ``values`` to ``data``, (n,) of this dtype, and
    ``new_tags`` to ``tags``, float64, and counts an update. The first three arguments are those of
    ``lock_words.acquire``. The result is 0, or ``TAKEN``. 16-bit vectors are passed as uint16.
    """
    storage = storage_of(dtype)
    return cache.compiled("write", storage.short, write_source(storage))


def write_source(storage: Storage) -> str:
    """Return the Python source of ``write`` and of the constant ``SIGNATURE``, its types."""
    arrays = f"{storage.numba}[::1], float64[::1], {storage.numba}[::1], float64[::1]"
    return f"""\
{_HEAD}
SIGNATURE = "int64(int64[::1], int64, int64, {arrays})"
def write(words, at, mine, data, tags, values, new_tags):
    if _acquire(words, at, mine, 0) & {OWNER_MASK}:
        return {TAKEN}
    for i in range(len(data)):
        data[i] = values[i]
    for i in range(len(tags)):
        tags[i] = new_tags[i]
    _release(words, at, mine, 1)
    return 0
"""


@functools.cache
def average(kernel: Kernel, dtype: Any, weight_tag: int) -> Callable[..., int]:
    """Return the compiled kernel that averages with a vector under a lock, without an update.

    ``average(words, at, mine, x, z, tags, weights)`` calls ``kernel(x, z, w_z / (w_x + w_z))``; x and z are (n,) of
    this dtype. ``weights`` is (2,) float64: w_x and w_z. If w_z is NaN, the call sets it to ``tags[weight_tag]``. The
    first three arguments are those of ``lock_words.acquire``. The result is that of the kernel, or ``TAKEN``. 16-bit
    vectors are passed as uint16.

    Args:
        kernel: The kernel, of two arrays and a scalar.
        dtype: The type of the vectors.
        weight_tag: The index of the weight of z in its tags.
    """
    storage = storage_of(dtype)
    return cache.compiled(
        "average", f"{kernel.name}_{weight_tag}_{storage.short}", average_source(kernel, storage, weight_tag)
    )


def average_source(kernel: Kernel, storage: Storage, weight_tag: int) -> str:
    """Return the Python source of ``average`` and of the constant ``SIGNATURE``, its types."""
    vectors = f"{storage.numba}[::1], {storage.numba}[::1]"
    return f"""\
{host.source(kernel.name, kernel.equations, [storage] * len(kernel.equations.arrays))}
{_HEAD}
_kernel = njit({kernel.name}, nogil=True, error_model="numpy")
SIGNATURE = "int64(int64[::1], int64, int64, {vectors}, float64[::1], float64[::1])"
def average(words, at, mine, x, z, tags, weights):
    if _acquire(words, at, mine, 0) & {OWNER_MASK}:
        return {TAKEN}
    if weights[1] != weights[1]:
        weights[1] = tags[{weight_tag}]
    n_nonfinite = _kernel(x, z, {compute_type([storage])}(weights[1] / (weights[0] + weights[1])))
    _release(words, at, mine, 0)
    return n_nonfinite
"""
