"""Broadcast and reduction of small vectors between the ranks of a node, each step of a rank in one compiled call.

Each rank has two slots in memory that all ranks share, and a word (``native.node_barrier``). The collectives are
numbered. In that of number k, a rank

    put   waits until all words are k - 1, copies its vector to its slot k mod 2, and sets its word to k
    get   sets its word to k, waits until the word of the root is k, and copies the root's slot k mod 2
    add   sets its word to k, waits until all words are k, and adds the slots k mod 2

A rank sets its word to k - 1 after it has left number k - 2, in which that slot was used last. So nobody reads a slot
that is being written.

A call that has waited for long returns its progress, as in ``native.node_barrier``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from mpitrain.kernels.compile import cache, host
from mpitrain.kernels.compile.storage import Storage, storage_of
from mpitrain.kernels.native.node_barrier import STRIDE, WAIT

_COPY: Final = f"""\
{WAIT}
SIGNATURE = "int64(int64[::1], int64, int64, int64, int64, int64, uint8[::1], uint8[::1])"
def put(words, me, n, number, first, spin_limit, slot, vector):
    first = wait(words, first, n, number - 1, spin_limit)
    if first == n:
        for i in range(len(vector)):
            slot[i] = vector[i]
        store_release(words, {STRIDE} * me, number)
    return first
def get(words, me, n, number, root, spin_limit, slot, vector):
    store_release(words, {STRIDE} * me, number)
    if wait(words, root, root + 1, number, spin_limit) == root:
        return root
    for i in range(len(vector)):
        vector[i] = slot[i]
    return n
"""


@functools.cache
def put() -> Callable[..., int]:
    """Return the compiled function that shows a vector to the other ranks.

    ``put(words, me, n, number, first, spin_limit, slot, vector)`` waits for the ranks from ``first`` on. Of the ``n``
    ranks, this one is ``me``. ``words`` are (STRIDE*n,) int64, ``slot`` and ``vector`` bytes. The result is n at the
    end. Until then, call again with the result as ``first``.
    """
    return cache.compiled("put", "bytes", _COPY)


@functools.cache
def get() -> Callable[..., int]:
    """Return the compiled function that copies the vector of a root.

    ``get(words, me, n, number, root, spin_limit, slot, vector)``: as for ``put``. ``slot`` is that of the root. The
    result is n at the end. Until then, call again with the result as ``root``, which it is.
    """
    return cache.compiled("get", "bytes", _COPY)


@functools.cache
def add(k: int, dtype: Any) -> Callable[..., int]:
    """Return the compiled sum of the vectors of k ranks, in the order of their ranks.

    ``add(words, me, number, first, spin_limit, total, z0, ...)``: as for ``put``. ``total`` receives the sum; it may be
    one of the summands z0, ... The result is k at the end. 16-bit vectors are passed as uint16, and added in float32.
    """
    storage = storage_of(dtype)
    return cache.compiled("add", f"{k}_{storage.short}", add_source(k, storage))


def add_source(k: int, storage: Storage) -> str:
    """Return the Python source of ``add`` for k vectors and of the constant ``SIGNATURE``, its types."""
    vectors = [f"z{j}" for j in range(k)]
    arrays = ", ".join([f"{storage.numba}[::1]"] * (k + 1))
    total = " + ".join(f"{storage.widen}({z}[i])" for z in vectors)
    lines = [
        *host.conversion_imports([storage]),
        WAIT,
        f'SIGNATURE = "int64(int64[::1], int64, int64, int64, int64, {arrays})"',
        f"def add(words, me, number, first, spin_limit, total, {', '.join(vectors)}):",
        f"    store_release(words, {STRIDE} * me, number)",
        f"    first = wait(words, first, {k}, number, spin_limit)",
        f"    if first == {k}:",
        "        for i in range(len(total)):",
        f"            total[i] = {storage.narrow}({total})",
        "    return first",
    ]
    return "\n".join([*lines, ""])
