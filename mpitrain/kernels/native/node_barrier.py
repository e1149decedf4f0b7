"""Ranks of a node that wait for each other, and sum their vectors when all are there, in one compiled call.

Every rank has a word, on a cache line of its own, with the number of the meeting it has come to; to come is to store
that number, to wait is to look at the words of the others. A call that has waited for long returns how far it is, so
that its caller can sleep and see to signals and to MPI, and is made again with what it returned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from mpitrain.kernels.compile import cache, host
from mpitrain.kernels.compile.storage import Storage, compute_type, storage_of

STRIDE: Final = 8  # words: a cache line
YIELDS: Final = 200  # offers of the core, before a call returns without all having come
POLL_ONCE: Final = -YIELDS  # as patience

_WAIT: Final = f"""\
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
"""

_HEAD: Final = f"""\
from numba import njit
from mpitrain.kernels.native.atomics import give_way, load_acquire, store_release
{_WAIT}
wait = njit(wait, nogil=True)
"""

_WAIT_FOR_ALL: Final = f"""\
{_HEAD}
SIGNATURE = "int64(int64[::1], int64, int64, int64, int64, int64)"
def wait_for_all(words, me, n, number, first, spin_limit):
    store_release(words, {STRIDE} * me, number)
    return wait(words, first, n, number, spin_limit)
"""


@functools.cache
def wait_for_all() -> Callable[..., int]:
    """``wait_for_all(words, me, n, number, first, spin_limit)``: arrive, and wait for the ranks from ``first``.

    ``words`` are (STRIDE*n,) int64, shared by the ranks. Returns who is still awaited, n if all have come; then call
    again with that as ``first``. ``spin_limit`` is how often to look before the core is offered to others.
    """
    return cache.compiled("wait_for_all", "words", _WAIT_FOR_ALL)


@functools.cache
def sum_on_node(k: int, dtype: Any) -> Callable[..., int]:
    """``sum_on_node(words, me, number, progress, spin_limit, z0, ..., start, stop, scale)``: an all-reduce of k ranks.

    When all have come, this rank makes the elements start..stop of every vector z0, ... the scaled sum of all of them;
    it returns when all ranks have done so. It is two meetings, ``number`` and ``number + 1``. Returns the progress, 2k
    at the end; call again with what was returned until then. 16-bit vectors are passed as uint16.
    """
    storage = storage_of(dtype)
    return cache.compiled("sum_on_node", f"{k}_{storage.short}", source(k, storage))


def source(k: int, storage: Storage) -> str:
    """Python source of ``sum_on_node`` for k vectors, with its signature as ``SIGNATURE``."""
    compute = compute_type([storage])
    vectors = [f"z{j}" for j in range(k)]
    arrays = ", ".join([f"{storage.numba}[::1]"] * k)
    total = " + ".join(f"{storage.widen}({z}[i])" for z in vectors)
    lines = [
        *host.conversion_imports([storage]),
        _HEAD,
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
