"""Locks in words that the ranks of a node share, taken and given back by compare-and-swap in one compiled call.

A word holds a version above the bits of its owner, which are 0 when nobody has it (``rma.locks``). A swap is a
load with acquire and a store with release semantics: who has taken a lock sees all that was written under it before.
Every word has a cache line of its own, so that ranks which want different locks do not disturb each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

from mpitrain.kernels.compile import cache

OWNER_BITS: Final = 24
OWNER_MASK: Final = (1 << OWNER_BITS) - 1
STRIDE: Final = 8  # words: a cache line

_ACQUIRE: Final = f"""\
from mpitrain.kernels.native.atomics import compare_and_swap, load_acquire
SIGNATURE = "int64(int64[::1], int64, int64, int64)"
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
"""

_SWAP: Final = """\
from mpitrain.kernels.native.atomics import compare_and_swap
SIGNATURE = "int64(int64[::1], int64, int64, int64)"
def swap(words, at, expected, new):
    return compare_and_swap(words, at, expected, new)
"""


@functools.cache
def acquire() -> Callable[..., int]:
    """``acquire(words, at, mine, spin_limit)``: write the owner bits ``mine`` into ``words[at]`` once nobody has it.

    ``words`` are int64, shared by the ranks, ``spin_limit`` is how many times more to look when somebody has it.
    Returns the word as it was: without owner bits when the lock has been taken, else with those of its owner.
    """
    return cache.compiled("acquire", "word", _ACQUIRE)


@functools.cache
def swap() -> Callable[..., int]:
    """``swap(words, at, expected, new)``: make ``words[at]`` new if it is what was expected. Returns what it was."""
    return cache.compiled("swap", "word", _SWAP)
