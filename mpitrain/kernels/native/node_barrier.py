"""A barrier between the ranks of a node, and a barrier fused with an all-reduce, each in one compiled call.

Each rank has a word, on a cache line of its own, with the number of the barrier that it has reached. To arrive, a rank
stores the number in its word; to wait, it polls the words of the others. A call that has waited for long returns its
progress, so that the caller can sleep and handle signals and MPI. The caller then calls again with that progress.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from mpitrain.kernels.compile import cache, host
from mpitrain.kernels.compile.storage import Storage, compute_type, storage_of

STRIDE: Final = 8  # words: a cache line
YIELDS: Final = 200  # offers of the core before a call returns although ranks are missing
POLL_ONCE: Final = -YIELDS  # a spin limit: poll without spinning or yielding

WAIT: Final = f"""\
from numba import njit
from mpitrain.kernels.native.atomics import give_way, load_acquire, store_release
def wait(words, first, n, number, spin_limit):
    for k in range(first, n):
        tries = 0
        while load_acquire(words, {STRIDE} * k) < number:
            tries += 1
            if tries > spin_limit:
                if tries > spin_limit + {YIELDS}:
                    return k
                give_way()
    return n
wait = njit(wait, nogil=True)
"""
"""The source of a function that waits for ranks; generated code that includes it compiles it into itself."""

_WAIT_FOR_ALL: Final = f"""\
{WAIT}
SIGNATURE = "int64(int64[::1], int64, int64, int64, int64, int64)"
def wait_for_all(words, me, n, number, first, spin_limit):
    store_release(words, {STRIDE} * me, number)
    return wait(words, first, n, number, spin_limit)
"""


@functools.cache
def wait_for_all() -> Callable[..., int]:
    """Return the compiled barrier.

    ``wait_for_all(words, me, n, number, first, spin_limit)`` announces that this rank has reached barrier ``number``,
    and waits for the ranks from ``first`` on. Of the ``n`` ranks, this one is ``me``. ``words`` are (STRIDE*n,) int64,
    shared by the ranks. After ``spin_limit`` polls, the call yields the core. The result is the first rank that is
    still missing, or n if all have arrived. Until it is n, call again with the result as ``first``.
    """
    return cache.compiled("wait_for_all", "words", _WAIT_FOR_ALL)


@functools.cache
def sum_on_node(k: int, dtype: Any) -> Callable[..., int]:
    """Return the compiled all-reduce of k ranks.

    ``sum_on_node(words, me, number, progress, spin_limit, z0, ..., start, stop, scale)`` works in three phases. It
    waits for all ranks, replaces the elements start..stop of each vector z0, ... by the scaled sum of all vectors, and
    waits again for all ranks. It passes the barriers ``number`` and ``number + 1``. The result is the progress, which
    is 2k at the end. Until then, call again with the result as ``progress``. 16-bit vectors are passed as uint16.
    """
    storage = storage_of(dtype)
    return cache.compiled("sum_on_node", f"{k}_{storage.short}", source(k, storage))


def source(k: int, storage: Storage) -> str:
    """Return the Python source of ``sum_on_node`` for k vectors and of the constant ``SIGNATURE``, its types."""
    compute = compute_type([storage])
    vectors = [f"z{j}" for j in range(k)]
    arrays = ", ".join([f"{storage.numba}[::1]"] * k)
    total = " + ".join(f"{storage.widen}({z}[i])" for z in vectors)
    lines = [
        *host.conversion_imports([storage]),
        WAIT,
        f'SIGNATURE = "int64(int64[::1], int64, int64, int64, int64, {arrays}, int64, int64, {compute})"',
        f"def sum_on_node(words, me, number, progress, spin_limit, {', '.join(vectors)}, start, stop, scale):",
        f"    if progress < {k}:",
        f"        store_release(words, {STRIDE} * me, number)",
        f"        progress = wait(words, progress, {k}, number, spin_limit)",
        f"        if progress < {k}:",
        "            return progress",
        *(f"        {z} = {z}[start:stop]" for z in vectors),
        "        for i in range(stop - start):",
        f"            m = {storage.narrow}(scale * ({total}))",
        *(f"            {z}[i] = m" for z in vectors),
        f"        store_release(words, {STRIDE} * me, number + 1)",
        f"    return {k} + wait(words, progress - {k}, {k}, number + 1, spin_limit)",
    ]
    return "\n".join([*lines, ""])
