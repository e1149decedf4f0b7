"""Locks in words that the ranks of a node share, acquired and released by compare-and-swap in compiled code.

A word holds a version above its owner bits, which are 0 while the lock is free (``rma.locks``). A swap has acquire and
release semantics: the new owner of a lock sees all writes made under it before. Each word occupies a cache line of its
own, so that ranks waiting for different locks do not disturb each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

from mpitrain.kernels.compile import cache

OWNER_BITS: Final = 24
OWNER_MASK: Final = (1 << OWNER_BITS) - 1
STRIDE: Final = 8  # words: a cache line

ACQUIRE_AND_RELEASE: Final = f"""\
from mpitrain.kernels.native.atomics import compare_and_swap, load_acquire
def acquire(words, at, mine, spin_limit):
    while True:
        found = load_acquire(words, at)
        while found & {OWNER_MASK} == 0:
            free = found
            found = compare_and_swap(words, at, free, free | mine)
            if found == free:
                return found
        if spin_limit == 0:
            return found
        spin_limit -= 1
def release(words, at, mine, updates):
    found = load_acquire(words, at)
    if found & {OWNER_MASK} != mine:
        return found
    return compare_and_swap(words, at, found, ((found >> {OWNER_BITS}) + updates) << {OWNER_BITS})
"""
"""The source of two functions; generated code that includes it compiles them into itself."""

_SIGNATURE: Final = 'SIGNATURE = "int64(int64[::1], int64, int64, int64)"\n'
_LOCK: Final = ACQUIRE_AND_RELEASE + _SIGNATURE
_SWAP: Final = f"""\
from mpitrain.kernels.native.atomics import compare_and_swap
{_SIGNATURE}
def swap(words, at, expected, new):
    return compare_and_swap(words, at, expected, new)
"""


@functools.cache
def acquire() -> Callable[..., int]:
    """Return the compiled function that sets the owner bits of a free lock word.

    ``acquire(words, at, mine, spin_limit)`` sets the owner bits of ``words[at]`` to ``mine`` if the lock is free. If
    the lock is taken, it polls up to ``spin_limit`` times more. ``words`` are int64, shared by the ranks. The result is
    the former word. If its owner bits are zero, the lock has been acquired; otherwise they identify the owner.
    """
    return cache.compiled("acquire", "word", _LOCK)


@functools.cache
def release() -> Callable[..., int]:
    """Return the compiled function that releases a lock and counts updates.

    ``release(words, at, mine, updates)`` adds ``updates`` to the version in ``words[at]`` and clears its owner bits, if
    they are ``mine``. The result is the former word. If its owner bits are not ``mine``, the word has not changed.
    """
    return cache.compiled("release", "word", _LOCK)


@functools.cache
def swap() -> Callable[..., int]:
    """Return the compiled compare-and-swap.

    ``swap(words, at, expected, new)`` sets ``words[at]`` to ``new`` if it equals ``expected``. The result is the former
    word.
    """
    return cache.compiled("swap", "word", _SWAP)
